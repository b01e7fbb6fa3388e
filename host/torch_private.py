"""The only file that uses what is private in PyTorch; everything else uses its public API.

Seen to work on torch 2.11 and 2.13. tests/test_torch_private.py tests each function by itself, so
that a test names what a new version of torch has changed.
torch._dynamo and torch._inductor take a second each to import: functions import them.
"""

import copy
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

# --- modules: nn.Module shares these dictionaries with a copy.copy of it


def shallow_copy(module: nn.Module) -> nn.Module:
    """Copy a module and its submodules; parameters and buffers are the same tensors."""
    copied = copy.copy(module)
    copied._parameters, copied._buffers = dict(module._parameters), dict(module._buffers)
    copied._modules = {name: shallow_copy(part) for name, part in module._modules.items()}
    return copied


def copy_with_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> nn.Module:
    """Copy a module without submodules, with other tensors in the place of its buffers."""
    copied = copy.copy(module)
    copied._buffers = buffers
    return copied


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's own buffers by name.

    A dictionary look-up: a compiled step asks every layer's cache, and named_buffers() is a
    generator that takes 12 times as long.
    """
    return module._buffers


# --- torch.compile


def allow_recompiles(limit: int) -> None:
    """Let a function be compiled so many times before torch.compile falls back to eager code."""
    importlib.import_module("torch._dynamo").config.recompile_limit = limit


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """Compile for every size of that dimension of an input; Dynamo reads the mark at the call."""
    torch._dynamo.mark_dynamic(tensor, dimension)


def compile_with_inductor(
    traced: torch.fx.GraphModule, examples: Sequence[Any], options: dict[str, Any]
) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph that Dynamo has traced, as backend="inductor" with these options does."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(traced, examples, config_patches=options)


def has_triton_option(name: str) -> bool:
    """Returns whether this version of Inductor has the option triton.NAME."""
    from torch._inductor import config

    return hasattr(config.triton, name)


def import_dynamo() -> None:
    importlib.import_module("torch._dynamo")


def import_inductor() -> None:
    importlib.import_module("torch._inductor.compile_fx")


def compiled_graphs() -> int:
    """Returns how many graphs Dynamo has compiled since the counters were cleared."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


# --- operators and files


def has_cpu_kernel(operator: str) -> bool:
    """Returns whether an operator, namespace::name, has a kernel for tensors on the CPU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU")


def fake_tensors() -> AbstractContextManager:
    """Make tensors that have a device and a shape, and no memory; torch.save takes them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def offset_in_file(storage: torch.UntypedStorage) -> int | None:
    """Returns the byte at which a storage that was loaded onto meta begins in its file.

    None: the file is no zip, but of torch before 1.6.
    """
    return getattr(storage, "_checkpoint_offset", None)


# --- torch.distributed


def add_in_store(key: str, amount: int) -> int:
    """Add to a number that all ranks share; returns the sum. The process group must exist."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store().add(key, amount)


def one_shot_all_reduce(x: Tensor, group: str) -> Tensor:
    """Sum a tensor over the ranks by one kernel that reads the other GPUs' memory.

    Raises RuntimeError where the GPUs cannot, and ImportError where torch was built without it.
    """
    from torch.distributed import _symmetric_memory as symmetric_memory

    symmetric_memory.enable_symm_mem_for_group(group)
    shared = symmetric_memory.empty(*x.shape, dtype=x.dtype, device=x.device).copy_(x)
    symmetric_memory.rendezvous(shared, group)
    return torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", group)
