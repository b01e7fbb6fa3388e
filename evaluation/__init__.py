"""Measures how good a model is: log-likelihoods of texts, and lm_eval's tasks.

scoring.py computes log-likelihoods. A caller gives sequences of ids, each with the position from
which its ids are scored. Sequences with a common prefix, such as a question with each of its
answers, become a prefix tree, and the model reads each prefix once. Up to rounding, the results
equal those of scoring each sequence separately.

harness.py is the adapter to EleutherAI's lm_eval (a subclass of its TemplateLM): tasks ask for
log-likelihoods, which scoring.py computes, or for generated text, which engine.complete generates.
Only `eval.py --tasks` imports it, because lm_eval takes seconds to import.

perplexity.py divides a text into windows and sums their log-likelihoods.

Data flow: eval.py -> windows of a text or documents of a task -> ids -> log_likelihoods -> sums.
Where to start: log_likelihoods in scoring.py.
Source: lm_eval's Hugging Face backend (lm_eval/models/huggingface.py), whose figures the tests
compare; prefix sharing as in SGLang's RadixAttention (arXiv 2312.07104).
"""
