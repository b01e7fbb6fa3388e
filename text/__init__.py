"""Everything between a user's text and a model's token ids. Only processors.py needs torch.

Text to ids: special_tokens.py reads the special and added tokens from the JSON files of a
checkpoint, vocabulary.py opens the vocabulary (tokenizer.json, tokenizer.model, or vocab.json with
merges.txt) behind one interface, Backend, and tokenizer.py combines the two: encode, decode, BOS,
EOS. chat_template.py renders a list of messages with the checkpoint's Jinja template, in a process
with limits.

Ids to text: completion.py takes the ids of one sequence as the model generates them, decodes them
and stops at the first stop string.

How to sample: generation_config.py holds GenerationConfig, with all defaults;
model_defaults.py reads the values that the model's authors chose; processors.py applies logit
biases, penalties and the caller's logits processors.

What the commands use: jobs.py reads files of prompts, forms batches and appends the results to a
JSON Lines file that an interrupted run resumes from; chat.py holds a conversation and reuses the KV
cache from turn to turn; terminal.py reads lines from the keyboard.

Where to start: Tokenizer in tokenizer.py, then Completion in completion.py.
Source: Hugging Face's tokenizers and transformers for the files and their precedence, vLLM for the
sampling parameters.
"""
