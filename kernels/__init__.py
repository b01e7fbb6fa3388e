"""Kernels written for one kind of machine: gpu/ holds the Triton kernels for NVIDIA GPUs."""
