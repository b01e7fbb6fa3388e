"""Allocates the tensors of a model that was built on the meta device, each of them once.

Start at allocate. stored_tensors lists what a checkpoint stores of a model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from host.memory import check_memory, page_aligned

# Allocates a tensor, given its name, shape and dtype. None: the tensor stays on the meta device.
Allocator = Callable[[str, torch.Size, torch.dtype], Tensor | None]


def allocate(
    model: nn.Module,
    device: str | torch.device,
    dtype: torch.dtype,
    fill: Callable[[str, Tensor], Any],
    allocator: Allocator | None = None,
) -> None:
    """Allocate and fill the tensors of a model that was built on the meta device.

    dtype: of floating-point parameters; other tensors keep the dtype that the model declares.
    fill: called with each tensor's name and its memory. allocator: None: all tensors are allocated
    on `device`, and MemoryError is raised before the first if they do not fit.
    """
    stored = stored_tensors(model)
    final = {name: final_dtype(tensor, dtype) for name, (tensor, _) in stored.items()}
    if allocator is None:
        check_fits(stored, final, device)
    for name, (tensor, aliases) in stored.items():
        if allocator:
            value = allocator(name, tensor.shape, final[name])
        else:
            value = allocate_tensor(tensor.shape, final[name], torch.device(device))
        if value is None:
            continue
        fill(name, value)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)  # shared by all aliases
        for alias in aliases:
            set_tensor(model, alias, value)
    move_unstored_buffers(model, device)


def check_fits(
    stored: dict[str, tuple[Tensor, list[str]]],
    final: dict[str, torch.dtype],
    device: str | torch.device,
) -> None:
    """Raises MemoryError if the tensors, in their final dtypes, do not fit on the device."""
    needed = sum(t.numel() * final[name].itemsize for name, (t, _) in stored.items())
    remedy = "choose a smaller --dtype, a quantised checkpoint, or --offload auto"
    check_memory(needed, device, "the model", remedy)


def move_unstored_buffers(model: nn.Module, device: str | torch.device) -> None:
    """Move non-persistent buffers, which no checkpoint stores, to the device."""
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if name not in persistent:
            set_tensor(model, name, buffer.to(device))


def allocate_tensor(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor of zeros in page-aligned memory, in huge pages on a CPU."""
    return page_aligned(shape.numel() * dtype.itemsize, device).view(dtype).view(shape)


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or a buffer of a model by its name in the state dict."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    parameter = isinstance(getattr(owner, leaf), nn.Parameter)
    if parameter and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, leaf, value)


def stored_tensors(model: nn.Module) -> dict[str, tuple[Tensor, list[str]]]:
    """Returns the tensors of the state dict, each once: first name -> (tensor, all its names)."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: (state[aliases[0]], aliases) for aliases in names.values()}


def final_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns `dtype` for a floating-point parameter, and the tensor's own dtype otherwise."""
    floating = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return dtype if floating else tensor.dtype
