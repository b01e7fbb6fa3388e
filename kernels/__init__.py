"""Kernels written for one kind of device: C++ for CPUs in cpu/, Triton for NVIDIA GPUs in gpu/."""
