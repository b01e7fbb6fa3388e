"""A model's step under torch.compile: how it is compiled, and how it is called.

Start at compiled_view. As in gpt-fast a step is compiled over a KV cache that does not move. On a
CPU the whole step is one graph. On a GPU the embedding, one block and the head are a graph each,
and the block's serves all layers, whose weights are its inputs: that compiles a model of any depth
in the time of one layer. The launches of the whole step are then recorded as a CUDA graph
(CudaGraphs), by ourselves and not by the mode "reduce-overhead": that would check the address of
every weight at each step, record again for new caches, and warn of each size of the visible cache.
"""

import contextlib
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fast_layers.cpu import PackedLinear
from host.torch_private import (
    allow_recompiles,
    compile_with_inductor,
    has_triton_option,
    import_dynamo,
    import_inductor,
    mark_dynamic,
    own_buffers,
    shallow_copy,
)
from kernels.gpu.support import dependent_launch
from model import KVCache, Rotation, Transformer
from ranks import has_one_shot_all_reduce

FRAME = 2**13  # words of Python's stack, 64 kB
Graph = Callable[..., Sequence[Tensor]]


def compiled_view(
    model: Transformer, device: torch.device, cuda_graphs: bool = True
) -> Callable[..., Tensor]:
    """The model compiled: a function that is called as Transformer.forward is.

    One graph serves all lengths of the cache, all numbers of new tokens above one, and all numbers
    of picked tokens. The model must keep the tensors that it has now. cuda_graphs: record CUDA
    graphs on a GPU; not for prefill, since a graph is recorded for each length, and not if the host
    computes or reads within a step.
    """
    # One graph for each batch size and length of the caches; at 8 the compiler would give up.
    allow_recompiles(64)
    if device.type != "cpu":
        step = compiled_parts(model, {"options": gpu_options(device)})
        return CudaGraphs(step, device) if cuda_graphs and device.type == "cuda" else step
    compiled_graphs = CompiledGraphCache()
    settings = {"backend": compiled_graphs.inductor(cpu_options(model))}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, **settings)

    def view(
        tokens: Tensor, pos: Tensor, key_pos: Tensor, caches: Sequence[KVCache], *at: Tensor
    ) -> Tensor:
        tokens, pos, *at = map(fresh, (tokens, pos, *at))
        given = [tokens, pos, key_pos, *at, *(t for c in caches for t in own_buffers(c).values())]
        if (logits := compiled_graphs.take(given)) is not None:
            return logits
        vary_inputs(tokens, pos, key_pos, *at)
        with compiled_graphs.watching(given):
            return compiled(tokens, pos, key_pos, caches, *at)

    # Python keeps its frames in chunks of 16 kB. Where one ends within a step, every call beyond
    # maps memory and unmaps it again: 10 ms a step, or nothing, as chance would have it. A frame
    # this large begins a chunk of its own, which has room for all that it calls.
    view.__code__ = view.__code__.replace(co_stacksize=FRAME)
    return view


def compiled_parts(model: Transformer, settings: dict[str, Any]) -> Callable[..., Tensor]:
    """A model's forward of which the embedding, a block and the head are compiled."""
    settings = settings | {"fullgraph": True, "dynamic": False}
    embed = torch.compile(model.embed, **settings)
    unembed = torch.compile(model.unembed, **settings)
    run = torch.compile(call_block, **settings)

    def step(
        tokens: Tensor, pos: Tensor, key_pos: Tensor, caches: Sequence[KVCache], *at: Tensor
    ) -> Tensor:
        tokens, pos, *at = map(fresh, (tokens, pos, *at))
        vary_inputs(tokens, pos, key_pos, *at)
        at, lengths = at[:1], at[1:]
        x, rotation, mask = embed(tokens, pos, key_pos, *lengths)
        for layer, cache in zip(model.layers, caches, strict=True):
            vary_block_inputs(x, rotation, mask, pos)
            x = run(layer, x, rotation, mask, pos, cache)
        if x.shape[1] > 1:
            mark_dynamic(x, 1)
        return unembed(x, *at)

    return step


def call_block(block: nn.Module, *given: Any) -> Tensor:
    return block(*given)


def vary_inputs(
    tokens: Tensor,
    pos: Tensor,
    key_pos: Tensor,
    at: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:
    """Tell the compiler which dimensions of a step's inputs vary."""
    mark_dynamic(key_pos, 0)
    if tokens.shape[1] > 1:
        mark_dynamic(tokens, 1)
        mark_dynamic(pos, 1)
    if at is not None and len(at) > 1:
        mark_dynamic(at, 0)


def vary_block_inputs(x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor) -> None:
    """Tell the compiler which dimensions of a block's inputs vary."""
    mark_dynamic(mask, 3)
    if x.shape[1] > 1:
        for tensor, dimension in (
            (x, 1),
            (mask, 2),
            (pos, 1),
            *((t, 1) for t in rotation or ()),
        ):
            mark_dynamic(tensor, dimension)


def fresh(tensor: Tensor) -> Tensor:
    """A contiguous copy: compiled code holds for certain strides only, even those of dimensions of
    size 1."""
    return tensor.clone(memory_format=torch.contiguous_format)


def compiled_block(model: Transformer, device: torch.device) -> Callable[..., Tensor]:
    """One graph for all blocks of a model whose layers come and go, called as (block, its inputs).

    Their weights are inputs of it, so that no other block and no other buffer compiles again.
    """
    if device.type == "cpu":
        settings = {"backend": CompiledGraphCache().inductor(cpu_options(model))}
    else:
        settings = {"options": gpu_options(device)}
    allow_recompiles(64)
    compiled = torch.compile(call_block, fullgraph=True, dynamic=False, **settings)

    def run(
        block: nn.Module, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: KVCache
    ) -> Tensor:
        x, mask, pos = map(fresh, (x, mask, pos))
        vary_block_inputs(x, rotation, mask, pos)
        return compiled(block, x, rotation, mask, pos, cache)

    return run


class CudaGraphs:
    """A step whose calls are replayed as CUDA graphs: one for each shape of what it is given.

    A graph reads and writes at the addresses that it was recorded with. The weights stay where they
    are. Tokens and positions are copied to tensors that the graph owns; key_pos are always the same
    numbers, so that it owns a copy, too. Caches are told apart by their addresses: the graphs of
    the latest KEPT sets of caches are kept, and ReusedCaches gives a new call the addresses of an
    earlier one. The first call of a shape is not recorded, since kernels may have to be compiled;
    the second one is. What is returned is the caller's own.
    """

    KEPT = 4  # sets of caches, the latest

    def __init__(self, step: Callable[..., Tensor], device: torch.device):
        self.step, self.device = step, device
        self.sets: dict[Any, dict[Any, RecordedStep | None]] = {}
        self.recorded = self.nbytes = 0  # graphs so far, and the memory that recording them took
        self._pool: Any = None

    def __call__(
        self, tokens: Tensor, pos: Tensor, key_pos: Tensor, caches: Sequence[KVCache], *at: Tensor
    ) -> Tensor:
        graphs = self._graphs_of(caches)
        key = tokens.shape, key_pos.shape, *(picked.shape for picked in at)
        if key not in graphs:
            graphs[key] = None
            return self.step(tokens, pos, key_pos, caches, *at)
        graph = graphs[key]
        if graph is None:
            graph = graphs[key] = self._record(tokens, pos, key_pos, caches, *at)
        return graph(tokens, pos, *at)

    @property
    def held(self) -> int:
        """Graphs that can be replayed."""
        return sum(graph is not None for graphs in self.sets.values() for graph in graphs.values())

    def _graphs_of(self, caches: Sequence[KVCache]) -> "dict[Any, RecordedStep | None]":
        tensors = [t for c in caches for t in own_buffers(c).values()]
        # A longer cache may begin where a shorter one began.
        key = tensors[0].shape, *(t.data_ptr() for t in tensors)
        graphs = self.sets.pop(key, {})
        while len(self.sets) >= self.KEPT:
            self.sets.pop(next(iter(self.sets)))
        self.sets[key] = graphs  # the latest stands last
        return graphs

    def _record(self, *given: Any) -> "RecordedStep":
        if not self.held:  # PyTorch forgets a pool whose last graph is gone
            self._pool = torch.cuda.graph_pool_handle()
        free = torch.cuda.mem_get_info(self.device)[0]
        graph = RecordedStep(self.step, self._pool, *given)
        self.recorded += 1
        self.nbytes += max(0, free - torch.cuda.mem_get_info(self.device)[0])
        return graph


class RecordedStep:
    """A step as a CUDA graph, with the inputs that it reads and the logits that it writes."""

    def __init__(
        self,
        step: Callable[..., Tensor],
        pool: Any,
        tokens: Tensor,
        pos: Tensor,
        key_pos: Tensor,
        caches: Sequence[KVCache],
        *at: Tensor,
    ):
        self.inputs = [fresh(t) for t in (tokens, pos, *at)]
        # Constant numbers, which the graph reads from its own memory.
        self.key_pos = key_pos.clone()
        self.graph = torch.cuda.CUDAGraph()
        tokens, pos, *at = self.inputs
        with torch.cuda.graph(self.graph, pool=pool):
            self.logits = step(tokens, pos, self.key_pos, caches, *at)

    def __call__(self, *given: Tensor) -> Tensor:
        for mine, new in zip(self.inputs, given, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.logits.clone()  # all graphs share memory: another one writes there


class ReusedCaches:
    """Makes the caches of one model, in the memory of the latest ones once nobody holds these: see
    CudaGraphs. They may be longer than was asked for. make: called as LoadedModel.new_caches is.
    """

    def __init__(self, make: Callable[..., Sequence[KVCache]]):
        self.make = make
        # Of each layer, a cache of the same memory, and whether the one handed out is still used.
        self.latest: list[tuple[KVCache, weakref.ref[KVCache]]] = []
        self.shape = 0, 0  # rows and length of those

    def __call__(self, lm: Any, batch: int, length: int) -> Sequence[KVCache]:
        rows, longest = self.shape
        gone = all(alive() is None for _, alive in self.latest)
        if not gone or rows != batch or longest < length:
            if gone:
                self.latest, self.shape = [], (0, 0)  # memory that new ones may take
            caches = self.make(lm, batch, length)
            self.shape = batch, length
        else:
            caches = [shallow_copy(cache) for cache, _ in self.latest]
            for tensor in (t for cache in caches for t in cache.buffers()):
                tensor.zero_()  # as new ones are
        self.latest = [(shallow_copy(cache), weakref.ref(cache)) for cache in caches]
        return caches


def has_graphs(view: Callable[..., Tensor]) -> bool:
    return isinstance(view, CudaGraphs)


def graphs_report(view: Callable[..., Tensor]) -> Iterator[str]:
    """A line about a view's CUDA graphs, if it has any."""
    if isinstance(view, CudaGraphs) and view.recorded:
        size = f"{view.nbytes / 2**20:.0f} MiB"
        yield f"CUDA graphs: {view.recorded} recorded, {view.held} held, {size} of memory"


class CompiledGraphCache:
    """Ways to a compiled graph that do not lead through Dynamo.

    Dynamo, at every call, checks and collects what a graph takes, each weight by its path from the
    model: of a step of TinyLlama in int4 on a CPU 1.5 ms, 7 %. But weights stay, and the rest is
    what the caller gives. Where that has been given once in these shapes, it takes the same places
    among the graph's inputs again.
    """

    def __init__(self):
        self.known: dict[Any, tuple[Graph, list[Any], list[tuple[int, int]]]] = {}
        self.seen: tuple[Graph, Sequence[Any]] | None = None  # the graph that ran, and its inputs

    def inductor(self, options: dict[str, Any]) -> Callable[[Any, Any], Graph]:
        """A backend for torch.compile: Inductor, and each call of what it compiles is seen."""

        def compile(traced: torch.fx.GraphModule, examples: Sequence[Any]) -> Graph:
            graph = compile_with_inductor(traced, examples, options)

            def watched(*inputs: Any) -> Sequence[Tensor]:
                self.seen = graph, inputs
                return graph(*inputs)

            return watched

        return compile

    @contextlib.contextmanager
    def watching(self, given: list[Tensor]) -> Iterator[None]:
        """Remember where what a call is given is among the inputs of what it runs."""
        try:
            yield
            self.remember(given)
        finally:  # after Ctrl-C too: it holds the caller's caches, and is of that call alone
            self.seen = None

    def remember(self, given: list[Tensor]) -> None:
        if self.seen:
            graph, inputs = self.seen
            at = {id(tensor): n for n, tensor in enumerate(given)}
            places = [(i, at[id(x)]) for i, x in enumerate(inputs) if id(x) in at]
            inputs = [None if id(x) in at else x for x in inputs]  # caches may come and go
            self.known[shapes(given)] = graph, inputs, places

    def take(self, given: list[Tensor]) -> Tensor | None:
        """The logits, where the way is known."""
        if not (found := self.known and self.known.get(shapes(given))):
            return None
        graph, inputs, places = found
        inputs = inputs.copy()
        for place, n in places:
            inputs[place] = given[n]
        return graph(*inputs)[0]


def shapes(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple((t.shape, t.dtype) for t in tensors)


def cpu_options(model: Transformer) -> dict[str, Any]:
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("--compile needs a C++ compiler here: install g++, or leave it out")
    # The products and the attention are library calls. Beside dense weights the code between them
    # takes no measurable time; beside packed ones 4 % of a step are worth 2 s more of compiling.
    packed = any(isinstance(module, PackedLinear) for module in model.modules())
    return {
        "cpp.simdlen": None if packed else 1,  # vectorised, or scalar
        "cpp.vec_isa_ok": True,
        # A vectorised loop over one row is over before a second thread has begun.
        "cpp.min_chunk_size": 16384 if packed else 512,
        # Pays from some twenty kernels on; a model has four.
        "cpp_cache_precompile_headers": False,
        # The two residual sums of a block are then one kernel, not two.
        "inplace_buffers": False,
        # Rounding where eager code rounds: compiled text is eager text, bit for bit.
        "emulate_precision_casts": True,
        # 400 tensors of a step, each looked at anew: 0.5 ms, and never once wrong.
        "size_asserts": False,
    }


def gpu_options(device: torch.device) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if has_one_shot_all_reduce(device):
        options["_collective.auto_select"] = True
    if dependent_launch(device) and has_triton_option("enable_pdl"):
        # A kernel may begin while the one before it ends, as ours in kernels/gpu do.
        options["triton.enable_pdl"] = True
    return options


@contextlib.contextmanager
def compiler_imported(wanted: bool) -> Iterator[None]:
    """Import the compiler in a thread, while the weights are read: it takes a second or two."""
    if not wanted:
        yield
        return
    import_dynamo()  # here, as two threads importing it would collide
    # Importing only: a compilation in this thread makes the next one crash where torch was built
    # for CUDA and there is no GPU (torch 2.11).
    thread = threading.Thread(target=import_inductor)
    thread.start()
    yield
    thread.join()
