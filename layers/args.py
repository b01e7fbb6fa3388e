"""The shape of a model: ModelArgs, which weights/hf.py reads from a Hugging Face config.

A field that chooses a class is a key of a table, which stands beside the classes: NORMS and
QK_NORMS (basic.py), POSITIONS and ROPES (positions.py), BLOCKS, FEED_FORWARDS and ACTIVATIONS
(model.py).
"""

from dataclasses import dataclass, replace

import torch

# The dtypes in which models run.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Rope:
    """The rotary positions of some layers. Fields from `factor` on matter to some kinds only; the
    functions and classes of positions.py say how."""

    dim: int  # channels of a head that are rotated, the first ones; even
    theta: float = 10000.0
    kind: str = "default"  # a key of ROPES
    factor: float = 1.0  # by which the context exceeds the trained one
    original_context: int = 0  # positions of the trained context
    attention_factor: float = 1.0  # multiplies cosines and sines: yarn, longrope
    low_freq_factor: float = 1.0  # llama3: turns in the trained context, see scale_llama3
    high_freq_factor: float = 4.0  # llama3: turns, see scale_llama3
    beta_fast: float = 32.0  # yarn: turns in the trained context, see scale_yarn
    beta_slow: float = 1.0  # yarn: turns, see scale_yarn
    truncate: bool = True  # yarn: round the bounds of the interpolation to whole pairs
    short_factors: tuple[float, ...] = ()  # longrope: dim / 2 divisors of the frequencies
    long_factors: tuple[float, ...] = ()  # longrope: the same for longer texts, see LongRope
    # Whether all keys of a text are computed again when it grows beyond original_context.
    recompute: bool = False


@dataclass(frozen=True)
class LayerType:
    """What may differ between layers: rotary positions and the attention window."""

    rope: Rope | None = None  # None: the model has learned positions
    window: int | None = None  # keys that a query sees, its own included; None: all up to its own


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a model."""

    dim: int  # channels of the activations between layers
    n_layers: int
    n_heads: int  # query heads
    n_kv_heads: int  # key/value heads; n_heads is a multiple
    head_dim: int
    hidden_dim: int  # channels between the products of the feed-forward
    vocab_size: int
    context: int  # positions the model can attend over
    embed_dim: int  # width of the embedding table; differs from dim in OPT-350m only
    block: str = "sequential"  # a key of BLOCKS
    norm: str = "rms"  # a key of NORMS
    norm_eps: float = 1e-5
    norm_affine: bool = True  # norms have weights
    input_norms: bool = True  # norms before attention and feed-forward
    output_norms: bool = False  # norms after attention and feed-forward
    final_norm: bool = True  # a norm before the output head
    qk_norm: str = "none"  # a key of QK_NORMS
    feed_forward: str = "gated"  # a key of FEED_FORWARDS
    activation: str = "silu"  # a key of ACTIVATIONS
    positions: str = "rotary"  # a key of POSITIONS
    layer_types: tuple[LayerType, ...] = ()  # of each layer; empty: LayerType() for all
    # The distinct windows of the whole model; empty: those of layer_types. with_layers keeps them,
    # so that each rank knows them all.
    windows: tuple[int, ...] = ()
    attention_bias: bool = False  # of q, k and v
    wo_bias: bool = False
    mlp_bias: bool = False  # of all products of the feed-forward
    tied: bool = False  # the output head is the embedding table
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # of the scores, see soft_cap; None: no limit
    embedding_scale: float = 1.0  # multiplies embeddings
    round_embedding_scale: bool = True  # to the dtype of the embeddings
    residual_scale: float = 1.0  # multiplies outputs of attention and feed-forward
    logits_divisor: float = 1.0  # divides the logits
    logits_softcap: float | None = None  # of the logits, see soft_cap; None: no limit

    def __post_init__(self):
        # object.__setattr__: a frozen dataclass refuses plain assignments.
        if not self.layer_types:
            object.__setattr__(self, "layer_types", (LayerType(),) * self.n_layers)
        if len(self.layer_types) != self.n_layers:
            raise ValueError(f"{len(self.layer_types)} layer types for {self.n_layers} layers")
        if not self.windows:
            windows = {layer.window for layer in self.layer_types if layer.window}
            object.__setattr__(self, "windows", tuple(sorted(windows)))

    def with_layers(self, layers: range) -> "ModelArgs":
        """Returns the args of a model of these consecutive layers, a pipeline stage (pp.py)."""
        types = self.layer_types[layers.start : layers.stop]
        return replace(self, n_layers=len(layers), layer_types=types)

    @property
    def recompute_after(self) -> int | None:
        """The length of a growing text, in tokens, beyond which all its keys are computed again,
        with the rotary positions for longer texts (Phi 3); None: they never are."""
        lengths = {rope.original_context for rope in self.ropes if rope.recompute}
        return min(lengths, default=None)

    @property
    def ropes(self) -> list[Rope]:
        """The distinct rotary positions of the layers, in the order of their first layers."""
        return list(dict.fromkeys(layer.rope for layer in self.layer_types if layer.rope))
