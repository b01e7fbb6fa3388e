"""Kernels written for one kind of machine: cpu/ in C++ with AVX-512 and AMX, gpu/ in Triton."""
