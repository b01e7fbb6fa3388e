"""Replaces a model's layers by the fast ones of its device. Start at use_fast_layers."""

import torch

from fast_layers.cpu import build_while_loading, fuse_blocks, use_fast_attention, use_fast_linears
from host.memory import HugePages
from model import Transformer


def use_fast_layers(model: Transformer, dtype: torch.dtype, large: bool | None = None) -> None:
    """Replace the layers that have a faster version on the model's device, in place.

    Called by load.py after the weights are loaded. dtype: of the activations. large: see
    cpu.replaceable; not used on a GPU. On devices other than "cpu" and "cuda" the layers stay.
    """
    device = model.tok_embeddings.weight.device.type
    if device == "cpu":
        if use_fast_linears(model, dtype, large, HugePages()):
            use_fast_attention(model)
            fuse_blocks(model)
    elif device == "cuda":
        from fast_layers import gpu  # not at the top: a CPU does not need it

        gpu.use_fast_layers(model)


def prepare_fast_layers(
    model: Transformer, device: torch.device, dtype: torch.dtype, large: bool | None = None
) -> None:
    """Start to compile or load what use_fast_layers will need, in the background while the weights
    are loaded. Only a CPU has something to prepare.

    model: on the meta device. device: where its weights will be. dtype, large: as use_fast_layers
    will get them. Raises ValueError as cpu.build_while_loading does.
    """
    if device.type == "cpu":
        build_while_loading(model, dtype, large)
