"""Allocates the tensors of a model that was built on the meta device, shared tensors once.

All tensors of such a model are on the meta device, except non-persistent buffers (rotary
frequencies), which are computed on the CPU. Start at allocate. stored_tensors lists the tensors of
a model that its checkpoint stores. The aliases of a tensor are all its names in the model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from host.memory import check_memory, page_aligned

Fill = Callable[[str, Tensor], Any]  # (name, tensor): writes the values of a weight into tensor
# A function that allocates a tensor, given its name, shape and dtype. Returns None if the tensor is
# to stay on the meta device.
Allocator = Callable[[str, torch.Size, torch.dtype], Tensor | None]


def allocate(
    model: nn.Module,
    device: str | torch.device,
    dtype: torch.dtype,
    fill: Fill,
    allocator: Allocator | None = None,
) -> None:
    """Allocate the tensors of a model that was built on the meta device, and fill them.

    dtype: the dtype of floating-point parameters; other tensors keep the dtype that the model
    declares. fill: called with each tensor's name and its memory, to read the values into it.
    allocator: StreamedLayers.destination of offload.py, which decides where each tensor lies; a
    tensor for which it returns None stays on the meta device and is not filled. Without an
    allocator all tensors are allocated on `device`, and MemoryError is raised, before the first
    allocation, if they do not fit.
    """
    stored = stored_tensors(model)
    dtypes = {name: final_dtype(tensor, dtype) for name, (tensor, _) in stored.items()}
    if allocator is None:
        check_fits(stored, dtypes, device)
    for name, (tensor, aliases) in stored.items():
        if allocator:
            value = allocator(name, tensor.shape, dtypes[name])
        else:
            value = allocate_tensor(tensor.shape, dtypes[name], torch.device(device))
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
    dtypes: dict[str, torch.dtype],
    device: str | torch.device,
) -> None:
    """Raises MemoryError if the tensors do not fit into the device's free memory.

    stored: see stored_tensors. dtypes: the dtype in which each tensor will be allocated, by name.
    """
    needed = sum(t.numel() * dtypes[name].itemsize for name, (t, _) in stored.items())
    remedy = "choose a smaller --dtype, a quantised checkpoint, or --offload auto"
    check_memory(needed, device, "the model", remedy)


def move_unstored_buffers(model: nn.Module, device: str | torch.device) -> None:
    """Move the non-persistent buffers, which no checkpoint stores, to the device.

    They were computed on the CPU when the model was built: `allocate` has no values to read for
    them.
    """
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if name not in persistent:
            set_tensor(model, name, buffer.to(device))


def allocate_tensor(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor of zeros in page-aligned memory, on a CPU in huge pages if it is 2 MiB or
    larger."""
    return page_aligned(shape.numel() * dtype.itemsize, device).view(dtype).view(shape)


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or a buffer of a model by `value`. name: as in the state dict.

    A parameter stays one: `value` is wrapped in nn.Parameter if it is a plain tensor. Shape and
    device may differ from those of the old tensor.
    """
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    parameter = isinstance(getattr(owner, leaf), nn.Parameter)
    if parameter and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, leaf, value)


def stored_tensors(model: nn.Module) -> dict[str, tuple[Tensor, list[str]]]:
    """Returns the tensors of the state dict, shared ones once: first name -> (tensor, all names).

    Tied embedding and output weights, for example, are one tensor with two names.
    """
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)  # the tensors themselves: shared ones have one id
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: (state[aliases[0]], aliases) for aliases in names.values()}


def final_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns `dtype` for a floating-point parameter, and the tensor's own dtype otherwise."""
    floating = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return dtype if floating else tensor.dtype
