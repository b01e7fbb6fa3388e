"""Log-likelihoods of the ends of many sequences of ids.

Start at log_likelihoods. Sequences with a common prefix, such as a question with each of its
answers, become a tree (build_prefix_trees), and the model reads each node once: TreeScorer feeds a
batch of nodes to the model, and their children continue from copies of the KV cache. The output
head computes logits only at positions whose next id is scored.

Source: prefix sharing as in SGLang's RadixAttention (arXiv 2312.07104).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from decoding import PREFILL_TOKENS, LoadedModel
from host.memory import available_memory
from load import count_weights
from model import KVCache, ModelArgs, visible_length
from ranks import broadcast_from_rank0

Ids = Sequence[int]
# A common prefix is read once if it has at least MIN_SHARED_IDS ids and a quarter of the ids that
# the longer sequence has left; a shorter one is read again with each sequence.
MIN_SHARED_IDS = 8
MAX_LOGITS = 2**27  # of one call: 512 MB in float32
MAX_POOL_ROWS = 128  # rows of the KV caches of one level
# A call reads all weights once; reading them takes as long as computing this many ids.
IDS_PER_WEIGHT_PASS = 16


class CallLimits(NamedTuple):
    """How much one call of the model gets on a device."""

    ids: int  # enough to keep the device busy
    cache_positions: int  # rows times positions of the KV caches of one level, at most
    overhead: int  # products of an id and a weight that the device computes while a call starts


CALL_LIMITS = {
    "cpu": CallLimits(2**11, 2**15, 2**29),
    "mps": CallLimits(2**11, 2**15, 2**33),
    "cuda": CallLimits(2**13, 2**16, 2**39),
}


class SequenceScore(NamedTuple):
    """The log-likelihood of one sequence."""

    number: int  # of the sequence
    nats: float  # natural logarithm of the probability of its scored ids, each given all before it
    greedy: bool  # whether each scored id is the most likely one


@dataclass(eq=False)
class PrefixNode:
    """Ids that all sequences of a subtree have in common, after those of the parent."""

    ids: Ids
    begin: int  # position of ids[0]
    parent: "PrefixNode | None"
    start: int = 0  # first scored position of the subtree
    end: int = 0  # KV cache positions that the subtree needs
    children: list["PrefixNode"] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)  # sequences that end: number, start
    scores: list[tuple[float, bool]] = field(default_factory=list)  # of the ids from `scored` on

    @property
    def scored(self) -> int:
        """The position of the first scored id of this node."""
        return max(self.start, self.begin)

    @property
    def fed(self) -> int:
        """The number of ids that the model reads: nothing follows the last id of a leaf."""
        return len(self.ids) - (not self.children)

    def results(self) -> Iterator[SequenceScore]:
        """Yield the scores of the sequences that end here. This node and its ancestors must be
        scored."""
        for number, start in self.ends:
            scores, node = [], self
            while node is not None and node.begin + len(node.ids) > start:
                scores += node.scores[max(0, start - node.scored) :]
                node = node.parent
            yield SequenceScore(number, sum(n for n, _ in scores), all(best for _, best in scores))


def log_likelihoods(
    lm: LoadedModel, sequences: Sequence[tuple[Ids, int]], batch_size: int | None = None
) -> Iterator[SequenceScore]:
    """Yield the score of ids[start:] for each sequence (ids, start), 1 <= start < len(ids).

    batch_size: the rows of one call; None: chosen by CALL_LIMITS and the free memory. Scores are
    computed in float32 and come in another order than the sequences. Raises ValueError for a
    sequence that is longer than the model's context plus one, and MemoryError.
    """
    if not sequences:
        return
    check(sequences, lm.model.args.context, lm.model.args.vocab_size)
    longest = max(len(ids) for ids, _ in sequences)
    roots = build_prefix_trees(sequences, min_shared_ids(lm.model.args, longest))
    yield from TreeScorer(lm, roots, batch_size).score([(node, 0) for node in roots])


def check(sequences: Sequence[tuple[Ids, int]], context: int, vocab_size: int) -> None:
    """Raise ValueError for a sequence without scored ids, one that is too long, or a wrong id."""
    for number, (ids, start) in enumerate(sequences):
        if not 1 <= start < len(ids):
            raise ValueError(f"sequence {number}: no ids after position {start} of {len(ids)}")
        if len(ids) > context + 1:
            raise ValueError(
                f"sequence {number} has {len(ids)} ids and the model's context is {context}"
            )
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(
                f"sequence {number} has ids from {min(ids)} to {max(ids)} and the model knows 0 to "
                f"{vocab_size - 1}: its tokenizer files belong to another model"
            )


def min_shared_ids(args: ModelArgs, longest: int) -> float:
    """Return the least length of a shared prefix. Infinity where the rotary angles depend on the
    length of the whole sequence (model.DynamicRotaryPositions): then no prefix can be shared."""
    by_length = args.positions == "dynamic" and longest > args.rope_scaling.original_context
    return math.inf if by_length else MIN_SHARED_IDS


def build_prefix_trees(
    sequences: Sequence[tuple[Ids, int]], min_shared: float = MIN_SHARED_IDS
) -> list[PrefixNode]:
    """Return the roots of prefix trees that contain all sequences. min_shared: the least length of
    a common prefix."""
    return TreeBuilder(sequences, min_shared).nodes(0, len(sequences), 0, None)


class TreeBuilder:
    """Builds prefix trees over the sequences in lexicographic order, where common prefixes are
    neighbours."""

    def __init__(self, sequences: Sequence[tuple[Ids, int]], min_shared: float):
        order = sorted(range(len(sequences)), key=lambda n: tuple(sequences[n][0]))
        self.ends = [(n, sequences[n][1]) for n in order]
        self.texts = [tuple(sequences[n][0]) for n in order]
        self.min_shared = min_shared
        # shared[n]: the length of the common prefix of texts n - 1 and n
        self.shared = [0, *(common(a, b) for a, b in pairwise(self.texts))]

    def nodes(
        self, first: int, stop: int, begin: int, parent: PrefixNode | None
    ) -> list[PrefixNode]:
        """Return the nodes of texts[first:stop], whose first `begin` ids are equal."""
        cuts = [first]
        for n in range(first + 1, stop):
            longer = max(len(self.texts[n - 1]), len(self.texts[n]))
            if self.shared[n] - begin < max(self.min_shared, (longer - begin) // 4):
                cuts.append(n)
        return [self.node(a, b, begin, parent) for a, b in pairwise([*cuts, stop])]

    def node(self, first: int, stop: int, begin: int, parent: PrefixNode | None) -> PrefixNode:
        """Return the node of the common prefix of texts[first:stop], with its subtree."""
        end = min(self.shared[first + 1 : stop], default=len(self.texts[first]))
        node = PrefixNode(self.texts[first][begin:end], begin, parent)
        while first < stop and len(self.texts[first]) == end:  # a prefix sorts before longer texts
            node.ends.append(self.ends[first])
            first += 1
        node.children = self.nodes(first, stop, end, node) if first < stop else []
        node.start = min([start for _, start in node.ends] + [n.start for n in node.children])
        node.end = max([begin + node.fed] + [n.end for n in node.children])
        return node


def common(a: Ids, b: Ids) -> int:
    """Return the length of the common prefix of two sequences."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def depth(nodes: Sequence[PrefixNode]) -> int:
    """Return the number of levels of the trees."""
    return 1 + max((depth(node.children) for node in nodes if node.children), default=0)


class Target(NamedTuple):
    """An id whose log-probability a call computes."""

    index: int  # of the id before it among all ids of the call, B * T
    token: int
    node: PrefixNode  # that the target belongs to


class TreeScorer:
    """Feeds trees to the model, level by level.

    Each level has a pool of KV caches with more rows than a call. From many nodes those of similar
    length can be read in one call, so that little is padded.
    """

    def __init__(self, lm: LoadedModel, roots: Sequence[PrefixNode], batch_size: int | None):
        self.lm, self.batch_size = lm, batch_size
        self.max_ids, max_positions, overhead = CALL_LIMITS[lm.device.type]
        # Ids of padding in a call; with more, two calls take less time than one.
        self.max_padding = IDS_PER_WEIGHT_PASS + overhead // count_weights(lm.model.args)
        bytes_per_position = lm.kv_bytes_per_token() * depth(roots)
        fitting = broadcast_from_rank0(
            lambda: available_memory(lm.device) // 4 // bytes_per_position
        )
        self.max_positions = min(max_positions, fitting)
        self.longest = max(node.end for node in roots)
        self.pools: dict[int, list[KVCache]] = {}
        # A compiled model has one graph for each number of rows and of positions: both are fixed.
        self.fixed_rows = 0
        if lm.prefill is not lm.model:
            average = sum(node.fed for node in roots) // len(roots)
            self.fixed_rows = batch_size or max(1, self.max_ids // average)

    @torch.inference_mode()
    def score(
        self, nodes: Sequence[tuple[PrefixNode, int]], level: int = 0
    ) -> Iterator[SequenceScore]:
        """Score subtrees of one level: pairs of a node and its parent's row in the pool above."""
        for node, _ in nodes:
            if not node.fed:  # a leaf of one id, which the call of its parent has scored
                yield from node.results()
        todo = sorted((n for n in nodes if n[0].fed), key=lambda n: -n[0].end)
        while todo:
            positions = self.longest if self.fixed_rows else todo[0][0].end
            pools = -(-len(todo) // self.pool_rows(positions))
            size = -(-len(todo) // pools)  # fills the last pool as much as the others
            pooled, todo = sorted(todo[:size], key=lambda n: -n[0].fed), todo[size:]
            yield from self.score_pool(pooled, level)
            children = [(n, row) for row, (node, _) in enumerate(pooled) for n in node.children]
            if children:
                yield from self.score(children, level + 1)

    def score_pool(
        self, pooled: Sequence[tuple[PrefixNode, int]], level: int
    ) -> Iterator[SequenceScore]:
        """Score the nodes that are in the level's pool at once, the longest first."""
        pool, first = self.pool(level, len(pooled), max(node.end for node, _ in pooled)), 0
        for batch, parent_rows in self.batches(pooled):
            rows = slice(first, first + max(len(batch), self.fixed_rows))
            caches = [cache.part(rows) for cache in pool]
            if level:
                self.copy_prefix(batch, parent_rows, caches, self.pools[level - 1])
            self.feed(batch, caches)
            for node in batch:
                yield from node.results()
            first += len(batch)

    def pool_rows(self, positions: int) -> int:
        """Return the number of rows of a pool whose rows have so many positions."""
        return max(1, min(MAX_POOL_ROWS, self.max_positions // positions), self.batch_size or 0)

    def pool(self, level: int, rows: int, positions: int) -> list[KVCache]:
        """Return the level's caches, which have at least so many rows and positions."""
        if self.fixed_rows:
            positions, rows = self.longest, self.pool_rows(self.longest) + self.fixed_rows
        pool = self.pools.get(level)
        if not pool or pool[0].rows < rows or pool[0].length < positions:
            self.pools.pop(level, None)  # frees its memory before the allocation of a larger one
            self.pools[level] = self.lm.make_caches(rows, positions)
        return self.pools[level]

    def batches(
        self, todo: Sequence[tuple[PrefixNode, int]]
    ) -> Iterator[tuple[Sequence[PrefixNode], Sequence[int]]]:
        """Yield the nodes of each call, with the rows of their parents; the longest nodes first."""
        while todo:
            size = self.fixed_rows or self.rows_of_call([node.fed for node, _ in todo])
            yield tuple(zip(*todo[:size], strict=True))
            todo = todo[size:]

    def rows_of_call(self, lengths: Sequence[int]) -> int:
        """Return how many nodes of these lengths, in falling order, the next call reads."""
        most = self.batch_size or max(1, self.max_ids // lengths[0])
        padding = accumulate(lengths[0] - length for length in lengths)
        return sum(padded <= self.max_padding for padded in islice(padding, most))

    def copy_prefix(
        self,
        nodes: Sequence[PrefixNode],
        parent_rows: Sequence[int],
        caches: list[KVCache],
        sources: list[KVCache],
    ) -> None:
        """Copy the keys and values of the nodes' parents from `sources` to the rows of `caches`."""
        padding = [parent_rows[-1]] * (caches[0].rows - len(parent_rows))
        (rows,) = self.to_device([*parent_rows, *padding])
        filled = max(node.begin for node in nodes)
        for cache, source in zip(caches, sources, strict=True):
            cache.take(source, rows, filled)

    def feed(self, nodes: Sequence[PrefixNode], caches: list[KVCache]) -> None:
        """Let the model read one node in each row, in chunks; append the scores of their ids and of
        the first id of each child."""
        rows = [*nodes, *nodes[-1:] * (caches[0].rows - len(nodes))]
        width = max(node.fed for node in nodes)
        most = min(PREFILL_TOKENS, MAX_LOGITS // self.lm.model.args.vocab_size)
        step = max(1, most // len(rows))
        for first in range(0, width, step):
            chunk = range(first, min(first + step, width))
            wanted = targets(nodes, chunk)
            for target, score in zip(wanted, self.run(rows, chunk, caches, wanted), strict=True):
                target.node.scores.append(score)

    def run(
        self,
        rows: Sequence[PrefixNode],
        chunk: range,
        caches: list[KVCache],
        wanted: Sequence[Target],
    ) -> Iterator[tuple[float, bool]]:
        """Call the model with the ids of a chunk, (B, T), and return the scores of the targets."""
        # A row that has ended repeats its last id: the same key and value at the same position.
        indices = [[min(n, node.fed - 1) for n in chunk] for node in rows]
        tokens = [[node.ids[n] for n in row] for node, row in zip(rows, indices, strict=True)]
        pos = [[node.begin + n for n in row] for node, row in zip(rows, indices, strict=True)]
        visible = max(map(max, pos)) + 1
        if self.fixed_rows:
            visible = visible_length(visible, caches[0].length)
        key_pos = torch.arange(visible, device=self.lm.device)
        tokens, pos, lengths = self.to_device(tokens, pos, [[node.end] for node in rows])
        return self.scores((tokens, pos, key_pos, caches), lengths, wanted)

    def scores(
        self,
        inputs: tuple[Tensor, Tensor, Tensor, list[KVCache]],
        lengths: Tensor,
        wanted: Sequence[Target],
    ) -> Iterator[tuple[float, bool]]:
        """Call the model; return each target's log-probability, and whether it is the most likely.

        inputs: tokens (B, T), positions (B, T), key positions (L,) and caches. lengths: (B, 1).
        """
        places = {index: n for n, index in enumerate(dict.fromkeys(t.index for t in wanted))}
        (at,) = self.to_device(list(places) or [0])
        logits = self.lm.prefill(*inputs, at, lengths)  # (N, V)
        if not wanted:
            return iter(())
        which, tokens = self.to_device([places[t.index] for t in wanted], [t.token for t in wanted])
        log_probs = logits.log_softmax(-1, dtype=torch.float32)  # (N, V)
        found = log_probs[which, tokens]  # (W,)
        best = found == log_probs.amax(-1)[which]  # (W,)
        # Of equal maxima argmax takes the first, which decides; argmax takes ten times as long as
        # amax, so it runs only where the target has the maximum.
        best[best.clone()] = log_probs[which[best]].argmax(-1) == tokens[best]
        return zip(found.tolist(), best.tolist(), strict=True)

    def to_device(self, *lists: list) -> list[Tensor]:
        return [torch.tensor(values).to(self.lm.device) for values in lists]


def targets(nodes: Sequence[PrefixNode], chunk: range) -> list[Target]:
    """Return the targets of a call whose row b reads the ids of nodes[b] at the indices `chunk`."""
    return [
        Target(row * len(chunk) + n - chunk.start, token, scored)
        for row, node in enumerate(nodes)
        for n in range(max(chunk.start, node.scored - node.begin - 1), min(chunk.stop, node.fed))
        for token, scored in following(node, n)
    ]


def following(node: PrefixNode, n: int) -> Iterator[tuple[int, PrefixNode]]:
    """Yield each scored id that follows the node's n-th id, with the node that it belongs to."""
    if n + 1 < len(node.ids):
        yield node.ids[n + 1], node
    else:
        yield from ((c.ids[0], c) for c in node.children if c.start <= c.begin)
