"""Private parts of PyTorch. All other files use its public API, with one exception: tp.py imports
torch's functional collectives, because torch.compile must see them in the code that it compiles.

Seen to work on torch 2.11 (GPU) and 2.13 (CPU). tests/test_torch_private.py tests each function by
itself, so that a test names what a new version of torch has changed.
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
    """Copy a module and all its submodules, but not its parameters and buffers.

    The copy refers to the same tensors. Replacing one in the copy does not change the original;
    writing to one changes both.
    """
    copied = copy.copy(module)
    copied._parameters, copied._buffers = dict(module._parameters), dict(module._buffers)
    copied._modules = {name: shallow_copy(part) for name, part in module._modules.items()}
    return copied


def copy_with_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> nn.Module:
    """Copy a module that has no submodules, with the given tensors as its buffers, by name. For
    views of KV caches."""
    copied = copy.copy(module)
    copied._buffers = buffers
    return copied


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns the dictionary of a module's buffers, without those of submodules.

    A step of compiled code asks every layer's cache for its buffers, and named_buffers() takes 12
    times as long, because it is a generator. Do not change the dictionary.
    """
    return module._buffers


# --- torch.compile


def allow_recompiles(limit: int) -> None:
    """Let torch.compile compile each function up to `limit` times, for different inputs; after that
    it runs the function uncompiled. Holds for the whole process."""
    importlib.import_module("torch._dynamo").config.recompile_limit = limit


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """Mark an input of a function, so that torch.compile compiles the function once for all sizes
    of this dimension.

    Call it before the first call of the function with the tensor, in which Dynamo reads the mark.
    """
    torch._dynamo.mark_dynamic(tensor, dimension)


def compile_with_inductor(
    traced: torch.fx.GraphModule, examples: Sequence[Any], options: dict[str, Any]
) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph that Dynamo has traced, as torch.compile(backend="inductor") does.

    examples: the graph's inputs. options: those of torch.compile.
    """
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(traced, examples, config_patches=options)


def has_triton_option(name: str) -> bool:
    """Returns whether this version of Inductor has the option triton.NAME."""
    from torch._inductor import config

    return hasattr(config.triton, name)


def import_dynamo() -> None:
    """Import torch._dynamo, so that a later use does not wait for the import."""
    importlib.import_module("torch._dynamo")


def import_inductor() -> None:
    """Import torch._inductor, so that a later use does not wait for the import."""
    importlib.import_module("torch._inductor.compile_fx")


def compiled_graphs() -> int:
    """Returns how many graphs Dynamo has compiled since its counters were cleared."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


# --- operators and files


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x, (M, K) bfloat16, by integers, (N, K) int8, on the CPU -> (M, N) bfloat16.

    Both are contiguous, and K is a multiple of 32. The operator checks neither K nor its bounds:
    with K = 37 it read past the end of the rows, returned 1e37 or crashed. It computes no gradient.
    """
    return torch._weight_int8pack_mm(x, weight, x.new_ones(len(weight)))


def fake_tensors() -> AbstractContextManager:
    """Returns a context in which new tensors have a device and a shape, but no memory.

    torch.save accepts these tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def offset_in_file(storage: torch.UntypedStorage) -> int | None:
    """Returns the byte offset of a storage in its file, after torch.load with map_location="meta".

    None: the file is no zip; torch before 1.6 wrote it.
    """
    return getattr(storage, "_checkpoint_offset", None)


# --- torch.distributed


def add_in_store(key: str, amount: int) -> int:
    """Add `amount` to the number that all ranks share under `key`, at first 0; returns the sum.

    The process group must exist. Other ranks need not call it.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store().add(key, amount)


def one_shot_all_reduce(x: Tensor, group: str) -> Tensor:
    """Returns the sum of a tensor over the ranks, by one kernel that reads the other GPUs' memory.

    All ranks must call it together. group: the name of the process group. Raises RuntimeError if
    the GPUs cannot read each other's memory, and ImportError if torch was built without this
    feature.
    """
    from torch.distributed import _symmetric_memory as symmetric_memory

    symmetric_memory.enable_symm_mem_for_group(group)
    shared = symmetric_memory.empty(*x.shape, dtype=x.dtype, device=x.device).copy_(x)
    symmetric_memory.rendezvous(shared, group)
    return torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", group)
