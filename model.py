"""Llama and OPT as one Transformer.

Read from the top: ModelArgs (the shape that a checkpoint's config.json gives), Transformer,
PreNormBlock, Attention, the feed-forwards, then the positions and the KV cache. The two families
differ in norm, feed-forward, positions and biases. Constructors choose the classes from tables; no
forward depends on the family.

Shapes: B rows of a batch, T new tokens per row, S visible positions, D dim, H query heads,
G key/value heads, R = H // G query heads per key/value head, E head_dim, F hidden_dim, V vocab.

The token at position p of a row is stored at position p of the KV cache. A step is one call of
Transformer.forward, which computes T new tokens of each row. Rows of different lengths
are padded on the right: a padding token writes to a position that the mask hides from every query
of its row, and the row's own later token overwrites it before a query may attend to it.

Based on Llama (arXiv 2302.13971), OPT (2205.01068), rotary positions (2104.09864) and grouped
query attention (2305.13245); names follow Llama's reference code, sizes gpt-fast's brevity.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.torch_private import copy_with_buffers, own_buffers

# Cosine and sine, (B, T, 1, E/2) each. None: the model has learned positions.
Rotation = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class RopeScaling:
    """The scaling of rotary frequencies for a context longer than the trained one."""

    kind: str  # a key of ROPE_SCALINGS
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a model. weights/hf.py reads it from a Hugging Face config."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    context: int  # positions the model can attend over
    embed_dim: int  # width of the embedding table; differs from dim in OPT-350m only
    norm: str = "rms"  # a key of NORMS
    norm_eps: float = 1e-5
    norm_affine: bool = True
    norm_first: bool = True  # False: norms follow the residual sums (OPT-350m)
    final_norm: bool = True
    feed_forward: str = "gated"  # a key of FEED_FORWARDS
    activation: str = "silu"  # a key of ACTIVATIONS
    positions: str = "rotary"  # a key of POSITIONS
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # of wqkv
    wo_bias: bool = False
    mlp_bias: bool = False  # w1, w2, w3
    tied: bool = False  # the output head is the embedding table


class Transformer(nn.Module):
    """Computes logits from token ids. All state that outlives a call is in the caches.

    Built on the meta device when it is loaded; load.py then replaces modules and fills the weights.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        block = PreNormBlock if args.norm_first else PostNormBlock
        resized = args.embed_dim != args.dim  # OPT-350m only
        self.tok_embeddings = Embedding(args.vocab_size, args.embed_dim)
        self.project_in = Linear(args.embed_dim, args.dim, bias=False) if resized else nn.Identity()
        self.positions = POSITIONS[args.positions](args)
        self.layers = nn.ModuleList(block(args) for _ in range(args.n_layers))
        self.norm = make_norm(args) if args.final_norm else nn.Identity()
        self.project_out = (
            Linear(args.dim, args.embed_dim, bias=False) if resized else nn.Identity()
        )
        self.output = Linear(args.embed_dim, args.vocab_size, bias=False)
        if args.tied:
            self.output.weight = self.tok_embeddings.weight
        self.cache_factory = CacheFactory()

    def forward(
        self,
        tokens: Tensor,
        pos: Tensor,
        key_pos: Tensor,
        caches: Iterable["AttentionCache"],
        at: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Returns the logits after each new token, (B, T, V); extends the caches.

        tokens: (B, T) ids. pos: (B, T), the position of each in its row.
        key_pos: (S,) = arange(S), the positions of the keys that attention reads, S > pos.max().
        caches: one per layer. at: (N,) indices into the B*T tokens; only these get logits, (N, V),
        since the output head is the widest product. lengths: (B, 1), tokens of each row's whole
        prompt; see DynamicRotaryPositions.
        """
        x, rotation, mask = self.embed(tokens, pos, key_pos, lengths)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotation, mask, pos, cache)
        return self.unembed(x, at)

    def embed(
        self, tokens: Tensor, pos: Tensor, key_pos: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Rotation, Tensor]:
        """Returns the inputs of the first layer: x, (B, T, D), the rotation and the mask.

        The parameters are those of forward. compiled.py and finite.py call the parts of
        forward themselves: embed, the layers, unembed.
        """
        x = self.project_in(self.tok_embeddings(tokens))  # (B, T, D)
        x, rotation = self.positions(x, pos, lengths)
        return x, rotation, self.mask(pos, key_pos, x.dtype)

    def unembed(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Returns the logits of the last layer's output x, (B, T, D): (B, T, V), or (N, V) for the
        N tokens that `at` lists, see forward."""
        if at is not None:
            x = x.flatten(0, 1)[at]  # (N, D)
        return self.output(self.project_out(self.norm(x)))

    def bytes_per_step(self) -> int:
        """Returns the bytes of weights that a decoding step reads: all but embedding tables, of
        which it reads one row for each token. A table that is also the output head counts.

        bench.py compares these bytes with the memory's bandwidth.
        """
        state = {id(t): t for t in self.state_dict(keep_vars=True).values()}  # tied: once
        tables = [self.positions.weight] if isinstance(self.positions, nn.Embedding) else []
        table = self.tok_embeddings.weight
        tables += [] if getattr(self.output, "weight", None) is table else [table]
        return sum(t.nbytes for t in state.values()) - sum(t.nbytes for t in tables)

    def mask(self, pos: Tensor, key_pos: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the mask of attention: 0 where a query may attend to a key, else -inf.

        pos, key_pos: see forward. (B, T), (S,) -> (B, 1, R*T, S): grouped_attention has R*T queries
        for each key/value head. A key at or before the query's position is visible.
        """
        hidden = key_pos > pos.unsqueeze(-1)  # (B, T, S)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=pos.device)
        mask = mask.masked_fill(hidden, -math.inf)
        R = self.args.n_heads // self.args.n_kv_heads
        return mask.repeat(1, R, 1).unsqueeze(1)  # (B, 1, R*T, S)

    def make_caches(self, batch: int, length: int) -> list["KVCache"]:
        """Returns empty caches on the model's device, in its dtype: `length` positions per row.

        One more position is allocated and never used: the compiler would make a second graph for
        steps in which all positions of the cache are visible.
        """
        weight, args = self.tok_embeddings.weight, self.args
        shape = (batch, length + 1, args.n_kv_heads, args.head_dim)
        given = shape, weight.dtype, weight.device
        return [self.cache_factory(*given) for _ in range(args.n_layers)]  # one for each layer

    def kv_bytes_per_token(self) -> int:
        """Returns the bytes of one position in the caches of all layers."""
        shape = (1, 1, self.args.n_kv_heads, self.args.head_dim)
        one = self.cache_factory(shape, self.tok_embeddings.weight.dtype, torch.device("meta"))
        return self.args.n_layers * sum(buffer.nbytes for buffer in one.buffers())


class PreNormBlock(nn.Module):
    """A layer: attention, then the feed-forward, each applied to a norm of its input and added."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FEED_FORWARDS[args.feed_forward](args)
        self.attention_norm = make_norm(args)
        self.ffn_norm = make_norm(args)

    # The compiler compiles this once for all layers, so compile time does not grow with depth.
    @torch.compiler.nested_compile_region
    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: "AttentionCache"
    ) -> Tensor:
        """Returns the layer's output for x, (B, T, D). rotation, mask: results of
        Transformer.embed. pos: (B, T), the positions at which the cache stores the tokens. cache:
        this layer's."""
        x = x + self.attention(self.attention_norm(x), rotation, mask, pos, cache)
        return x + self.feed_forward(self.ffn_norm(x))  # (B, T, D)


class PostNormBlock(PreNormBlock):
    """A layer whose norms follow the residual sums (OPT-350m)."""

    @torch.compiler.nested_compile_region
    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: "AttentionCache"
    ) -> Tensor:
        """Returns the layer's output, (B, T, D); the parameters are those of PreNormBlock."""
        x = self.attention_norm(x + self.attention(x, rotation, mask, pos, cache))
        return self.ffn_norm(x + self.feed_forward(x))  # (B, T, D)


class Attention(nn.Module):
    """Self-attention over the KV cache, with one product for q, k and v."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        # Outputs of the product that are q, k and v.
        self.widths = [n * args.head_dim for n in (args.n_heads, args.n_kv_heads, args.n_kv_heads)]
        self.wqkv = Linear(args.dim, sum(self.widths), bias=args.attention_bias)
        self.wo = Linear(self.widths[0], args.dim, bias=args.wo_bias)
        self.rotate = POSITIONS[args.positions].rotate

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, pos: Tensor, cache: "AttentionCache"
    ) -> Tensor:
        """Returns the attention of x, (B, T, D), to the cache, in which it stores keys and values
        at pos, (B, T). rotation: of the tokens at pos. mask: see Transformer.mask."""
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)) for t in self.wqkv(x).split(self.widths, dim=-1)
        )  # (B, T, H, E), (B, T, G, E), (B, T, G, E)
        q, k = self.rotate(q, rotation), self.rotate(k, rotation)
        y = cache.attend(q, k, v, mask, pos)  # (B, T, H, E)
        return self.wo(y.flatten(2))  # (B, T, H*E) -> (B, T, D)


class GatedFeedForward(nn.Module):
    """The feed-forward of Llama: w2(act(w1 x) * w3 x), with one product for w1 and w3."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w13 = Linear(args.dim, 2 * args.hidden_dim, bias=args.mlp_bias)
        self.w2 = Linear(args.hidden_dim, args.dim, bias=args.mlp_bias)
        self.activation = ACTIVATIONS[args.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.w2(self.activation(gate) * up)


class PlainFeedForward(nn.Module):
    """The feed-forward of OPT: w2(act(w1 x))."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = Linear(args.dim, args.hidden_dim, bias=args.mlp_bias)
        self.w2 = Linear(args.hidden_dim, args.dim, bias=args.mlp_bias)
        self.activation = ACTIVATIONS[args.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)))


class RMSNorm(nn.RMSNorm):
    """RMS norm. eps: added to the mean square. affine: whether it has a weight. exact: compiled
    code returns the same bits as eager code."""

    def __init__(self, dim: int, eps: float, affine: bool, exact: bool = True):
        super().__init__(dim, eps, affine)
        self.exact = exact

    def allow_fusion(self) -> None:
        """Let the compiler fuse this norm with the code around it.

        A decoding step with quantised weights is 7 % faster; the last bits of its result may differ
        from those of eager code.
        """
        self.exact = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x over its last dimension, in the shape of x."""
        if self.exact and takes_kernel(x):
            return torch.ops.gpt_flex.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """Layer norm; compiled code returns the same bits as eager code."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of x over its last dimension, in the shape of x."""
        if takes_kernel(x):
            affine = self.weight, self.bias
            return torch.ops.gpt_flex.layer_norm(x, self.normalized_shape, *affine, self.eps)
        return super().forward(x)


class Embedding(nn.Embedding):
    """An embedding table that is quick to make on the meta device."""

    def reset_parameters(self) -> None:
        # On the meta device this would fill nothing, and import the compiler, which takes 0.7 s.
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """A dense layer, (..., in_features) -> (..., out_features)."""

    # Inputs that a column of each tensor stands for, for tp.py, which divides columns among ranks.
    inputs_per_column = {"weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        # A matrix, since for inputs of more dimensions and a bias the compiler takes dynamic sizes
        # for constants (torch 2.13).
        rows = x.flatten(0, -2)  # (N, in_features), N: product of the other dimensions
        y = F.linear(rows, self.weight, self.bias)  # (N, out_features)
        return y.view(*x.shape[:-1], self.out_features)  # (..., out_features)


class RotaryPositions(nn.Module):
    """Rotates each pair of query and key channels by an angle proportional to the position.

    The angle is the position times the pair's frequency; frequencies fall from 1 to about
    1 / rope_theta, before scaling.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        # Frequencies of the E/2 pairs of channels.
        # On the CPU even if the model is built on the meta device: no checkpoint stores them.
        channels = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu")
        freqs = 1.0 / args.rope_theta ** (channels / args.head_dim)  # (E/2,)
        if args.rope_scaling is not None:
            freqs = ROPE_SCALINGS[args.rope_scaling.kind](freqs, args.rope_scaling)
        self.register_buffer("freqs", freqs, persistent=False)

    def forward(
        self, x: Tensor, pos: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Rotation]:
        """Returns x unchanged, and the rotation of the tokens at pos, (B, T). lengths: see
        Transformer.forward; only DynamicRotaryPositions uses it."""
        # For the new positions only: a table for a context of 4M positions would take 2 GB.
        angles = pos[..., None, None] * self.frequencies(pos, lengths)  # (B, T, 1, E/2)
        if takes_kernel(angles):
            return x, torch.ops.gpt_flex.cos_sin(angles)
        return x, (angles.cos(), angles.sin())

    def frequencies(self, pos: Tensor, lengths: Tensor | None) -> Tensor:
        """Returns rotary frequencies for the tokens at pos, (B, T): (E/2,), the same for all, or
        (B, T, 1, E/2), a set for each."""
        return self.freqs

    @staticmethod
    def rotate(x: Tensor, rotation: Rotation) -> Tensor:
        """Rotate x, queries or keys, (B, T, heads, E), by the rotation that forward returned, in
        float32. Channel i pairs with i + E/2, as in Hugging Face files."""
        cos, sin = rotation
        a, b = x.float().chunk(2, dim=-1)  # (B, T, heads, E/2) each
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class DynamicRotaryPositions(RotaryPositions):
    """Rotary positions whose frequencies depend on the length of a text that exceeds the trained
    context: the NTK scaling that transformers calls "dynamic".

    The tokens of a prompt use the frequencies for the length of the whole prompt; a generated token
    uses those for its position + 1. Keys in the caches keep the rotation they were stored with.
    """

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        scaling = args.rope_scaling
        # The arguments of ntk_freqs after `exponents`. The last is the trained context.
        self.settings = args.rope_theta, scaling.factor, scaling.original_context
        channels = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu")
        self.register_buffer("exponents", channels / args.head_dim, persistent=False)  # (E/2,)

    def frequencies(self, pos: Tensor, lengths: Tensor | None) -> Tensor:
        """Returns the frequencies of the tokens at pos, (B, T): (B, T, 1, E/2). lengths: (B, 1), of
        the whole prompts; None while tokens are generated."""
        length = pos + 1 if lengths is None else torch.maximum(pos + 1, lengths)  # (B, T)
        stretch = torch.ops.gpt_flex.ntk_freqs if takes_kernel(length) else ntk_freqs
        longer = length[..., None, None] > self.settings[-1]  # (B, T, 1, 1)
        return torch.where(longer, stretch(length, self.exponents, *self.settings), self.freqs)


class LearnedPositions(Embedding):
    """Adds a learned vector for the position to each embedding; rotates nothing (OPT).

    It has the interface of RotaryPositions; the rotation is None.
    """

    OFFSET = 2  # OPT's tables begin with two rows that no position uses

    def __init__(self, args: ModelArgs):
        super().__init__(args.context + self.OFFSET, args.dim)

    def forward(
        self, x: Tensor, pos: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Rotation]:
        """Returns x, (B, T, D), plus the vectors of pos, (B, T); and None. lengths: not used."""
        return x + super().forward(pos + self.OFFSET), None

    @staticmethod
    def rotate(x: Tensor, rotation: Rotation) -> Tensor:
        return x


def takes_kernel(x: Tensor) -> bool:
    """Returns whether to call the operators below for x: in compiled code on CPUs. The operators
    have no gradient."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and not x.requires_grad


def kernel(schema: str, on_cpu: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define an operator gpt_flex::NAME, which compiled code calls as it is; the compiler would
    replace the same PyTorch functions by generated code.

    schema: NAME and the signature, in PyTorch's notation. on_cpu: computes the result. fake:
    returns an uninitialised tensor of the result's shape, which the compiler asks for.
    """
    name = f"gpt_flex::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "cpu")(on_cpu)
    torch.library.register_fake(name)(fake)


def cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos(), angles.sin()


def ntk_freqs(
    length: Tensor, exponents: Tensor, theta: float, factor: float, context: int
) -> Tensor:
    """Returns the frequencies, (B, T, 1, E/2), for texts of the lengths `length`, (B, T).

    The base grows so that the slowest channel turns as far as it did over the trained context.
    exponents: (E/2,), the channel's index over E. theta: the base of the trained model. factor:
    RopeScaling.factor. context: the trained one. For lengths up to it the result is not used.
    """
    E = 2 * len(exponents)
    base = theta * (factor * length / context - (factor - 1)) ** (E / (E - 2))  # (B, T)
    return 1.0 / base[..., None, None] ** exponents  # (B, T, 1, E/2)


# On a CPU, Inductor's own norms sum in another order, and its cosines and powers differ in the last
# bit; in bfloat16, compiled text would differ from eager text.
kernel(
    "rms_norm(Tensor x, int[] shape, Tensor? weight, float? eps) -> Tensor",
    torch.rms_norm,
    lambda x, *_: torch.empty_like(x),
)
kernel(
    "layer_norm(Tensor x, int[] shape, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    torch.layer_norm,
    lambda x, *_: torch.empty_like(x),
)
kernel(
    "cos_sin(Tensor angles) -> (Tensor, Tensor)",
    cos_sin,
    lambda angles: (torch.empty_like(angles), torch.empty_like(angles)),
)
kernel(
    "ntk_freqs(Tensor length, Tensor exponents, float theta, float factor, int context) -> Tensor",
    ntk_freqs,
    lambda length, exponents, *_: exponents.new_empty(*length.shape, 1, len(exponents)),
)


def scale_linear(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide all frequencies by `factor`: linear interpolation (arXiv 2306.15595)."""
    return freqs / scaling.factor


def scale_llama3(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, and interpolate between (Llama 3.1).

    A frequency is low if it makes at most low_freq_factor turns in the trained context, and high
    from high_freq_factor turns on. freqs: (E/2,).
    """
    turns = scaling.original_context * freqs / (2 * math.pi)  # full turns in the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # The weight of the original frequency: 0 for low ones, 1 for high ones.
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (kept + (1 - kept) / scaling.factor)


def make_norm(args: ModelArgs) -> nn.Module:
    return NORMS[args.norm](args.dim, args.norm_eps, args.norm_affine)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
FEED_FORWARDS = {"gated": GatedFeedForward, "plain": PlainFeedForward}
POSITIONS = {
    "rotary": RotaryPositions,
    "dynamic": DynamicRotaryPositions,
    "learned": LearnedPositions,
}
ROPE_SCALINGS = {
    "linear": scale_linear,
    "llama3": scale_llama3,
    "dynamic": lambda freqs, scaling: freqs,  # see DynamicRotaryPositions
}
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}


def grouped_attention(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> Tensor:
    """Attend with queries, (B, T, H, E), to keys and values, (B, S, G, E) each -> (B, T, H, E).

    attention: called with q, k, v and the mask, as F.scaled_dot_product_attention is. mask: see
    Transformer.mask; it already has R*T queries.
    """
    T = q.shape[1]
    # The R query heads that share a key/value head become rows of one query, so that keys
    # and values are read once and not expanded.
    q = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, G, R*T, E)
    y = attention(q, k.transpose(1, 2), v.transpose(1, 2), mask)  # (B, G, R*T, E)
    return y.unflatten(2, (-1, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, T, H, E)


def sdpa_attention(cache: "KVCache", q: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
    """Attend with PyTorch's kernel: the default CacheAttention, which runs on every device.

    The mask's last dimension tells how many positions are visible; pos is not used.
    """
    k, v = cache.visible(mask.shape[-1])  # (B, S, G, E)
    return grouped_attention(F.scaled_dot_product_attention, q, k, v, mask)


class KVCache(nn.Module):
    """Keys and values of one layer: (B, positions, G, E) each. The last position is not used.

    It is a module so that the compiler takes k and v for buffers with fixed addresses: a CUDA graph
    writes to them in place, and new caches of the same shape need no new compilation.
    """

    row_granularity = 1  # see Cache

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        attention: "CacheAttention" = sdpa_attention,
    ):
        super().__init__()
        self.attention = attention
        self.register_buffer("k", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("v", torch.zeros(shape, dtype=dtype, device=device))

    @property
    def rows(self) -> int:
        return self.k.shape[0]

    @property
    def length(self) -> int:
        """Usable positions of each row; the last allocated one is not: see make_caches."""
        return self.k.shape[1] - 1

    @property
    def device(self) -> torch.device:
        return self.k.device

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """Store k and v at pos, then attend with q to the visible positions; see AttentionCache."""
        self.store(pos, k, v)
        return self.attention(self, q, mask, pos)

    @contextlib.contextmanager
    def opened(self, rows: slice, pos: Tensor) -> Iterator["KVCache"]:
        """Yield the part of some rows while they compute and write to pos, (B, T).

        Here nothing needs to be moved: caches on several tiers fetch and save the part.
        """
        yield self.part(rows)

    def keep(self, filled: int) -> None:
        """Declare the positions from `filled` on unused. A cache on several tiers then does not
        move them; this one has nothing to do."""

    def update(self, pos: Tensor, k: Tensor, v: Tensor, visible: int) -> tuple[Tensor, Tensor]:
        """Store k and v, (B, T, G, E), at pos, (B, T); return keys and values of the first
        `visible` positions, (B, visible, G, E) each. Attention on the host calls it."""
        self.store(pos, k, v)
        return self.visible(visible)

    def store(self, pos: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v, (B, T, G, E), at pos, (B, T)."""
        rows = torch.arange(pos.shape[0], device=pos.device).unsqueeze(1)  # (B, 1)
        self.k[rows, pos] = k
        self.v[rows, pos] = v

    def visible(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the first `count` positions, (B, count, G, E) each."""
        return self.k[:, :count], self.v[:, :count]

    def part(self, rows: slice) -> "KVCache":
        """Returns a cache of some rows that shares this cache's memory."""
        buffers = {name: buffer[rows] for name, buffer in own_buffers(self).items()}
        return copy_with_buffers(self, buffers)

    def first(self, count: int) -> "KVCache":
        """Returns a view of the first `count` rows."""
        return self.part(slice(0, count))

    def compacted(self, rows: Sequence[int], filled: int) -> "KVCache":
        """Move the first `filled` positions of the given rows to the front; return a view of these
        rows. The decoding loop calls it when enough of the other rows have ended; from then on only
        the view may be used. rows: ascending.
        """
        front = self.first(len(rows))
        front.take(self, torch.tensor(rows, device=self.device), filled)
        return front

    def take(self, source: "KVCache", rows: Tensor, filled: int) -> None:
        """Copy the first `filled` positions of the given rows, (B,), of another cache to the rows
        of this one, in order."""
        for mine, theirs in zip(self.buffers(), source.buffers(), strict=True):
            mine[:, :filled] = theirs[rows, :filled]


class Cache(Protocol):
    """The cache of a layer as the decoding loop uses it: a KVCache, or one of several micro-batches
    (groups of rows) on several tiers: device, host memory and disk (tiers/kv_cache.py)."""

    rows: int
    length: int  # usable positions of each row
    device: torch.device
    row_granularity: int  # rows of a micro-batch: they take as long as one row of it

    def opened(
        self, rows: slice, pos: Tensor
    ) -> "contextlib.AbstractContextManager[AttentionCache]":
        """Yield the cache of some rows while they compute and write to pos, (B, T)."""

    def first(self, count: int) -> "Cache":
        """Return a view of the first `count` rows."""

    def compacted(self, rows: Sequence[int], filled: int) -> "Cache":
        """Move the first `filled` positions of the given rows, in ascending order, to the front;
        return a view of these rows."""

    def keep(self, filled: int) -> None:
        """Declare the positions from `filled` on unused, so that the cache need not move them."""


class AttentionCache(Protocol):
    """The cache of a layer as a block uses it: on the block's device, or on the host."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """Store k and v, (B, T, G, E), at pos, (B, T); return the attention, (B, T, H, E), of q,
        (B, T, H, E), to the positions that the mask covers. mask: see Transformer.mask."""


# Returns the attention, (B, T, H, E), of queries to a cache. Called with the cache, queries of that
# shape, the mask of Transformer.mask, and pos, (B, T), the queries' positions.
CacheAttention = Callable[[KVCache, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CacheFactory:
    """Makes the KV cache of each layer; a Transformer holds one.

    make: KVCache, or another constructor with the same arguments (quant/kv_cache.py).
    attention: how the caches attend; fast_layers replaces it by a kernel for the model's device.
    """

    make: Callable[..., KVCache] = KVCache
    attention: CacheAttention = sdpa_attention

    def __call__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Return an empty cache of shape (B, positions, G, E)."""
        return self.make(shape, dtype, device, attention=self.attention)

    def portable(self) -> "CacheFactory":
        """Return a factory of caches that attend on any device, not on the model's alone: for
        attention on the host."""
        return replace(self, attention=sdpa_attention)


def visible_length(filled: int, most: int) -> int:
    """Round `filled` up to 64, 96, 128, 192, 256, 384, ..., but at most to `most`.

    filled: positions in use, 1 or more. most: positions of the cache, or the model's context.
    Attention reads as many positions as the result says. Beyond 64, less than a third of them is
    not filled. Each doubling of the length has two sizes, hence two CUDA graphs.
    """
    power = max(64, 1 << (filled - 1).bit_length())
    return min(power * 3 // 4 if filled <= power * 3 // 4 and power > 64 else power, most)
