"""Log-likelihoods of the ends of many sequences of ids.

Start at log_likelihoods. Sequences with a common prefix, such as a question with each of its
answers, become a tree (build_prefix_trees), and the model reads each node once: TreeScorer lets the
model read a batch of nodes, and their children continue from copies of the KV cache. The output
head computes logits only at positions whose next id is scored.

Words: a sequence is ids and `start`, the position of its first scored id; a node is a run of ids in
a tree: ids that all sequences below it share, or, in a leaf, the last ids of a sequence; a level is
the set of nodes at one depth, 0 for the roots; a target is an id whose log-probability is computed;
a pool is the KV caches, one for each layer, of one level of the trees; a call is one run of the
model, which reads one node, or a chunk of it, in each row of its caches; padding is what a call
computes in vain: shorter nodes repeat their last id, and rows without a node repeat the last node.
Compiled prefill (lm.prefill) is the model, compiled for calls with many ids; without --compile it
is the model itself.

Shapes: B rows and T ids per row of a call, L positions that attention reads, V ids of the
vocabulary, W targets, N different positions whose logits they need.

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
from layers.args import ModelArgs
from layers.kv_cache import KVCache, visible_length
from layers.positions import same_rotations
from load import count_weights
from ranks import broadcast_from_rank0

Ids = Sequence[int]
# A common prefix is read once if it has at least MIN_SHARED_IDS ids and a quarter of the longer
# sequence's ids after the parent node. A shorter prefix is read again with each sequence.
MIN_SHARED_IDS = 8
MAX_LOGITS = 2**27  # logits of one call: 512 MB in float32
MAX_POOL_ROWS = 128  # unless batch_size is larger
# A call reads all weights once; reading them takes as long as computing this many ids.
IDS_PER_WEIGHT_PASS = 16


class CallLimits(NamedTuple):
    """Sizes of one call of the model on a device."""

    ids: int  # ids of a call, enough to keep the device busy
    cache_positions: int  # limit on rows x positions of a pool
    overhead: int  # multiplications (ids x weights) that take as long as the launch of a call


CALL_LIMITS = {
    "cpu": CallLimits(2**11, 2**15, 2**29),
    "mps": CallLimits(2**11, 2**15, 2**33),
    "cuda": CallLimits(2**13, 2**16, 2**39),
}


class SequenceScore(NamedTuple):
    """The log-likelihood of one sequence."""

    number: int  # index of the sequence in the argument of log_likelihoods
    nats: float  # sum of ln p(id | all ids before it) over the scored ids
    greedy: bool  # whether each scored id is the most likely id at its position


@dataclass(eq=False)
class PrefixNode:
    """Ids that all sequences of a subtree have in common, after the ids of the parent."""

    ids: Ids
    begin: int  # position of ids[0] in the sequences; so many ids are in the ancestors
    parent: "PrefixNode | None"
    min_start: int = 0  # the smallest `start` of the subtree's sequences
    cache_length: int = 0  # KV cache positions that the subtree needs
    children: list["PrefixNode"] = field(default_factory=list)
    # (number, start) of each sequence that ends with this node
    ends: list[tuple[int, int]] = field(default_factory=list)
    # (log-probability, whether it is the most likely id) of each id from `first_scored` on
    scores: list[tuple[float, bool]] = field(default_factory=list)

    @property
    def first_scored(self) -> int:
        """The position of the first scored id of this node, if any of its ids are scored."""
        return max(self.min_start, self.begin)

    @property
    def read_length(self) -> int:
        """How many of the ids the model reads: all, except the last id of a leaf, which predicts no
        id."""
        return len(self.ids) - (not self.children)

    def results(self) -> Iterator[SequenceScore]:
        """Yield the scores of the sequences that end with this node.

        Sums the scores of the ids of this node and of its ancestors, back to the sequence's
        `start`. All of them must be computed already.
        """
        for number, start in self.ends:
            scores, node = [], self
            while node is not None and node.begin + len(node.ids) > start:
                scores += node.scores[max(0, start - node.first_scored) :]
                node = node.parent
            yield SequenceScore(number, sum(n for n, _ in scores), all(best for _, best in scores))


def log_likelihoods(
    lm: LoadedModel, sequences: Sequence[tuple[Ids, int]], batch_size: int | None = None
) -> Iterator[SequenceScore]:
    """Yield the score of ids[start:] for each sequence (ids, start), 1 <= start < len(ids). The ids
    before `start` are the context, which is read but not scored.

    batch_size: the most rows of one call; None: chosen by CALL_LIMITS and the free memory. Scores
    are computed in float32. They come in another order than the sequences: SequenceScore.number
    says whose they are. Raises the ValueErrors of check_sequences, and MemoryError.
    """
    if not sequences:
        return
    check_sequences(sequences, lm.model.args.context, lm.model.args.vocab_size)
    longest = max(len(ids) for ids, _ in sequences)
    roots = build_prefix_trees(sequences, min_shared_ids(lm.model.args, longest))
    yield from TreeScorer(lm, roots, batch_size).score([(node, 0) for node in roots])


def check_sequences(sequences: Sequence[tuple[Ids, int]], context: int, vocab_size: int) -> None:
    """Raise ValueError for a sequence (ids, start) that the model cannot score.

    At least one id must be scored, and the first id of all cannot be, because the model predicts an
    id from the ids before it. context: positions of the model; a sequence may have one id more,
    because the last id is scored but not read. vocab_size: all ids must be below it.
    """
    for number, (ids, start) in enumerate(sequences):
        if start < 1:
            raise ValueError(f"sequence {number}: the first id cannot be scored: none precedes it")
        if start >= len(ids):
            raise ValueError(f"sequence {number}: no ids from {start} on, it has {len(ids)}")
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
    """Return how many ids a common prefix must have to be read once for all its sequences.

    The number is infinite, so nothing is shared, if rotations depend on the length of the whole
    sequence; see same_rotations. longest: the number of ids of the longest sequence.
    """
    return MIN_SHARED_IDS if same_rotations(args, 1, longest) else math.inf


def build_prefix_trees(
    sequences: Sequence[tuple[Ids, int]], min_shared: float = MIN_SHARED_IDS
) -> list[PrefixNode]:
    """Return the roots of prefix trees that contain all sequences (ids, start).

    min_shared: a common prefix of fewer ids is not shared.
    """
    return TreeBuilder(sequences, min_shared).nodes(0, len(sequences), 0, None)


class TreeBuilder:
    """Builds prefix trees over the sorted sequences: all sequences with a common prefix are
    neighbours in lexicographic order.

    texts: the ids of the sorted sequences. ends: the (number, start) of each.
    """

    def __init__(self, sequences: Sequence[tuple[Ids, int]], min_shared: float):
        """Sort the sequences (ids, start), and measure their common prefixes."""
        order = sorted(range(len(sequences)), key=lambda n: tuple(sequences[n][0]))
        self.ends = [(n, sequences[n][1]) for n in order]
        self.texts = [tuple(sequences[n][0]) for n in order]
        self.min_shared = min_shared
        # shared[n]: the length of the common prefix of texts n - 1 and n
        self.shared = [0, *(common(a, b) for a, b in pairwise(self.texts))]

    def nodes(
        self, first: int, stop: int, begin: int, parent: PrefixNode | None
    ) -> list[PrefixNode]:
        """Return the nodes, with their subtrees, of texts[first:stop] from position `begin` on.
        `nodes` and `node` call each other, one level deeper each time.

        The first `begin` ids of these texts are equal: they are the ids of `parent` and its
        ancestors. parent: None for roots. Neighbours belong to one node if they share enough ids;
        see MIN_SHARED_IDS.
        """
        node_starts = [first]
        for n in range(first + 1, stop):
            longer = max(len(self.texts[n - 1]), len(self.texts[n]))
            if self.shared[n] - begin < max(self.min_shared, (longer - begin) // 4):
                node_starts.append(n)
        return [self.node(a, b, begin, parent) for a, b in pairwise([*node_starts, stop])]

    def node(self, first: int, stop: int, begin: int, parent: PrefixNode | None) -> PrefixNode:
        """Return the node for texts[first:stop], with its subtree.

        Its ids are those that all these texts have in common, from position `begin` on; texts that
        end there are its `ends`, and the longer texts become its children.
        """
        end = min(self.shared[first + 1 : stop], default=len(self.texts[first]))
        node = PrefixNode(self.texts[first][begin:end], begin, parent)
        while first < stop and len(self.texts[first]) == end:  # a prefix sorts before longer texts
            node.ends.append(self.ends[first])
            first += 1
        node.children = self.nodes(first, stop, end, node) if first < stop else []
        children = node.children
        node.min_start = min([start for _, start in node.ends] + [n.min_start for n in children])
        node.cache_length = max([begin + node.read_length] + [n.cache_length for n in children])
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

    index: int  # index, among the B * T ids of the call, of the id before it, which predicts it
    token: int  # the id
    node: PrefixNode  # the node that contains the id


class TreeScorer:
    """Lets the model read trees of sequences, level by level, and computes the scores.

    Each level has a pool: the KV caches of all layers, with rows for several calls and one node in
    each row. Each call reads nodes of similar length, so that there is little padding.
    """

    def __init__(self, lm: LoadedModel, roots: Sequence[PrefixNode], batch_size: int | None):
        """Choose the sizes of calls and pools for the trees of these roots; no memory is allocated
        yet. All pools, one for each level, may take a quarter of the free memory. batch_size: the
        most rows of a call; None: chosen by CALL_LIMITS."""
        self.lm, self.batch_size = lm, batch_size
        self.max_ids, max_positions, overhead = CALL_LIMITS[lm.device.type]
        # If a call would contain more padding ids than this, two calls are faster.
        self.max_padding = IDS_PER_WEIGHT_PASS + overhead // count_weights(lm.model.args)
        bytes_per_position = lm.kv_bytes(1) * depth(roots)  # of one row, in all pools
        positions_in_memory = broadcast_from_rank0(
            lambda: available_memory(lm.device) // 4 // bytes_per_position
        )  # rank 0's value, because all ranks must make the same calls
        self.max_positions = min(max_positions, positions_in_memory)
        self.longest_sequence = max(node.cache_length for node in roots)  # positions
        self.pools: dict[int, list[KVCache]] = {}  # by level
        # Compiled prefill has one graph for each number of rows and of positions. With it all calls
        # have fixed_rows rows, and all pools have positions for the longest sequence. 0: prefill is
        # not compiled, and sizes are free.
        self.fixed_rows = 0
        if lm.prefill is not lm.model:
            average = sum(node.read_length for node in roots) // len(roots)
            self.fixed_rows = batch_size or max(1, self.max_ids // average)

    @torch.inference_mode()
    def score(
        self, nodes: Sequence[tuple[PrefixNode, int]], level: int = 0
    ) -> Iterator[SequenceScore]:
        """Yield the scores of all sequences in the subtrees of these nodes.

        nodes: pairs of a node of this level and the row of its parent in the previous level's pool,
        which must still hold the parent's keys and values. At level 0 the row is not used. As many
        nodes as fit into the level's pool are scored, with their subtrees, before the others, which
        overwrite the pool.
        """
        for node, _ in nodes:
            if not node.read_length:  # a leaf of one id: the call for its parent has scored it
                yield from node.results()
        todo = sorted((n for n in nodes if n[0].read_length), key=lambda n: -n[0].cache_length)
        while todo:
            positions = self.longest_sequence if self.fixed_rows else todo[0][0].cache_length
            # The pool is filled `fills` times, each time with about as many nodes.
            fills = -(-len(todo) // self.pool_rows(positions))
            size = -(-len(todo) // fills)
            pooled, todo = sorted(todo[:size], key=lambda n: -n[0].read_length), todo[size:]
            yield from self.score_pool(pooled, level)
            children = [(n, row) for row, (node, _) in enumerate(pooled) for n in node.children]
            if children:
                yield from self.score(children, level + 1)

    def score_pool(
        self, pooled: Sequence[tuple[PrefixNode, int]], level: int
    ) -> Iterator[SequenceScore]:
        """Let the model read nodes that fit into the level's pool together, in several calls; yield
        the scores of the sequences that end with these nodes.

        pooled: pairs of a node and its parent's row in the previous level's pool, sorted by
        descending read_length. The n-th node is read into row n of the pool.
        """
        pool = self.pool(level, len(pooled), max(node.cache_length for node, _ in pooled))
        first_row = 0
        for batch, parent_rows in self.batches(pooled):
            # Rows beyond len(batch) are padding; the next call overwrites them.
            rows = slice(first_row, first_row + max(len(batch), self.fixed_rows))
            caches = [cache.part(rows) for cache in pool]
            if level:
                self.copy_prefix(batch, parent_rows, caches, self.pools[level - 1])
            self.read_nodes(batch, caches)
            for node in batch:
                yield from node.results()
            first_row += len(batch)

    def pool_rows(self, positions: int) -> int:
        """Return how many rows a pool may have if each row has this many positions: at least one
        and batch_size, even if the memory limit is then exceeded."""
        return max(1, min(MAX_POOL_ROWS, self.max_positions // positions), self.batch_size or 0)

    def pool(self, level: int, rows: int, positions: int) -> list[KVCache]:
        """Return the level's KV caches, with at least this many rows and positions.

        Caches that are too small are replaced by new ones, and their contents are lost. With
        compiled prefill, all pools have the largest size, and fixed_rows rows more, because the
        last call is padded to fixed_rows rows.
        """
        if self.fixed_rows:
            positions, rows = (
                self.longest_sequence,
                self.pool_rows(self.longest_sequence) + self.fixed_rows,
            )
        pool = self.pools.get(level)
        if not pool or pool[0].rows < rows or pool[0].length < positions:
            self.pools.pop(level, None)  # frees its memory before the allocation of a larger one
            with self.lm.model.whole_caches():
                self.pools[level] = self.lm.make_caches(rows, positions)
        return self.pools[level]

    def batches(
        self, todo: Sequence[tuple[PrefixNode, int]]
    ) -> Iterator[tuple[Sequence[PrefixNode], Sequence[int]]]:
        """Divide pairs (node, its parent's row), sorted by descending read_length, into calls of
        the model. Yield (nodes, parents' rows) of each call."""
        while todo:
            size = self.fixed_rows or self.rows_of_call([node.read_length for node, _ in todo])
            yield tuple(zip(*todo[:size], strict=True))
            todo = todo[size:]

    def rows_of_call(self, lengths: Sequence[int]) -> int:
        """Return how many nodes the next call reads: as many of the first ones as batch_size or
        max_ids allows and as need at most max_padding padding ids. Each row is padded to the
        length of the first.

        lengths: the read_length of each unread node, sorted in descending order.
        """
        max_rows = self.batch_size or max(1, self.max_ids // lengths[0])
        padding = accumulate(lengths[0] - length for length in lengths)
        return sum(padded <= self.max_padding for padded in islice(padding, max_rows))

    def copy_prefix(
        self,
        nodes: Sequence[PrefixNode],
        parent_rows: Sequence[int],
        caches: list[KVCache],
        sources: list[KVCache],
    ) -> None:
        """Copy the keys and values of the nodes' parents from `sources`, the previous level's pool,
        to `caches`: row n gets row parent_rows[n], and rows without a node get the last of these
        rows. All rows get as many positions as the longest prefix has; in a row with a shorter
        prefix, causal attention does not see the excess before the node's ids overwrite it.
        """
        padding = [parent_rows[-1]] * (caches[0].rows - len(parent_rows))
        (rows,) = self.to_device([*parent_rows, *padding])
        filled = max(node.begin for node in nodes)
        for cache, source in zip(caches, sources, strict=True):
            cache.take(source, rows, filled)

    def read_nodes(self, nodes: Sequence[PrefixNode], caches: list[KVCache]) -> None:
        """Let the model read one node in each row, in chunks of ids that keep within PREFILL_TOKENS
        and MAX_LOGITS; append the scores of the targets to their nodes.

        The targets are the scored ids among the ids of these nodes and the first ids of their
        children. The keys and values of the nodes' ancestors must be in the caches. There are at
        most caches[0].rows nodes; the other rows repeat the last node.
        """
        rows = [*nodes, *nodes[-1:] * (caches[0].rows - len(nodes))]
        width = max(node.read_length for node in nodes)
        max_ids = min(PREFILL_TOKENS, MAX_LOGITS // self.lm.model.args.vocab_size)
        ids_per_row = max(1, max_ids // len(rows))
        for begin in range(0, width, ids_per_row):
            chunk = range(begin, min(begin + ids_per_row, width))
            to_score = find_targets(nodes, chunk)
            scores = self.run(rows, chunk, caches, to_score)
            for target, score in zip(to_score, scores, strict=True):
                target.node.scores.append(score)

    def run(
        self,
        rows: Sequence[PrefixNode],
        chunk: range,
        caches: list[KVCache],
        to_score: Sequence[Target],
    ) -> Iterator[tuple[float, bool]]:
        """Let the model read the ids of `rows` at the indices `chunk`, counted within each node;
        return the scores of the targets, as `scores` does. The keys and values of the nodes' ids
        before the chunk, and of their ancestors, must be in the caches."""
        # A row shorter than the chunk repeats its last id, which rewrites the same KV cache slot.
        indices = [[min(n, node.read_length - 1) for n in chunk] for node in rows]
        tokens = [[node.ids[n] for n in row] for node, row in zip(rows, indices, strict=True)]
        pos = [[node.begin + n for n in row] for node, row in zip(rows, indices, strict=True)]
        visible = max(map(max, pos)) + 1
        if self.fixed_rows:
            visible = visible_length(visible, caches[0].length)
        key_pos = torch.arange(visible, device=self.lm.device)
        lengths = [[node.cache_length] for node in rows]
        tokens, pos, lengths = self.to_device(tokens, pos, lengths)
        return self.scores((tokens, pos, key_pos, caches), lengths, to_score)

    def scores(
        self,
        inputs: tuple[Tensor, Tensor, Tensor, list[KVCache]],
        lengths: Tensor,
        to_score: Sequence[Target],
    ) -> Iterator[tuple[float, bool]]:
        """Call the model; return (log-probability, whether it is the most likely id) per target, in
        the order of to_score.

        inputs: tokens (B, T), positions (B, T), key positions (L,) and caches. lengths: (B, 1), the
        positions of each row's longest sequence; only a model without shared prefixes depends on
        it. Without targets the call only fills the caches.
        """
        # The first ids of a node's children have the same index: its logits are computed once.
        logit_row = {index: n for n, index in enumerate(dict.fromkeys(t.index for t in to_score))}
        # Without targets the model still needs an index: 0, whose logits are not used.
        (at,) = self.to_device(list(logit_row) or [0])
        logits = self.lm.prefill(*inputs, at, lengths)  # (N, V)
        if not to_score:
            return iter(())
        target_rows, tokens = self.to_device(
            [logit_row[t.index] for t in to_score], [t.token for t in to_score]
        )
        log_probs = logits.log_softmax(-1, dtype=torch.float32)  # (N, V)
        target_log_probs = log_probs[target_rows, tokens]  # (W,)
        best = target_log_probs == log_probs.amax(-1)[target_rows]  # (W,)
        # Ties count for the first id, as in argmax. argmax takes ten times as long as amax, so it
        # runs only for targets that have the maximum.
        best[best.clone()] = log_probs[target_rows[best]].argmax(-1) == tokens[best]
        return zip(target_log_probs.tolist(), best.tolist(), strict=True)

    def to_device(self, *lists: list) -> list[Tensor]:
        """Return each list of numbers, or of rows of numbers, as a tensor on the model's device."""
        return [torch.tensor(values).to(self.lm.device) for values in lists]


def find_targets(nodes: Sequence[PrefixNode], chunk: range) -> list[Target]:
    """Return the targets of a call whose row b reads the ids of nodes[b] at the indices `chunk`.

    An id predicts its successor, so the chunk's targets are the ids one index later, from the first
    scored position on, and after a node's last id the first ids of its children.
    """
    return [
        Target(row * len(chunk) + n - chunk.start, token, owner)
        for row, node in enumerate(nodes)
        for n in range(
            max(chunk.start, node.first_scored - node.begin - 1), min(chunk.stop, node.read_length)
        )
        for token, owner in scored_successors(node, n)
    ]


def scored_successors(node: PrefixNode, n: int) -> Iterator[tuple[int, PrefixNode]]:
    """Yield each scored id that follows node.ids[n] in a sequence, with the node that contains it:
    the next id of this node or, after its last id, the first id of each child. The caller has
    checked that the next id of this node is scored."""
    if n + 1 < len(node.ids):
        yield node.ids[n + 1], node
    else:
        yield from ((c.ids[0], c) for c in node.children if c.min_start <= c.begin)
