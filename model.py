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

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.args import ModelArgs
from layers.basic import Embedding, Linear, make_norm
from layers.kv_cache import AttentionCache, CacheFactory, KVCache
from layers.positions import POSITIONS, Rotation


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


FEED_FORWARDS = {"gated": GatedFeedForward, "plain": PlainFeedForward}
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}
