"""Finds the first part of a model whose values are not finite numbers, for an error message.

Start at explain_not_finite, which `generate` (engine.py) calls when a token's logits are NaN or
infinite. It runs the model on the text once more, eagerly, layer by layer, on all ranks (processes
under torchrun that share the model; in a pipeline each has other layers). A part is the embedding,
a layer or the head; on a rank of a pipeline, what stands in place of the embedding or the head
counts as that part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from decoding import LoadedModel
from layers.kv_cache import WINDOW_SLACK, Cache, visible_length
from model import Transformer
from ranks import all_gather_object

CHUNK_TOKENS = WINDOW_SLACK  # tokens of a forward pass: caches of sliding windows take no more


@torch.inference_mode()
def explain_not_finite(lm: LoadedModel, text: Sequence[int], caches: Sequence[Cache]) -> str:
    """Return an error line that names the first part of the model whose output is not finite.

    text: ids of the prompt and of the answer before the token that could not be drawn. caches:
    those of the generation, at least as long as the text; the first row is overwritten, so the
    generation cannot go on. All ranks must call this.
    """
    name = first_part(all_gather_object(finite_parts(lm, text, caches)))
    if name is None:
        return (
            "the logits are not finite numbers, but a second pass over the text gives finite ones: "
            "a logits processor, or values close to the dtype's limit, make NaN or infinity"
        )
    dtype = str(lm.model.tok_embeddings.weight.dtype).removeprefix("torch.")
    wider = "" if dtype == "float32" else " (try --dtype float32)"
    return (
        f"the logits are not finite numbers: {name} is the first part of the model that makes NaN "
        f"or infinity; its weights are damaged, or its values exceed what {dtype} can hold{wider}"
    )


def finite_parts(lm: LoadedModel, text: Sequence[int], caches: Sequence[Cache]) -> list[bool]:
    """Run the model on a text, in chunks. Return whether the output of each part is finite in all
    chunks: the embedding, each of this rank's layers, and the head.

    text: ids. caches: their first row is overwritten; see explain_not_finite.
    """
    # One row is one micro-batch. In a pipeline its caches are inside MicroBatchCaches (pp.py), from
    # which lm.micro_batches takes them.
    ((_, caches),) = lm.micro_batches([cache.first(1) for cache in caches])
    key_pos = torch.arange(caches[0].length, device=lm.device)
    lengths = torch.tensor([[len(text)]], device=lm.device)
    for cache in caches:
        cache.keep(0)  # what the caches hold is not used, so no tier needs to fetch it
    finite = []
    for start in range(0, len(text), CHUNK_TOKENS):
        tokens = torch.tensor([text[start : start + CHUNK_TOKENS]], device=lm.device)  # (1, T)
        end = start + tokens.shape[1]
        pos, visible = key_pos[start:end], key_pos[: visible_length(end, len(key_pos))]
        given = tokens, pos.unsqueeze(0), visible, caches, lengths
        finite.append(finite_in_chunk(lm.model, *given))
    return torch.stack(finite).all(0).tolist()  # (chunks, parts) -> (parts,)


def finite_in_chunk(
    model: Transformer,
    tokens: Tensor,
    pos: Tensor,
    key_pos: Tensor,
    caches: Sequence[Cache],
    lengths: Tensor,
) -> Tensor:
    """Return, for the embedding, each layer and the head, whether its output is finite: (parts,)
    bool, parts = 2 + layers. The parameters are those of Transformer.forward, with B = 1."""
    x, inputs = model.embed(tokens, pos, key_pos, [cache.ring for cache in caches], lengths)
    found = [x.isfinite().all()]
    for layer, given, cache in zip(model.layers, inputs, caches, strict=True):
        x = layer(x, *given, cache)
        # OffloadedActivations (offload.py) are on the host or on disk between two layers.
        whole = x if isinstance(x, Tensor) else x.whole()
        found.append(whole.isfinite().all().to(found[0].device))
    found.append(model.unembed(x).isfinite().all().to(found[0].device))
    return torch.stack(found)


def first_part(ranks: Sequence[Sequence[bool]]) -> str | None:
    """Return the name of the first part whose output is not finite; None if all are finite.

    ranks: each rank's finite_parts, in the order of the ranks.
    """
    # The number of layers of the earlier ranks of a pipeline. If each rank has a shard of all
    # layers, all ranks have the same outputs, and the loop ends at the first rank.
    earlier_layers = 0
    for finite in ranks:
        if not all(finite):
            at = finite.index(False)  # 0: the embedding; 1: the first layer of this rank
            layer = f"layer {earlier_layers + at - 1} (counted from 0)"
            return "the embedding" if at == 0 else "the head" if at == len(finite) - 1 else layer
        earlier_layers += len(finite) - 2  # without the embedding and the head
    return None
