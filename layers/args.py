"""The shape of a model: ModelArgs, which weights/hf.py reads from a Hugging Face config."""

from dataclasses import dataclass

import torch

# The dtypes in which models run.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
