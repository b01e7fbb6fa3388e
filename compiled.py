"""Compiles a model's step with torch.compile, and calls the compiled code.

A step is one call of Transformer.forward, whose docstring describes the parameters tokens, pos,
key_pos, caches, at and lengths. A view is a function that computes a step, eager or compiled. The
views here take these parameters by position; `*rest` is at and lengths in prefill, which passes
both, and nothing in decoding. Dynamo traces Python code to a graph; Inductor compiles the graph.
Shapes (B, T, S, D, N, P) are those of model.py and layers/positions.py.

Start at compiled_view. As in gpt-fast, a step is compiled over a KV cache that does not move. On a
CPU the whole step is one graph. On a GPU the embedding, one block and the head are a graph each;
the weights of the block are inputs of its graph, which therefore serves all layers, so that compile
time does not grow with depth. CudaGraphs then records the launches of a whole step as a CUDA graph.
CudaGraphs replaces the compiler's mode "reduce-overhead", which checks the address of every weight
at each step, records again for new caches, and warns of each number of visible slots.
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
from kernels.cpu.build import compiler
from kernels.gpu import usable
from kernels.gpu.support import dependent_launch
from layers.kv_cache import KVCache
from layers.positions import Rotation
from model import Transformer
from ranks import has_one_shot_all_reduce

# Inductor's environment variable.
PRECOMPILED_HEADERS = "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"
FRAME_WORDS = 2**13  # of Python's stack: 64 kB
Graph = Callable[..., Sequence[Tensor]]  # a compiled graph: its inputs -> its outputs


def compiled_view(
    model: Transformer, device: torch.device, cuda_graphs: bool = True
) -> Callable[..., Tensor]:
    """Returns a function that computes Transformer.forward, with the same arguments, compiled.

    One compiled graph serves all numbers of visible slots, all numbers of new tokens above one, and
    all lengths of `at` above one. The model must keep the tensors that it has now. The function's
    first calls compile, see load.compile_now. Raises ValueError on a CPU without a C++ compiler.
    cuda_graphs: record CUDA graphs on a GPU; False for prefill, which would record one for each
    length of the prompts, and False if the host computes or reads within a step.
    """
    # Each batch size and each length of the caches has a graph. By default the compiler stops at 8.
    allow_recompiles(64)
    if device.type != "cpu":
        step = compiled_parts(model, {"options": gpu_options(device)})
        return CudaGraphs(step, device) if cuda_graphs and device.type == "cuda" else step
    compiled_graphs = CompiledGraphCache()
    settings = {"backend": compiled_graphs.inductor(cpu_options(model))}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, **settings)

    def view(
        tokens: Tensor, pos: Tensor, key_pos: Tensor, caches: Sequence[KVCache], *rest: Tensor
    ) -> Tensor:
        """Run the graph that was recorded for these shapes, or let torch.compile find or make it,
        and record it."""
        tokens, pos, *rest = map(fresh, (tokens, pos, *rest))
        buffers = (t for c in caches for t in own_buffers(c).values())
        given = [tokens, pos, key_pos, *rest, *buffers]
        if (logits := compiled_graphs.run(given)) is not None:
            return logits
        vary_inputs(tokens, pos, key_pos, *rest)
        with compiled_graphs.recording(given):
            return compiled(tokens, pos, key_pos, caches, *rest)

    # Python allocates the frames of its functions in chunks of 16 kB. If a chunk ends within a
    # step, every call beyond it maps and unmaps memory, which takes 10 ms a step. A frame of
    # FRAME_WORDS begins a chunk of its own, large enough for the frames of all calls in the step.
    view.__code__ = view.__code__.replace(co_stacksize=FRAME_WORDS)
    return view


def compiled_parts(model: Transformer, settings: dict[str, Any]) -> Callable[..., Tensor]:
    """Returns a function like compiled_view's, of three compiled parts: the embedding, a block,
    which serves all layers, and the head.

    settings: arguments of torch.compile. Used on all devices but the CPU.
    """
    settings = settings | {"fullgraph": True, "dynamic": False}
    embed = torch.compile(model.embed, **settings)
    unembed = torch.compile(model.unembed, **settings)
    run = torch.compile(call_block, **settings)

    def step(
        tokens: Tensor, pos: Tensor, key_pos: Tensor, caches: Sequence[KVCache], *rest: Tensor
    ) -> Tensor:
        """Compute Transformer.forward by calling the three compiled parts. Before each call, sizes
        that vary are marked: the compiler takes all others for fixed."""
        tokens, pos, *rest = map(fresh, (tokens, pos, *rest))
        vary_inputs(tokens, pos, key_pos, *rest)
        at, lengths = rest[:1], rest[1:]  # each a list of one tensor, or empty
        x, inputs = embed(tokens, pos, key_pos, [cache.ring for cache in caches], *lengths)
        for layer, given, cache in zip(model.layers, inputs, caches, strict=True):
            vary_block_inputs(x, *given)
            x = run(layer, x, *given, cache)
        if x.shape[1] > 1:
            mark_dynamic(x, 1)
        return unembed(x, *at)

    return step


def call_block(block: nn.Module, *given: Any) -> Tensor:
    """Call a block. Compiling this function instead of the block makes the block an argument, and
    its weights inputs of the graph, which then serves all blocks."""
    return block(*given)


def vary_inputs(
    tokens: Tensor,
    pos: Tensor,
    key_pos: Tensor,
    at: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:
    """Tell the compiler which dimensions of a step's inputs vary, so that one graph serves all
    their sizes: S, and T and N if above 1. The compiler makes another graph for a size of 1, and
    for each size of a dimension that is not marked.

    lengths: (B, 1), has no dimension that varies; it is a parameter because callers pass `*rest`.
    """
    mark_dynamic(key_pos, 0)
    if tokens.shape[1] > 1:
        mark_dynamic(tokens, 1)
        mark_dynamic(pos, 1)
    if at is not None and len(at) > 1:
        mark_dynamic(at, 0)


def vary_block_inputs(x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor) -> None:
    """Tell the compiler which dimensions of a block's inputs vary: S, and T if above 1.

    x: (B, T, D). rotation: (B, T, 1, P) each, or None. mask: (B, 1, R*T, S). pos: (B, T).
    """
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
    """Returns a contiguous copy. Compiled code is specific to strides, even those of dimensions of
    size 1, so an input with other strides would be compiled again."""
    return tensor.clone(memory_format=torch.contiguous_format)


def compiled_block(model: Transformer, device: torch.device) -> Callable[..., Tensor]:
    """Returns a function of a block and its inputs: one graph for all blocks of an offloaded model.

    The weights are inputs of the graph, so that a block whose weights are in another buffer of the
    device needs no compilation. StreamedLayers (offload.py) calls the function for each block and
    micro-batch. Raises ValueError on a CPU without a C++ compiler.
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
        """Compute a block. The parameters after `block` are those of SequentialBlock.forward."""
        x, mask, pos = map(fresh, (x, mask, pos))
        vary_block_inputs(x, rotation, mask, pos)
        return compiled(block, x, rotation, mask, pos, cache)

    return run


class CudaGraphs:
    """Replays a step as CUDA graphs: one for each set of caches and each shape of the inputs.

    A graph reads and writes at the addresses that it was recorded with. The weights do not move.
    Tokens and positions are copied to tensors that the graph owns; key_pos is always arange, so the
    graph reads a copy of its own. A set of caches (those of all layers) is identified by its
    addresses. The graphs of the latest MAX_CACHE_SETS sets are kept, and ReusedCaches gives new
    caches the addresses of earlier ones. The first call with a shape is not recorded, since it may
    compile kernels; the second call is. The caller owns the logits that a call returns. step: a
    function like compiled_view's, without CUDA graphs. sets: the graphs of each set of caches, the
    latest set last, see _graphs_of.
    """

    MAX_CACHE_SETS = 4

    def __init__(self, step: Callable[..., Tensor], device: torch.device):
        self.step, self.device = step, device
        self.sets: dict[Any, dict[Any, RecordedStep | None]] = {}
        self.recorded = self.nbytes = 0  # all graphs so far, and the bytes that they allocated
        self._pool: Any = None  # the memory pool of the kept graphs

    def __call__(
        self, tokens: Tensor, pos: Tensor, key_pos: Tensor, caches: Sequence[KVCache], *rest: Tensor
    ) -> Tensor:
        """Compute a step. The first call with these shapes runs it as it is, the second one records
        it, and later ones replay it."""
        graphs = self._graphs_of(caches)
        key = tokens.shape, key_pos.shape, *(t.shape for t in rest)  # pos has the shape of tokens
        if key not in graphs:
            graphs[key] = None
            return self.step(tokens, pos, key_pos, caches, *rest)
        graph = graphs[key]
        if graph is None:
            graph = graphs[key] = self._record(tokens, pos, key_pos, caches, *rest)
        return graph(tokens, pos, *rest)

    @property
    def kept(self) -> int:
        """Returns the number of graphs that can be replayed."""
        return sum(graph is not None for graphs in self.sets.values() for graph in graphs.values())

    def _graphs_of(self, caches: Sequence[KVCache]) -> "dict[Any, RecordedStep | None]":
        """Returns the graphs for a set of caches, by the shapes of the inputs; None for shapes that
        were called once. Adds the set, or makes it the latest, and drops the oldest sets."""
        tensors = [t for c in caches for t in own_buffers(c).values()]
        # The key has the shapes, too: a longer cache may have the address of an earlier, shorter
        # one.
        key = tuple((t.shape, t.data_ptr()) for t in tensors)
        graphs = self.sets.pop(key, {})
        while len(self.sets) >= self.MAX_CACHE_SETS:
            self.sets.pop(next(iter(self.sets)))
        self.sets[key] = graphs  # the latest is last
        return graphs

    def _record(self, *given: Any) -> "RecordedStep":
        """Record a step, in the memory pool that all graphs share, and count the memory that this
        takes. given: the arguments of __call__."""
        if not self.kept:  # PyTorch frees a pool with its last graph, so the old one is gone
            self._pool = torch.cuda.graph_pool_handle()
        free = torch.cuda.mem_get_info(self.device)[0]
        graph = RecordedStep(self.step, self._pool, *given)
        self.recorded += 1
        # Free memory may also grow meanwhile: other processes use the GPU, too.
        self.nbytes += max(0, free - torch.cuda.mem_get_info(self.device)[0])
        return graph


class RecordedStep:
    """A CUDA graph of a step, with the inputs that it reads and the logits that it writes.

    pool: the memory pool of CUDA graphs from which the step allocates. Graphs share it, so the
    replay of another graph may overwrite the logits. step: see CudaGraphs; the other arguments are
    those of CudaGraphs.__call__.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        pool: Any,
        tokens: Tensor,
        pos: Tensor,
        key_pos: Tensor,
        caches: Sequence[KVCache],
        *rest: Tensor,
    ):
        self.inputs = [fresh(t) for t in (tokens, pos, *rest)]
        self.key_pos = key_pos.clone()  # the caller's tensor may be freed
        self.graph = torch.cuda.CUDAGraph()
        tokens, pos, *rest = self.inputs
        with torch.cuda.graph(self.graph, pool=pool):
            self.logits = step(tokens, pos, self.key_pos, caches, *rest)

    def __call__(self, *given: Tensor) -> Tensor:
        """Replay the step with other inputs: tokens, pos, *rest, in the recorded shapes. Returns
        the logits, which the caller owns. The caches are those that were recorded."""
        for mine, new in zip(self.inputs, given, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.logits.clone()  # another graph's replay may overwrite self.logits


class ReusedCaches:
    """Makes the caches of one model, in the memory of the latest ones if these are no longer used.

    CUDA graphs that were recorded for the latest caches then serve the new ones; see CudaGraphs.
    The new caches may be longer than requested. make: allocates new caches; it is called as
    LoadedModel.new_caches is.
    """

    def __init__(self, make: Callable[..., Sequence[KVCache]]):
        self.make = make
        # For each layer: a cache that keeps the memory, and a weak reference to the cache that the
        # caller got; it is dead once the caller has dropped that cache.
        self.latest: list[tuple[KVCache, weakref.ref[KVCache]]] = []
        # Of the latest caches: the CacheFactory that made them, their rows and their length.
        self.factory, self.rows, self.length = None, 0, 0

    def __call__(self, lm: Any, batch: int, length: int) -> Sequence[KVCache]:
        """Returns empty caches of `batch` rows and at least `length` positions for the model lm.

        Reuses the memory of the latest ones if the caller has dropped them, lm.model.cache_factory
        is the same, they have as many rows, and they are long enough. If the caller has dropped
        them but another condition fails, their memory is freed before new caches are allocated.
        """
        factory = lm.model.cache_factory  # evaluation/scoring.py makes caches without rings
        unused = all(returned() is None for _, returned in self.latest)
        same = (factory, batch) == (self.factory, self.rows)
        if not (unused and same and length <= self.length):
            if unused:
                self.latest = []  # frees their memory
            caches = self.make(lm, batch, length)
            self.factory, self.rows, self.length = factory, batch, length
        else:
            caches = [shallow_copy(cache) for cache, _ in self.latest]
            for tensor in (t for cache in caches for t in cache.buffers()):
                tensor.zero_()  # new caches are zeros, too
        self.latest = [(shallow_copy(cache), weakref.ref(cache)) for cache in caches]
        return caches


def has_graphs(view: Callable[..., Tensor]) -> bool:
    """Returns whether a view replays CUDA graphs."""
    return isinstance(view, CudaGraphs)


def graphs_report(view: Callable[..., Tensor]) -> Iterator[str]:
    """Yield a line of the log about the CUDA graphs of a view; nothing if it has recorded none."""
    if isinstance(view, CudaGraphs) and view.recorded:
        size = f"{view.nbytes / 2**20:.0f} MiB"
        yield f"CUDA graphs: {view.recorded} recorded, {view.kept} kept, {size} of memory"


class CompiledGraphCache:
    """Calls compiled graphs directly, without Dynamo.

    At every call Dynamo looks up and checks each input of a graph, every weight by its path from
    the model: for TinyLlama in int4 on a CPU this takes 1.5 ms, 7 % of a step. But the weights are
    the same at each call, and the other inputs are the caller's tensors. Therefore the first call
    with tensors of some shapes records the graph's inputs, and which of them the caller gave; later
    calls with these shapes put their tensors in the same places.
    """

    def __init__(self):
        # By the shapes of the caller's tensors: the graph; its inputs, with None in place of the
        # caller's tensors; and for each of these its index among the inputs and among the caller's
        # tensors.
        self.graphs_by_shape: dict[Any, tuple[Graph, list[Any], list[tuple[int, int]]]] = {}
        self.last_call: tuple[Graph, Sequence[Any]] | None = None  # the graph that ran, its inputs

    def inductor(self, options: dict[str, Any]) -> Callable[[Any, Any], Graph]:
        """Returns a backend for torch.compile: Inductor, whose graphs set self.last_call whenever
        they are called. options: those of Inductor."""

        def compile(traced: torch.fx.GraphModule, examples: Sequence[Any]) -> Graph:
            """Called by torch.compile with the traced graph and example inputs."""
            graph = compile_with_inductor(traced, examples, options)

            # torch.compile calls this function in place of the graph.
            def noted(*inputs: Any) -> Sequence[Tensor]:
                self.last_call = graph, inputs
                return graph(*inputs)

            return noted

        return compile

    @contextlib.contextmanager
    def recording(self, given: list[Tensor]) -> Iterator[None]:
        """Record the graph that runs in the body of the with statement; see record.

        given: the caller's tensors. Nothing is recorded if the body raises.
        """
        try:
            yield
            self.record(given)
        finally:  # after Ctrl-C too: last_call refers to the caller's caches
            self.last_call = None

    def record(self, given: list[Tensor]) -> None:
        """Record the graph of the last call, for later calls with tensors of the same shapes.

        given: the caller's tensors, which change from call to call: all inputs of the step and the
        buffers of the caches. The graph's other inputs (weights) are kept and used again, so they
        must not be replaced. Tensors are recognised by identity.
        """
        if self.last_call:
            graph, inputs = self.last_call
            index_of = {id(tensor): n for n, tensor in enumerate(given)}
            places = [(i, index_of[id(x)]) for i, x in enumerate(inputs) if id(x) in index_of]
            inputs = [None if id(x) in index_of else x for x in inputs]  # keep no cache alive
            self.graphs_by_shape[shapes(given)] = graph, inputs, places

    def run(self, given: list[Tensor]) -> Tensor | None:
        """Run the graph that `record` stored for the shapes of these tensors, which are in the same
        order. Returns the logits, or None if there is no such graph."""
        found = self.graphs_by_shape.get(shapes(given))
        if not found:
            return None
        graph, inputs, places = found
        inputs = inputs.copy()
        for place, n in places:
            inputs[place] = given[n]
        return graph(*inputs)[0]  # the logits are the first output


def shapes(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Returns the shape and dtype of each tensor, as a key of a dictionary."""
    return tuple((t.shape, t.dtype) for t in tensors)


def cpu_options(model: Transformer) -> dict[str, Any]:
    """Returns Inductor's options for a CPU. Raises ValueError if there is no C++ compiler.

    model: with its final layers: packed ones (PackedLinear) change the options.
    """
    if not shutil.which(compiler()):
        raise ValueError(f"--compile needs a C++ compiler: install {compiler()}, or leave it out")
    # The products and the attention are library calls. With dense weights the generated code
    # between these calls takes no measurable time. With packed weights, vectorising it saves 4 % of
    # a step and takes 2 s more to compile.
    packed = any(isinstance(module, PackedLinear) for module in model.modules())
    return {
        "cpp.simdlen": None if packed else 1,  # None: vectorised for this CPU; 1: scalar
        # No test compilation that checks whether vector instructions work.
        "cpp.vec_isa_ok": True,
        # A vectorised loop over one row ends before a second thread has started.
        "cpp.min_chunk_size": 16384 if packed else 512,
        # Off: a first model would wait 5 s for precompiled headers, which save a second for each of
        # its four generated functions. Tests, which compile many models, switch them on by
        # Inductor's own variable.
        "cpp_cache_precompile_headers": os.environ.get(PRECOMPILED_HEADERS) == "1",
        # If this is off, the two residual sums of a block are one generated function, not two.
        "inplace_buffers": False,
        # Round where eager code rounds, so that compiled text is eager text, bit for bit.
        "emulate_precision_casts": True,
        # Checking the shapes of a step's 400 tensors takes 0.5 ms.
        "size_asserts": False,
    }


def gpu_options(device: torch.device) -> dict[str, Any]:
    """Returns Inductor's options for a GPU. Under torchrun all ranks must call it at the same
    point, because has_one_shot_all_reduce tries the all-reduce on all of them.

    Also marks the function `usable`, which tells whether the Triton kernels run here and is called
    in compiled code, so that the compiler takes its result as constant and does not trace it.
    """
    torch.compiler.assume_constant_result(usable)
    options: dict[str, Any] = {}
    if has_one_shot_all_reduce(device):
        # Inductor then uses the one-shot all-reduce for small tensors.
        options["_collective.auto_select"] = True
    if dependent_launch(device) and has_triton_option("enable_pdl"):
        # A kernel may start before the previous one has ended, as those in kernels/gpu do.
        options["triton.enable_pdl"] = True
    return options


@contextlib.contextmanager
def compiler_imported(wanted: bool) -> Iterator[None]:
    """Import the compiler in a thread, which takes 1 to 2 s, while the body of the with statement
    reads the weights.

    On exit the import has ended. wanted: whether to import; False: do nothing.
    """
    if not wanted:
        yield
        return
    import_dynamo()  # not in the thread: two threads that import it at a time collide
    # The thread imports and does not compile: after a compilation in it, the next one crashes where
    # torch was built for CUDA and there is no GPU (torch 2.11).
    thread = threading.Thread(target=import_inductor)
    thread.start()
    yield
    thread.join()
