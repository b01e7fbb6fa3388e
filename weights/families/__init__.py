"""The families of models: how each config.json becomes ModelArgs, and how its tensors are named.

shared.py      Family; what the families share; the names of Llama's tensors
rope.py        rotary positions and their scalings, in both schemas
llama.py       Llama, Mistral, Ministral, Qwen 2 and 3, SmolLM 3, Granite, Phi 3
gemma.py       Gemma 2 and 3
olmo.py        OLMo 2 and 3
layer_norm.py  OPT, StarCoder 2, StableLM, Nemotron
multimodal.py  the language models of Gemma 3, Mistral 3, Qwen 2-VL and Qwen 2.5-VL

Each family has a function of a Config that returns ModelArgs: it reads every key that changes the
logits, and raises ValueError for a value that model.py cannot follow. CONTRIBUTING.md says how to
add a family.
"""
