"""What is learned from texts: integers of int4 weights, and predictors of active neurons.

texts.py      calibrated_blocks: the way from a text to the int4 weights of all blocks, for
              quantize.py --mode int4-gptq
gptq.py       GPTQ of one block after another, so that one block is in memory at a time
distill.py    training of the integers through the whole model, for small models
predictor.py  which feed-forward neurons a token activates, for flash.py

The calibration text is cut into texts of equal length, which become token ids
(texts.calibration_tokens). They run through the dense model block (layer) by block; gptq.py and
predictor.py see the inputs of each linear or feed-forward layer. What is learned is kept in a file
for each block, in a directory beside the result, and the same command continues from these files
after an interruption. Of the commands only quantize.py and flash.py import this package: no model
needs it to run.

Start at texts.calibrated_blocks. Sources: GPTQ (arXiv 2210.17323), QuantEase (2309.01885), GPTAQ
(2504.02692), LLM-QAT (2305.17888), LLM in a flash (2312.11514).
"""
