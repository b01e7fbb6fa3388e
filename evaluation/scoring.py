"""How likely a model finds given texts: the log-likelihood of the ends of many sequences of ids.

Start at log_likelihoods. Sequences that begin alike, as a question with each of its answers does,
become a tree (build_prefix_trees), and what they share is read once: a batch of nodes is fed to the model, and
the nodes below go on from copies of its KV cache. Of the output head only the scored ids are
computed. eval.py asks for perplexities and for lm_eval's tasks.
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
SHARED = 8  # ids: what is shared by less is read again, as is less than a quarter of what is left
LOGITS = 2**27  # of one call: 512 MB in float32
# So many ids in a call keep the device busy; a level's KV caches have so many slots at most; and a
# call takes so long to begin that meanwhile ids could have gone through so many weights.
CALL_LIMITS = {"cpu": (2**11, 2**15, 2**29), "mps": (2**11, 2**15, 2**33), "cuda": (2**13, 2**16, 2**39)}
POOL = 128  # rows of a level's caches
WEIGHTS_READ = 16  # ids that a call could compute while it reads the weights


class SequenceScore(NamedTuple):
    """What came of a sequence."""

    number: int
    nats: float  # natural logarithm of the probability of its scored ids, each given all before it
    greedy: bool  # each of them was the likeliest


@dataclass(eq=False)
class PrefixNode:
    """Ids that sequences share, after those of the node above."""

    ids: Ids
    begin: int  # position of the first of them
    parent: "PrefixNode | None"
    start: int = 0  # position of the first id here or below that is scored
    end: int = 0  # slots that the sequences from here on take
    children: list["PrefixNode"] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)  # sequences: number, and start
    scores: list[tuple[float, bool]] = field(default_factory=list)  # of the ids from `scored` on

    @property
    def scored(self) -> int:
        """Position of the first id here that is scored."""
        return max(self.start, self.begin)

    @property
    def fed(self) -> int:
        """How many ids the model has to read: what follows the last of a sequence is not asked."""
        return len(self.ids) - (not self.children)

    def results(self) -> Iterator[SequenceScore]:
        """Of the sequences that end here, once the nodes up to the root and this are scored."""
        for number, start in self.ends:
            scores, node = [], self
            while node is not None and node.begin + len(node.ids) > start:
                scores += node.scores[max(0, start - node.scored) :]
                node = node.parent
            yield SequenceScore(number, sum(nats for nats, _ in scores), all(best for _, best in scores))


def log_likelihoods(
    lm: LoadedModel, sequences: Sequence[tuple[Ids, int]], batch_size: int | None = None
) -> Iterator[SequenceScore]:
    """The log-likelihood of each sequence from a position on: (ids, start), 1 <= start < len(ids).

    batch_size: rows that the model is given at once, None: as many as are fast and fit. Yields one
    SequenceScore for each sequence, in float32 whatever the model's dtype, in an order of its own. Raises
    ValueError for a sequence that is longer than the model's context by more than its last id, and
    MemoryError, in one line each.
    """
    if not sequences:
        return
    check(sequences, lm.model.args.context, lm.model.args.vocab_size)
    roots = build_prefix_trees(sequences, least_shared(lm.model.args, max(len(ids) for ids, _ in sequences)))
    yield from Reader(lm, roots, batch_size).read([(node, 0) for node in roots])


def check(sequences: Sequence[tuple[Ids, int]], context: int, vocab_size: int) -> None:
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


def least_shared(args: ModelArgs, longest: int) -> float:
    """How many ids must be the same to be read once. None are where keys are rotated by the length
    of the whole sequence: see model.DynamicRotaryPositions."""
    by_length = args.positions == "dynamic" and longest > args.rope_scaling.original_context
    return math.inf if by_length else SHARED


def build_prefix_trees(sequences: Sequence[tuple[Ids, int]], least: float = SHARED) -> list[PrefixNode]:
    """The roots of trees that hold all the sequences. least: ids that are shared, if any are."""
    order = sorted(range(len(sequences)), key=lambda n: tuple(sequences[n][0]))
    texts = [tuple(sequences[n][0]) for n in order]
    shared = [0, *(common(a, b) for a, b in pairwise(texts))]  # with the one before

    def nodes(first: int, stop: int, begin: int, above: PrefixNode | None) -> list[PrefixNode]:
        """Of texts[first:stop], which are the same up to `begin`."""
        cuts = [first]
        for n in range(first + 1, stop):
            longer = max(len(texts[n - 1]), len(texts[n]))
            if shared[n] - begin < max(least, (longer - begin) // 4):
                cuts.append(n)
        return [node(a, b, begin, above) for a, b in pairwise([*cuts, stop])]

    def node(first: int, stop: int, begin: int, above: PrefixNode | None) -> PrefixNode:
        end = min(shared[first + 1 : stop], default=len(texts[first]))
        made = PrefixNode(texts[first][begin:end], begin, above)
        while first < stop and len(texts[first]) == end:  # the shortest are sorted before others
            number = order[first]
            made.ends.append((number, sequences[number][1]))
            first += 1
        made.children = nodes(first, stop, end, made) if first < stop else []
        starts = [start for _, start in made.ends] + [n.start for n in made.children]
        made.start = min(starts)
        made.end = max([begin + made.fed] + [n.end for n in made.children])
        return made

    return nodes(0, len(texts), 0, None)


def common(a: Ids, b: Ids) -> int:
    """How many ids two sequences begin with alike."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def depth(nodes: Sequence[PrefixNode]) -> int:
    return 1 + max((depth(node.children) for node in nodes if node.children), default=0)


class Wanted(NamedTuple):
    """An id that a call is to score."""

    place: int  # of the id before it, through all that the call reads
    said: int
    node: PrefixNode  # whose id it is


class Reader:
    """Feeds trees to the model, one call after the other.

    The nodes of each level have a pool of KV caches, of more rows than a call: from many nodes
    those of like length can be taken together, and little is padded.
    """

    def __init__(self, lm: LoadedModel, roots: Sequence[PrefixNode], batch_size: int | None):
        self.lm, self.batch_size = lm, batch_size
        self.ids, self.most_slots, begun = CALL_LIMITS[lm.device.type]
        # Beyond so much padding two calls are faster than one.
        self.padding = WEIGHTS_READ + begun // count_weights(lm.model.args)
        per_slot = lm.kv_bytes_per_token() * depth(roots)
        fitting = broadcast_from_rank0(lambda: available_memory(lm.device) // 4 // per_slot)
        self.most_slots = min(self.most_slots, fitting)
        self.longest = max(node.end for node in roots)
        self.pools: dict[int, list[KVCache]] = {}
        # Compiled, each number of rows or slots is a graph of its own: there is one of each.
        self.fixed = 0
        if lm.prefill is not lm.model:
            average = sum(node.fed for node in roots) // len(roots)
            self.fixed = batch_size or max(1, self.ids // average)

    @torch.inference_mode()
    def read(self, nodes: Sequence[tuple[PrefixNode, int]], level: int = 0) -> Iterator[SequenceScore]:
        """Nodes of one level, each with the row that the node above has in the pool there."""
        for node, _ in nodes:
            if not node.fed:  # one id, of which the node above said all
                yield from node.results()
        todo = sorted((n for n in nodes if n[0].fed), key=lambda n: -n[0].end)
        while todo:
            most = self.pool_rows(self.longest if self.fixed else todo[0][0].end)
            size = -(-len(todo) // -(-len(todo) // most))  # the last pool as full as the others
            pooled, todo = sorted(todo[:size], key=lambda n: -n[0].fed), todo[size:]
            pool = self.pool(level, size, max(node.end for node, _ in pooled))
            first = 0
            for batch, above in self.calls(pooled):
                rows = slice(first, first + max(len(batch), self.fixed))
                caches = [cache.part(rows) for cache in pool]
                if level:
                    self.go_on(batch, above, caches, self.pools[level - 1])
                self.feed(batch, caches)
                for node in batch:
                    yield from node.results()
                first += len(batch)
            if below := [(n, row) for row, (node, _) in enumerate(pooled) for n in node.children]:
                yield from self.read(below, level + 1)

    def pool_rows(self, slots: int) -> int:
        return max(1, min(POOL, self.most_slots // slots), self.batch_size or 0)

    def pool(self, level: int, rows: int, slots: int) -> list[KVCache]:
        """The level's caches, of so many rows and slots or more."""
        if self.fixed:
            slots, rows = self.longest, self.pool_rows(self.longest) + self.fixed
        held = self.pools.get(level)
        if not held or held[0].rows < rows or held[0].length < slots:
            self.pools.pop(level, None)  # before others take its place
            self.pools[level] = self.lm.make_caches(rows, slots)
        return self.pools[level]

    def calls(
        self, todo: Sequence[tuple[PrefixNode, int]]
    ) -> Iterator[tuple[Sequence[PrefixNode], Sequence[int]]]:
        """Nodes, and the rows above, that are read together; the longest nodes come first."""
        while todo:
            size = self.fixed or self.call_size([node.fed for node, _ in todo])
            yield tuple(zip(*todo[:size], strict=True))
            todo = todo[size:]

    def call_size(self, lengths: Sequence[int]) -> int:
        """How many rows of these lengths, which fall, the next call takes."""
        most = self.batch_size or max(1, self.ids // lengths[0])
        padding = accumulate(lengths[0] - length for length in lengths)
        return sum(padded <= self.padding for padded in islice(padding, most))

    def go_on(
        self,
        nodes: Sequence[PrefixNode],
        above: Sequence[int],
        caches: list[KVCache],
        sources: list[KVCache],
    ) -> None:
        """Fill the caches with what the nodes above have in theirs."""
        (rows,) = self.to_device(list(above) + [above[-1]] * (caches[0].rows - len(above)))
        filled = max(node.begin for node in nodes)
        for cache, source in zip(caches, sources, strict=True):
            cache.take(source, rows, filled)

    def feed(self, nodes: Sequence[PrefixNode], caches: list[KVCache]) -> None:
        """Let the model read nodes, one in each row.

        How likely their ids are is noted, and the first id of each node below them.
        """
        rows = [*nodes, *nodes[-1:] * (caches[0].rows - len(nodes))]
        width = max(node.fed for node in nodes)
        most = min(PREFILL_TOKENS, LOGITS // self.lm.model.args.vocab_size)
        for first in range(0, width, step := max(1, most // len(rows))):
            stop = min(first + step, width)
            # A row that has ended repeats its last id: the same key and value, at the same place.
            places = [[min(n, node.fed - 1) for n in range(first, stop)] for node in rows]
            tokens = [[node.ids[n] for n in row] for node, row in zip(rows, places, strict=True)]
            pos = [[node.begin + n for n in row] for node, row in zip(rows, places, strict=True)]
            wanted = [
                Wanted(row * (stop - first) + n - first, said, scored)
                for row, node in enumerate(nodes)
                for n in range(max(first, node.scored - node.begin - 1), min(stop, node.fed))
                for said, scored in following(node, n)
            ]
            visible = max(map(max, pos)) + 1
            if self.fixed:
                visible = visible_length(visible, caches[0].length)
            slots = torch.arange(visible, device=self.lm.device)
            tokens, pos, lengths = self.to_device(tokens, pos, [[node.end] for node in rows])
            given = tokens, pos, slots, caches
            for one, score in zip(wanted, self.scores(given, lengths, wanted), strict=True):
                one.node.scores.append(score)

    def scores(
        self,
        given: tuple[Tensor, Tensor, Tensor, list[KVCache]],
        lengths: Tensor,
        wanted: Sequence[Wanted],
    ) -> Iterator[tuple[float, bool]]:
        """Logarithm of the probability of each wanted id, and whether it is the likeliest."""
        places = {place: n for n, place in enumerate(dict.fromkeys(w.place for w in wanted))}
        (at,) = self.to_device(list(places) or [0])
        logits = self.lm.prefill(*given, at, lengths)  # (N, V)
        if not wanted:
            return iter(())
        which, said = self.to_device([places[w.place] for w in wanted], [w.said for w in wanted])
        nats = logits.log_softmax(-1, dtype=torch.float32)  # (N, V)
        found = nats[which, said]  # (W,)
        best = found == nats.amax(-1)[which]  # (W,)
        # Of several that are likeliest it is the first, but to look for it takes ten times longer.
        best[best.clone()] = nats[which[best]].argmax(-1) == said[best]
        return zip(found.tolist(), best.tolist(), strict=True)

    def to_device(self, *lists: list) -> list[Tensor]:
        return [torch.tensor(values).to(self.lm.device) for values in lists]


def following(node: PrefixNode, n: int) -> Iterator[tuple[int, PrefixNode]]:
    """Each id that is scored by what the model says after the node's n-th, and its node."""
    if n + 1 < len(node.ids):
        yield node.ids[n + 1], node
    else:
        yield from ((b.ids[0], b) for b in node.children if b.start <= b.begin)
