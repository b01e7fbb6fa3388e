"""Finds the torch.device for --device. Start at find_device."""

import torch


def find_device(name: str) -> torch.device:
    """Returns a device of this machine. auto: cuda, else mps, else cpu.

    Raises ValueError, which lists the available devices, for any other.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found = [kind for kind, usable in available.items() if usable]
    if name == "auto":
        name = next(iter(found), "cpu")
    if not available.get(name.partition(":")[0], name == "cpu"):
        raise ValueError(f"there is no device {name} here; there is {', '.join([*found, 'cpu'])}")
    return torch.device(name)
