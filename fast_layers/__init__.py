"""Layers that are faster on one kind of device. They replace layers of a loaded model.

install.py  use_fast_layers: called by load.py after the weights are loaded; picks cpu or gpu
cpu.py      layers on the kernels of kernels/cpu (C++): packed quantised weights, dense products,
            attention
gpu.py      layers on the kernels of kernels/gpu (Triton): dense products of one row, attention over
            quantised caches
fused_block.py  blocks whose products compute norms, gates and residual sums, too; cpu.py and gpu.py
            derive theirs from it

A fast layer has the weights and the arguments of the layer that it replaces. The replaced layer is
slower and is the reference in tests. If the GPU, the dtype or (on a CPU) the lack of a C++ compiler
rules the fast layers out, the model keeps its layers. On a CPU a log line tells why.

Attention is no layer: it is replaced in layers.kv_cache.CacheFactory, which makes the KV caches.

Start at install.use_fast_layers.
"""
