"""Where the values of a model stop being finite numbers: for the message that ends such a run.

Start at explain_not_finite, which `generate` (generate.py) calls when the logits of a token are not finite.
It reads the text again, layer by layer and without compiled code, on all ranks together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from decoding import LoadedModel
from model import KVCache, Transformer, visible_length
from ranks import all_gather_object

CHUNK_TOKENS = 512  # tokens that are read at once


@torch.inference_mode()
def explain_not_finite(lm: LoadedModel, text: Sequence[int], caches: Sequence[KVCache]) -> str:
    """One line: which part of the model is the first whose values for a text are not finite.

    caches: at least as long as the text; the first row is overwritten.
    """
    ((_, caches),) = lm.micro_batches([cache.first(1) for cache in caches])
    slots = torch.arange(caches[0].length, device=lm.device)
    for cache in caches:
        cache.keep(0)
    finite = []
    for start in range(0, len(text), CHUNK_TOKENS):
        tokens = torch.tensor([text[start : start + CHUNK_TOKENS]], device=lm.device)  # (1, T)
        end = start + tokens.shape[1]
        pos, visible = slots[start:end], slots[: visible_length(end, len(slots))]
        finite.append(parts_finite(lm.model, tokens, pos.unsqueeze(0), visible, caches))
    every = torch.stack(finite).all(0).tolist()  # of embedding, layers and head
    name = first_part(all_gather_object(every))
    if name is None:
        return (
            "the logits are not finite numbers, but they are when the text is read again: the "
            "logits processors, or values close to the dtype's limit, make NaN or infinity"
        )
    dtype = str(lm.model.tok_embeddings.weight.dtype).removeprefix("torch.")
    wider = "" if dtype == "float32" else " (try --dtype float32)"
    return (
        f"the logits are not finite numbers: {name} is the first part of the model that makes NaN "
        f"or infinity; its weights are damaged, or its values exceed what {dtype} can hold{wider}"
    )


def parts_finite(
    model: Transformer, tokens: Tensor, pos: Tensor, slots: Tensor, caches: Sequence[KVCache]
) -> Tensor:
    """One boolean for the embedding, each layer and the head: whether its output is finite."""
    x, rotation, mask = model.embed(tokens, pos, slots)
    found = [x.isfinite().all()]
    for layer, cache in zip(model.layers, caches, strict=True):
        x = layer(x, rotation, mask, pos, cache)
        # An offloaded model may keep activations in micro-batches, on the host or on disk.
        whole = x if isinstance(x, Tensor) else x.whole()
        found.append(whole.isfinite().all().to(found[0].device))
    found.append(model.unembed(x).isfinite().all().to(found[0].device))
    return torch.stack(found)


def first_part(ranks: Sequence[Sequence[bool]]) -> str | None:
    """The name of the first part that is not finite, of what each rank has found of its own."""
    layers = 0
    for finite in ranks:
        if not all(finite):
            at = finite.index(False)
            layer = f"layer {layers + at - 1} (counted from 0)"
            return "the embedding" if at == 0 else "the head" if at == len(finite) - 1 else layer
        layers += len(finite) - 2
    return None
