"""Finds the torch.device for --device. Start at find_device."""

import torch


def find_device(name: str) -> torch.device:
    """Returns the torch.device of a name, such as cuda:1. The name auto stands for the first of
    cuda, mps and cpu that exists. Whether a GPU with that number exists is not checked.

    Raises ValueError, which lists the available devices, if there is no device of that type.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    gpus = [kind for kind, usable in available.items() if usable]
    if name == "auto":
        name = next(iter(gpus), "cpu")
    if not available.get(name.partition(":")[0], name == "cpu"):  # cpu is always available
        raise ValueError(f"there is no device {name} here; there is {', '.join([*gpus, 'cpu'])}")
    return torch.device(name)
