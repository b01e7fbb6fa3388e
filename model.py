"""Decoder-only language models of all supported families as one Transformer.

Read from the top: Transformer, SequentialBlock, Attention, the feed-forwards; then layers/: the
shape that a checkpoint's config.json gives (args.py), positions and KV cache. Families differ in
norms, feed-forward, positions, windows of attention, biases and factors. Constructors choose the
classes from tables; no forward depends on the family.

Shapes: B rows of a batch, T new tokens per row, S visible slots of the KV cache (a slot holds one
token's key and value; attention reads the visible ones), D dim, H query heads, G key/value heads,
R = H // G query heads per key/value head, E head_dim, F hidden_dim, V vocab.

A step is one call of Transformer.forward, which computes T new tokens of each row. Rows of
different lengths are padded on the right: a padding token writes to a slot of the KV cache that the
mask hides from every query of its row, and the row's own later token overwrites it before a query
may attend to it.

Based on Llama (arXiv 2302.13971), OPT (2205.01068), rotary positions (2104.09864) and grouped
query attention (2305.13245); names follow Llama's reference code, the brief style follows gpt-fast.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.args import ModelArgs
from layers.basic import (
    QK_NORMS,
    Divide,
    Embedding,
    Linear,
    Scale,
    ScaledEmbedding,
    SoftCap,
    gelu_tanh,
    make_norm,
    squared_relu,
)
from layers.kv_cache import (
    AttentionCache,
    CacheFactory,
    KVCache,
    Scores,
    hidden_keys,
    slots_and_keys,
)
from layers.positions import POSITIONS, Rotation


class AttentionInputs(NamedTuple):
    """The inputs of a layer's attention, besides x and the layer's cache."""

    rotation: Rotation  # cosine and sine for the new tokens; None with learned positions
    mask: Tensor  # (B, 1, R*T, S), see Transformer.mask
    # (B, T), the slots of the cache in which the new tokens are stored. They are the tokens'
    # positions, unless the cache is a ring (see layers/kv_cache.py).
    pos: Tensor


class Transformer(nn.Module):
    """Computes logits from token ids. All state that outlives a call is in the caches.

    Built on the meta device when it is loaded; load.py then replaces modules and fills the weights.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        resized = args.embed_dim != args.dim  # OPT-350m only
        self.tok_embeddings = make_embedding(args)
        self.project_in = Linear(args.embed_dim, args.dim, bias=False) if resized else nn.Identity()
        self.positions = POSITIONS[args.positions](args)
        # For each layer the index of its rope (rotary positions) in args.ropes, or None.
        ropes = {rope: n for n, rope in enumerate(args.ropes)}
        self.rope_numbers = [ropes.get(layer.rope) for layer in args.layer_types]
        self.layers = nn.ModuleList(BLOCKS[args.block](args) for _ in range(args.n_layers))
        self.norm = make_norm(args) if args.final_norm else nn.Identity()
        self.project_out = (
            Linear(args.dim, args.embed_dim, bias=False) if resized else nn.Identity()
        )
        self.output = Linear(args.embed_dim, args.vocab_size, bias=False)
        self.scale_logits = make_logits_scale(args)
        if args.tied:
            self.output.weight = self.tok_embeddings.weight
        scores = Scores(args.attention_scale, args.attention_softcap)
        self.cache_factory = CacheFactory(scores=scores)

    def forward(
        self,
        tokens: Tensor,
        pos: Tensor,
        key_pos: Tensor,
        caches: Sequence["AttentionCache"],
        at: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Returns the logits after each new token, (B, T, V); extends the caches.

        tokens: (B, T) ids. pos: (B, T), the position of each token in its row.
        key_pos: (S,) = arange(S), S > pos.max(): the positions whose keys attention reads. From a
        ring, attention reads at most the ring's slots, see slots_and_keys.
        caches: one per layer. at: (N,) indices into the B*T tokens; only these get logits, (N, V),
        since the output head is the widest product; None: all tokens. lengths: (B, 1), tokens of
        each row's whole prompt, so that tokens at positions >= lengths are padding; None while
        tokens are generated. LengthRope and rings depend on lengths. Raises ValueError if a ring
        cannot take T tokens, see slots_and_keys.
        """
        rings = [cache.ring for cache in caches]
        x, inputs = self.embed(tokens, pos, key_pos, rings, lengths)
        for layer, given, cache in zip(self.layers, inputs, caches, strict=True):
            x = layer(x, *given, cache)
        return self.unembed(x, at)

    def embed(
        self,
        tokens: Tensor,
        pos: Tensor,
        key_pos: Tensor,
        rings: Sequence[int | None],
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, list[AttentionInputs]]:
        """Returns the input of the first layer, (B, T, D), and the AttentionInputs of each layer.

        rings: the attribute `ring` of each layer's cache, see KVCache. The other parameters are
        those of forward. embed, the layers and unembed are separate functions because compiled.py
        and finite.py call them one by one.
        """
        x = self.project_in(self.tok_embeddings(tokens))  # (B, T, D)
        return self.attention_inputs(x, pos, key_pos, rings, lengths)

    def attention_inputs(
        self,
        x: Tensor,
        pos: Tensor,
        key_pos: Tensor,
        rings: Sequence[int | None],
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, list[AttentionInputs]]:
        """Returns x, (B, T, D), plus learned positions if the model has them (OPT), and the
        AttentionInputs of each layer. Layers with equal rope share the rotation; layers with equal
        window and ring share mask and slots.

        rings: the attribute `ring` of each layer's cache, see KVCache. Other parameters: see
        forward. Raises ValueError if a ring cannot take T tokens, see slots_and_keys.
        """
        x, rotations = self.positions(x, pos, lengths)
        shared = {}  # (window, ring) -> (mask, slots) of all layers with this window and ring
        inputs = []
        for layer, rope, ring in zip(self.args.layer_types, self.rope_numbers, rings, strict=True):
            key = layer.window, ring
            if key not in shared:
                slots, held_pos = slots_and_keys(pos, key_pos, ring, lengths)
                shared[key] = self.mask(pos, held_pos, x.dtype, layer.window), slots
            rotation = None if rope is None else rotations[rope]
            inputs.append(AttentionInputs(rotation, *shared[key]))
        return x, inputs

    def run_layer(self, n: int, block: nn.Module, x: Tensor) -> Tensor:
        """Run a block, as layer n of the model, over whole texts: (B, T, D) -> (B, T, D).

        Each text starts at position 0 with a new KV cache. The block, model.positions and x must be
        on one device. For calibration, which has one block in memory at a time, perhaps not in
        model.layers.
        """
        B, T, _ = x.shape
        key_pos, rings = torch.arange(T, device=x.device), [None] * self.args.n_layers
        lengths = torch.full((B, 1), T, device=x.device)
        # Its first result is not used: x has passed through embed, which adds learned positions.
        _, inputs = self.attention_inputs(x, key_pos.expand(B, T), key_pos, rings, lengths)
        shape = (B, T + 1, self.args.n_kv_heads, self.args.head_dim)  # + 1: see make_caches
        with self.whole_caches():
            cache = self.cache_factory(shape, x.dtype, x.device, self.args.layer_types[n].window)
        return block(x, *inputs[n], cache)

    def unembed(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Returns the logits of the last layer's output x, (B, T, D): (B, T, V), or (N, V) for the
        N tokens that `at` lists, see forward."""
        if at is not None:
            x = x.flatten(0, 1)[at]  # (N, D)
        return self.scale_logits(self.output(self.project_out(self.norm(x))))

    def bytes_per_step(self) -> int:
        """Returns the bytes of weights that a decoding step reads: all but embedding tables, of
        which it reads one row for each token. A table that is also the output head counts.

        bench.py compares these bytes with the memory's bandwidth.
        """
        # By identity, so that a tied table counts once. keep_vars: state_dict returns the tensors
        # themselves, not new views of them.
        state = {id(t): t for t in self.state_dict(keep_vars=True).values()}
        tables = [self.positions.weight] if isinstance(self.positions, nn.Embedding) else []
        table = self.tok_embeddings.weight
        tied = getattr(self.output, "weight", None) is table  # a PackedLinear has no `weight`
        tables += [] if tied else [table]
        return sum(t.nbytes for t in state.values()) - sum(t.nbytes for t in tables)

    def mask(
        self, pos: Tensor, keys: Tensor, dtype: torch.dtype, window: int | None = None
    ) -> Tensor:
        """Returns the mask of attention: 0 where a query sees a key, else -inf.

        pos, (B, T), and keys, (S,) or (B, S): positions of queries and keys, see hidden_keys.
        dtype: of the mask; it must be that of the queries. window: the layer's, see LayerType.
        Returns (B, 1, R*T, S): grouped_attention has R*T queries for each key/value head, first the
        T queries of one query head, then those of the next.
        """
        hidden = hidden_keys(pos, keys, window)  # (B, T, S)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=pos.device)
        mask = mask.masked_fill(hidden, -math.inf)
        R = self.args.n_heads // self.args.n_kv_heads
        return mask.repeat(1, R, 1).unsqueeze(1)  # (B, 1, R*T, S)

    def make_caches(self, batch: int, length: int) -> list["KVCache"]:
        """Returns empty caches on the model's device, in its dtype: `length` positions per row.

        The cache of a layer with a sliding window has fewer slots than positions, see CacheFactory.
        Each cache gets one slot more, for two reasons: a ring stores padding there, and the visible
        slots are then always fewer than the slots. For steps in which the two numbers are equal,
        the compiler would make a second graph.
        """
        weight, args = self.tok_embeddings.weight, self.args
        shape = (batch, length + 1, args.n_kv_heads, args.head_dim)
        given = shape, weight.dtype, weight.device
        return [self.cache_factory(*given, layer.window) for layer in args.layer_types]

    @contextlib.contextmanager
    def whole_caches(self) -> Iterator[None]:
        """Within the with statement, caches are made and counted with a slot for every position,
        also those of layers with a sliding window, which are otherwise rings of fewer slots. For
        callers that read more tokens of a row in one step than a ring takes. A cache made within
        the statement keeps all its slots afterwards."""
        factory = self.cache_factory
        self.cache_factory = replace(factory, windows=False)
        try:
            yield
        finally:
            self.cache_factory = factory

    def kv_bytes(self, length: int) -> int:
        """Returns the bytes of the caches of all layers for one row of `length` positions, without
        the extra slots (see make_caches)."""
        # One row of 0 positions, so that the cache has only the extra slot, as large as any other.
        shape = (1, 1, self.args.n_kv_heads, self.args.head_dim)
        slot = self.cache_factory(shape, self.tok_embeddings.weight.dtype, torch.device("meta"))
        return self.kv_slots(length) * sum(buffer.nbytes for buffer in slot.buffers())

    def kv_slots(self, length: int) -> int:
        """Returns the slots of the caches of all layers together for one row of `length` positions,
        without the extra slots (see make_caches)."""
        counts = Counter(layer.window for layer in self.args.layer_types)
        return sum(n * self.cache_factory.slots(length, window) for window, n in counts.items())

    def has_rings(self, length: int) -> bool:
        """Returns whether caches of `length` positions are rings in some layers of the whole model.
        A layer of another rank counts, too: all ranks must divide a text into the same steps."""
        return any(self.cache_factory.slots(length, w) < length for w in self.args.windows)


class SequentialBlock(nn.Module):
    """A layer: attention, then the feed-forward. Each reads a norm of x, and its output is added
    to x. If the model has them, a norm (Gemma, OLMo 2) or a factor (Granite) is applied to the
    output first."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FEED_FORWARDS[args.feed_forward](args)
        self.attention_norm = make_norm(args) if args.input_norms else nn.Identity()
        self.ffn_norm = make_norm(args) if args.input_norms else nn.Identity()
        self.attention_output = make_output_scale(args)
        self.ffn_output = make_output_scale(args)

    # The compiler compiles this once for all layers, so compile time does not grow with depth.
    @torch.compiler.nested_compile_region
    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: "AttentionCache"
    ) -> Tensor:
        """Returns the layer's output for x, (B, T, D), in that shape. rotation, mask, pos: the
        AttentionInputs of this layer. cache: this layer's."""
        y = self.attention(self.attention_norm(x), rotation, mask, pos, cache)
        x = x + self.attention_output(y)
        return x + self.ffn_output(self.feed_forward(self.ffn_norm(x)))  # (B, T, D)


class ParallelBlock(SequentialBlock):
    """A layer whose attention and feed-forward read the same norm of x (StableLM 2)."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.ffn_norm = nn.Identity()  # there is no second norm

    @torch.compiler.nested_compile_region
    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: "AttentionCache"
    ) -> Tensor:
        """Returns the layer's output, (B, T, D); the parameters are those of SequentialBlock."""
        normed = self.attention_norm(x)
        x = x + self.attention_output(self.attention(normed, rotation, mask, pos, cache))
        return x + self.ffn_output(self.feed_forward(normed))  # (B, T, D)


class PostNormBlock(SequentialBlock):
    """A layer whose norms follow the residual sums (OPT-350m). It has no output norms or factors:
    attention_output and ffn_output are not used."""

    @torch.compiler.nested_compile_region
    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: "AttentionCache"
    ) -> Tensor:
        """Returns the layer's output, (B, T, D); the parameters are those of SequentialBlock."""
        x = self.attention_norm(x + self.attention(x, rotation, mask, pos, cache))
        return self.ffn_norm(x + self.feed_forward(x))  # (B, T, D)


class Attention(nn.Module):
    """Self-attention over the KV cache, with one matrix product for q, k and v."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        # The numbers of output channels of q, k and v, which lie one after another in wqkv.
        self.widths = [n * args.head_dim for n in (args.n_heads, args.n_kv_heads, args.n_kv_heads)]
        self.wqkv = Linear(args.dim, sum(self.widths), bias=args.attention_bias)
        self.wo = Linear(self.widths[0], args.dim, bias=args.wo_bias)
        self.q_norm = QK_NORMS[args.qk_norm](args, args.n_heads)
        self.k_norm = QK_NORMS[args.qk_norm](args, args.n_kv_heads)
        self.rotate = POSITIONS[args.positions].rotate

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: "AttentionCache"
    ) -> Tensor:
        """Stores the keys and values of x, (B, T, D), in the cache; returns the attention of x's
        queries to the cache, (B, T, D). rotation, mask, pos: see AttentionInputs."""
        return self.wo(self.attend(self.wqkv(x), rotation, mask, pos, cache))  # (B, T, D)

    def attend(
        self, qkv: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: "AttentionCache"
    ) -> Tensor:
        """Computes what lies between the products wqkv and wo: norms and rotation of queries and
        keys, the store of keys and values in the cache, and the attention of the queries to the
        cache, (B, T, H * E). qkv: (B, T, (H + 2 G) * E), the outputs of wqkv. rotation, mask, pos:
        see AttentionInputs."""
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)) for t in qkv.split(self.widths, dim=-1)
        )  # (B, T, H, E), (B, T, G, E), (B, T, G, E)
        q, k = self.rotate(self.q_norm(q), rotation), self.rotate(self.k_norm(k), rotation)
        return cache.attend(q, k, v, mask, pos).flatten(2)  # (B, T, H, E) -> (B, T, H * E)


class GatedFeedForward(nn.Module):
    """The feed-forward of Llama: w2(act(w1 x) * w3 x), with one matrix product for w1 and
    w3."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w13 = Linear(args.dim, 2 * args.hidden_dim, bias=args.mlp_bias)
        self.w2 = Linear(args.hidden_dim, args.dim, bias=args.mlp_bias)
        self.activation = ACTIVATIONS[args.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.w2(self.activation(gate) * up)  # (B, T, D)


class PlainFeedForward(nn.Module):
    """The feed-forward of OPT: w2(act(w1 x))."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = Linear(args.dim, args.hidden_dim, bias=args.mlp_bias)
        self.w2 = Linear(args.hidden_dim, args.dim, bias=args.mlp_bias)
        self.activation = ACTIVATIONS[args.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)))  # (B, T, D)


def make_embedding(args: ModelArgs) -> Embedding:
    """Returns the embedding table, which multiplies its rows if the model has embedding_scale."""
    if args.embedding_scale == 1:
        return Embedding(args.vocab_size, args.embed_dim)
    scale, rounded = args.embedding_scale, args.round_embedding_scale
    return ScaledEmbedding(args.vocab_size, args.embed_dim, scale, rounded)


def make_output_scale(args: ModelArgs) -> nn.Module:
    """Returns the module that a block applies to the output of its attention or feed-forward before
    adding it to x: a norm, a factor (Granite) or nothing."""
    if args.output_norms:
        return make_norm(args)
    return nn.Identity() if args.residual_scale == 1 else Scale(args.residual_scale)


def make_logits_scale(args: ModelArgs) -> nn.Module:
    """Returns the module that is applied to the logits: a softcap, a division or nothing."""
    if args.logits_softcap is not None:
        return SoftCap(args.logits_softcap)
    return nn.Identity() if args.logits_divisor == 1 else Divide(args.logits_divisor)


# By these names, ModelArgs.block, feed_forward and activation choose.
BLOCKS = {"sequential": SequentialBlock, "parallel": ParallelBlock, "post_norm": PostNormBlock}
FEED_FORWARDS = {"gated": GatedFeedForward, "plain": PlainFeedForward}
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "relu2": squared_relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    # Other names of the same functions.
    "swish": F.silu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
}
