"""Quantised numbers: weights of int8 or int4, and KV caches of int8 or int4.

linear.py    Int8Linear and Int4Linear, rounding to nearest, and the scheme: the record in a file
             of how many bits and which group size its linears have
kv_cache.py  QuantizedKVCache, a KVCache whose keys and values take 8 or 4 bits

quantize.py writes a file: it rounds each weight to nearest, or takes the integers that
calibration/ has chosen by GPTQ. load.py reads the scheme, builds the model with linear.meta_model
and fills its buffers. The layers run on every device in plain PyTorch; fast_layers/ replaces them
where kernels/cpu or kernels/gpu are faster. weights/int4_layouts.py translates the int4 checkpoints
of other tools (GPTQ, AWQ) into the buffers of Int4Linear.

Start at linear.Int4Linear. Sources: GPTQ (arXiv 2210.17323) and AWQ (2306.00978) for group sizes
and zero points; FlexGen (2303.06865, section 4) for the cache.
"""
