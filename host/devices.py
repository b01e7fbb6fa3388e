"""The device that --device names."""

import torch


def find_device(name: str) -> torch.device:
    """A device of this machine. auto: cuda, else mps, else cpu. ValueError for what it lacks."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, found in there.items() if found), "cpu")
    if not there.get(name.partition(":")[0], name == "cpu"):
        found = [kind for kind, found in there.items() if found]
        raise ValueError(f"there is no device {name} here; there is {', '.join([*found, 'cpu'])}")
    return torch.device(name)
