"""Replaces a model's layers by faster ones, where its device has them."""

import torch

from fast_layers.cpu import attend_fast, use_fast_linears
from model import Transformer


def use_fast_layers(model: Transformer, dtype: torch.dtype, large: bool | None = None) -> None:
    """Exchange what there is something faster for on the model's device."""
    device = model.tok_embeddings.weight.device.type
    if device == "cpu":
        use_fast_linears(model, dtype, large)
        attend_fast(model)
    elif device == "cuda":
        from fast_layers import gpu  # imports Triton

        gpu.use_fast_linears(model)
