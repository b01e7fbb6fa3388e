"""Checks whether the kernels run on a GPU, and which features it has. Does not import Triton."""

import functools
import importlib.util

import torch

MIN_CAPABILITY = 8, 0  # Ampere: the first tensor cores that multiply bfloat16


@functools.cache
def unsupported_reason(device: torch.device) -> str | None:
    """Return why the kernels do not run on a device, or None if they do."""
    # AMD's GPUs are of device type "cuda", too, but PyTorch for them has no torch.version.cuda.
    if device.type != "cuda" or torch.version.cuda is None:
        return "they are for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"this GPU has compute capability {capability[0]}.{capability[1]}, below 8.0"
    return None


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Return whether a kernel may start before the previous one has ended (programmatic dependent
    launch): on NVIDIA GPUs of compute capability 9.0 or higher."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
