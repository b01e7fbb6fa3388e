"""C++ operators for CPUs with AVX-512 VNNI and BF16; they use AMX where the CPU has it.

build.py compiles the sources at the first use, for the CPU that it runs on, and registers each as
torch.ops.gpt_flex.NAME. Python calls four operators for computing, one for packing, and two that
return the constants of the packed layout:

    pack.cpp              a checkpoint's int8 or int4 weights -> packed weights (layout.h)
    quantized_linear.cpp  rows by packed weights. fixed_point.h converts the rows to integers;
                          vnni.h multiplies few rows, amx_int8.h eight at a time, gemm.h many
    linear.cpp            up to 16 rows by dense bfloat16 weights
    attention.cpp         attention of few queries over the KV cache
    neurons.cpp           feed-forward layers of which few neurons are active (neurons/)

amx.h, avx512.h and packed_weights.h are helpers of these. Weights and inputs are bfloat16 or
quantised, sums are float32 or exact integers, and a row's result has the same bits whatever rows
are beside it.

Start at layout.h, then quantized_linear.cpp. fast_layers/cpu.py puts the operators into a model;
neurons/products.py calls neurons. PyTorch's own layers are the reference in
tests/test_cpu_products.py, and tests/test_packed_layout.py checks layout.h on any CPU.
"""
