"""C++ operators for CPUs: AMX, AVX-512, AVX-VNNI, AVX2, ARM's NEON (with and without dot products)
and plain C++.

build.py compiles the sources at the first use, for the fastest instruction set that this CPU has,
and registers each operator as torch.ops.gpt_flex.NAME. linear_operators.cpp, layer_operators.cpp,
layer_functions.h and decoder_layer.h share the work of an operator between threads. Headers that
know nothing of torch compute it, but for gemm.h and linear_avx512.h, which use PyTorch:

    pack              a checkpoint's int8 or int4 weights -> packed weights (layout.h)
    quantized_linear  rows by packed weights. fixed_point.h converts the rows to integers;
                      strip_products.h multiplies them by the weights, both in the form that
                      factors.h gives them. On CPUs with AVX-512 VNNI, vnni.h, amx_int8.h or gemm.h
                      multiplies instead
    linear            rows by dense bfloat16 or float16 weights
    decoder_layer     the weights and settings of a layer -> one tensor, for the next three
    run_layer         a decoder layer: norms, products, rotary positions, a store of new keys and
                      values in the KV cache, attention to it, gate, residual sums
    project_heads     the part of run_layer before the store
    finish_layer      the part of run_layer after the attention
    attention         attention of up to 128 queries of a key/value head over the KV cache
    fast_rms_norm     RMS norm of rows
    fast_gelu_tanh    the activation of Gemma and StarCoder 2; fast_silu: that of Llama
    neurons           feed-forward layers of which few neurons are active (neurons/)

vector.h defines vectors of sixteen numbers, with which the kernels are written once; vector_*.h
define them for each instruction set. Products of integers are exact and other sums have a fixed
order. So all instruction sets give the same bits, except for dense bfloat16 products, which AVX-512
BF16, AMX and PyTorch add in other orders. A row's result has the same bits whatever rows are beside
it, with three exceptions: `linear` adds in another order from 17 rows on, AVX-512 BF16 and AMX
multiply many bfloat16 rows otherwise than few, and attention of more queries is PyTorch's.

Start at layout.h, vector.h, then quantized_linear.h. fast_layers/cpu.py puts the operators into a
model; neurons/products.py calls neurons. PyTorch's own layers are the reference in
tests/test_cpu_products.py; tests/test_instruction_sets.py compares the instruction sets, ARM and
AVX-512 under emulation where the CPU lacks them.
"""
