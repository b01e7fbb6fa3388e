"""A CUDA device for machines without one: it computes on the host, and is as strict as a real one.

Tensors say that they are on cuda:0. Operators refuse mixed devices, as CUDA's do. Copies that do
not block happen as late as a GPU may do them, when their stream is next waited for: who reads a
buffer too early, or fills one again too early, gets wrong numbers. And each stream knows what it
has waited for: work on memory that another stream may still be using raises Race, as
torch.cuda._sanitizer would say. `waits` counts how often the host waited for the device.

Use `with pretended_cuda() as device`, on a CPU build of torch.
"""

import contextlib
import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
PAGE = 4096  # bytes
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
READ_BY_HOST = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}

ITEMS = {Tensor.__getitem__, Tensor.__setitem__}
READ = {Tensor.tolist, Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__}
WHOLE = {F.scaled_dot_product_attention, Tensor.new_tensor, Tensor.split, *ITEMS}


class Race(RuntimeError):
    """Two streams use the same memory, and neither waits for the other."""


class Stream:
    def __init__(self, *_: Any):
        self.now, self.pending = 0, []  # the number of what was last begun; copies not yet done
        self.knows: dict[Stream, int] = defaultdict(int)  # how far others are, at least

    def finish(self, until: int) -> None:
        with LOCK:
            while self.pending and self.pending[0][0] <= until:
                self.pending.pop(0)[1]()

    def wait_event(self, event: "Event") -> None:
        event.stream.finish(event.at)
        for stream, at in event.knows.items():
            self.knows[stream] = max(self.knows[stream], at)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    def __init__(self, **_: Any):
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or here()
        self.at, self.knows = self.stream.now, self.stream.knows | {self.stream: self.stream.now}

    def synchronize(self) -> None:
        DEVICE.waits += 1
        self.stream.finish(self.at)
        for stream, at in self.knows.items():
            DEVICE.host[stream] = max(DEVICE.host[stream], at)


class Device:
    """What is known of it: how far the host knows of each stream, and who used which memory."""

    def __init__(self):
        self.default, self.waits = Stream(), 0
        self.host: dict[Stream, int] = defaultdict(int)
        self.written: dict[int, tuple[Stream, int]] = {}
        self.read: dict[int, dict[Stream, int]] = defaultdict(dict)

    def uses(self, stream: Stream, tensors: list[Tensor], writes: bool) -> None:
        for tensor in tensors:
            at = address(tensor)
            others = dict(self.read[at]) if writes else {}
            if at in self.written:
                other, time = self.written[at]
                others[other] = max(time, others.get(other, 0))
            known = {other: max(stream.knows[other], self.host[other]) for other in others}
            if any(known[x] < time for x, time in others.items() if x is not stream):
                raise Race(f"{tuple(tensor.shape)} {tensor.dtype} is still used by a stream")
            if writes:
                self.made(stream, tensor)
            else:
                self.read[at][stream] = stream.now

    def forget(self, tensor: Tensor) -> None:
        with LOCK:
            self.written.pop(address(tensor), None)
            self.read.pop(address(tensor), None)

    def made(self, stream: Stream, tensor: Tensor) -> None:
        self.written[address(tensor)] = stream, stream.now
        self.read.pop(address(tensor), None)


DEVICE, LOCK, LOCAL = Device(), threading.RLock(), threading.local()


def here() -> Stream:
    return getattr(LOCAL, "stream", DEVICE.default)


def address(tensor: Tensor) -> int:
    return real(tensor).untyped_storage().data_ptr()


def real(x: Any) -> Any:
    return x.inner if isinstance(x, Pretended) else x


class Pretended(Tensor):
    """On cuda:0, as it says; `inner` has its numbers."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretended":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        with torch.inference_mode(False):  # a view of what is none must be none
            tensor = Tensor._make_wrapper_subclass(
                cls, inner.shape, **layout, dtype=inner.dtype, device=CUDA
            )
        tensor.inner = inner
        return tensor

    def __repr__(self) -> str:
        return f"Pretended({self.inner})"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.backward:  # autograd asks for CUDA's own threads: nothing is trained
            return None
        if func in READ:
            return func(args[0].cpu())
        if func is Tensor.copy_:
            return cls.__torch_dispatch__(torch.ops.aten.copy_.default, types, args, kwargs)
        if func in WHOLE:
            with LOCK:
                return whole(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        with LOCK:
            return dispatched(func, args, kwargs or {})


def whole(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A call that is not taken apart: on its way down it would look for what only CUDA has."""
    at, value = (args[1], args[2:]) if func in ITEMS else (None, args[1:])
    begin(func, [args[0], *value], list(kwargs.values()))
    here().synchronize() if func is Tensor.__getitem__ and has_mask(at) else None
    out = func(*tree_map(real, args), **tree_map(real, kwargs))
    ended(out, args, [args[0]] if func is Tensor.__setitem__ else [])
    return tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) else x, out)


def has_mask(index: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_flatten(index)[0])


def begin(func: Any, args: list[Any], more: list[Any]) -> None:
    """The current stream goes on to an operator, which must be given what is on the device."""
    stream = here()
    stream.finish(stream.now)
    stream.now += 1
    given = [x for x in tree_flatten((args, more))[0] if isinstance(x, Tensor)]
    indexing = "index" in str(func)
    strangers = [x for x in given if not isinstance(x, Pretended) and x.dim() and not indexing]
    scalars = [x for x in given if not isinstance(x, Pretended) and not x.dim()]
    if strangers or (scalars and "nextafter" in str(func)):
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device")


def ended(out: Any, args: Any, mutated: list[Tensor]) -> None:
    """Remember what an operator has read and written; a view does neither."""
    given = [x for x in tree_flatten(args)[0] if isinstance(x, Pretended)]
    known = {address(x) for x in given}
    outs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
    made = [x for x in outs if address(x) not in known]
    if made or mutated or not outs:
        DEVICE.uses(here(), given, writes=False)
    DEVICE.uses(here(), mutated, writes=True)
    for x in made:
        DEVICE.made(here(), x)


def dispatched(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.aten._has_compatible_shallow_copy_type.default:
        return False
    if func._schema.name == "aten::to":
        return func.decompose(*args, **kwargs)
    if func in COPIES:
        return copied(func, args, kwargs)
    begin(func, list(args), list(kwargs.values()))
    if func in READ_BY_HOST:
        here().synchronize()
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": CPU}
    out = func(*tree_map(real, args), **tree_map(real, kwargs))
    schema = func._schema.arguments
    mutated = [
        kwargs.get(a.name, args[n] if n < len(args) else None)
        for n, a in enumerate(schema)
        if a.alias_info and a.alias_info.is_write
    ]
    mutated = [x for x in tree_flatten(mutated)[0] if isinstance(x, Tensor)]
    ended(out, (args, kwargs), mutated)
    returned = dict(zip(map(id, tree_map(real, mutated)), mutated, strict=True))

    def wrapped(x: Any) -> Any:
        return returned.get(id(x), Pretended(x)) if isinstance(x, Tensor) else x

    return tree_map(wrapped, out)


def copied(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """copy_ and to: what does not block is done when the stream is waited for."""
    stream = here()
    stream.finish(stream.now)
    stream.now += 1
    if func is torch.ops.aten.copy_.default:
        to, source = args[:2]
        later = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        DEVICE.uses(stream, [to], writes=True)
    else:
        (source,), later = args, kwargs.get("non_blocking", False)
        device = kwargs.get("device") or source.device
        like = torch.empty_like(source.inner if isinstance(source, Pretended) else source)
        like = like.to(kwargs.get("dtype") or source.dtype).fill_(77)  # not there yet
        to = like if device.type == "cpu" else Pretended(like)
        DEVICE.made(stream, to)
    DEVICE.uses(stream, [source], writes=False)
    if isinstance(to, Pretended) and isinstance(source, Pretended):
        to.inner.copy_(source.inner)
        return to
    stream.pending.append((stream.now, lambda: real(to).copy_(real(source))))
    if not later:
        stream.synchronize()
    return to


@contextlib.contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    before = here()
    LOCAL.stream = stream or before
    yield
    LOCAL.stream = before


def allocated(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return fresh(torch.empty(size, dtype=dtype))


def strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return fresh(torch.empty_strided(size, stride, dtype=dtype))


def fresh(inner: Tensor) -> Pretended:
    with LOCK:
        here().now += 1
        DEVICE.made(here(), inner)
    return Pretended(inner)


@contextlib.contextmanager
def pretended_cuda() -> Iterator[Device]:
    if torch.backends.cuda.is_built():
        pytest.skip("this torch was built for CUDA: its own kernels would be in the way")
    library = torch.library.Library("aten", "IMPL")

    def moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def made(*given: Any, device: Any = None, **options: Any) -> Tensor:
            if device is None or torch.device(device).type != "cuda":
                return make(*given, device=device, **options)
            return fresh(make(*given, device=CPU, **options))

        return made

    def pinnable(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def made(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
            if not pin_memory:
                return make(*size, **options)
            tensor = make(size[0] + PAGE, **options)  # of bytes
            DEVICE.forget(tensor)  # another one may have been there
            start = -tensor.data_ptr() % PAGE
            return tensor[start : start + size[0]]

        return made

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(library._destroy)
        library.impl("empty.memory_format", allocated, "CUDA")
        library.impl("empty_strided", strided, "CUDA")
        vars(DEVICE).update(vars(Device()))
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "Stream": Stream,
            "Event": Event,
            "stream": on_stream,
            "current_stream": lambda device=None: here(),
            "synchronize": lambda device=None: here().synchronize(),
            "mem_get_info": lambda device=None: (2**33, 2**33),
            "get_device_name": lambda device=None: "pretended",
        }.items():
            patch.setattr(torch.cuda, name, value)
        for name in ("tensor", "arange"):
            patch.setattr(torch, name, moved(getattr(torch, name)))
        for name in ("zeros", "empty"):
            patch.setattr(torch, name, pinnable(getattr(torch, name)))
        patch.setattr(Tensor, "pin_memory", lambda self, *_: self.clone())
        yield DEVICE
