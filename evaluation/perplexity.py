"""Perplexity of a text: exp of the mean negative log-likelihood of its ids, over windows.

Start at perplexity. `windows` divides the ids into windows of at most max_seq_length ids. With a
stride shorter than a window, windows overlap: ids that an earlier window scored are context.

Source: https://huggingface.co/docs/transformers/perplexity (strided sliding window).
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from decoding import LoadedModel
from evaluation.scoring import Ids, log_likelihoods
from host.log import log
from host.memory import size_text

DEFAULT_WINDOW = 2048  # ids of a window, or fewer if the model's context is shorter


@dataclass(frozen=True)
class PerplexityOptions:
    """How a text is divided into windows and scored."""

    max_seq_length: int  # ids of a window, BOS included
    stride: int | None = None  # ids from one window's begin to the next; None: no overlap
    limit: float | None = None  # the first windows: a number or, below 1, a share of all
    batch_size: int | None = None  # windows of one call; None: as many as are fast
    bos: bool = True  # whether every window begins with BOS


def perplexity(lm: LoadedModel, text: str, name: str, options: PerplexityOptions) -> dict[str, Any]:
    """Return nats per token, perplexity, bits per byte and tokens/s of a text called `name`.

    Raises ValueError for a stride longer than a window, and for a text without an id to score.
    """
    ids, nbytes = lm.tokenizer.encode(text, bos=False, special=True), len(text.encode())
    prefix = [lm.tokenizer.bos_id] if options.bos else []
    stride = checked_stride(options.stride, options.max_seq_length - len(prefix))
    todo = list(windows(ids, prefix, options.max_seq_length, stride))
    todo = todo[: limited_count(options.limit, len(todo))]
    count = sum(len(window) - start for window, start in todo)
    if not count:
        raise ValueError(f"{name} has {len(ids)} tokens: too few to score one")
    log(
        f"{name}: {size_text(nbytes)}, {len(ids):,} tokens; {len(todo):,} windows of "
        f"{options.max_seq_length}, stride {stride}, {count:,} tokens scored"
    )
    start = time.perf_counter()
    nats = nats_per_token(lm, todo, options.batch_size)
    seconds = time.perf_counter() - start
    return {
        "text": name,
        "perplexity": math.exp(nats),
        "nats_per_token": nats,
        "bits_per_byte": nats / math.log(2) * len(ids) / nbytes,
        "tokens": count,
        "tokens_per_s": count / seconds,
        "max_seq_length": options.max_seq_length,
        "stride": stride,
    }


def checked_stride(stride: int | None, text_ids: int) -> int:
    """Return the stride of windows with so many ids of text; ValueError if it is out of range."""
    stride = stride or text_ids
    if not 0 < stride <= text_ids:
        raise ValueError(f"--stride {stride} is not between 1 and {text_ids}, a window's tokens")
    return stride


def windows(ids: Ids, prefix: Ids, length: int, stride: int) -> Iterator[tuple[Ids, int]]:
    """Yield windows (ids, start) that together score each id once: a window scores ids[start:].

    A window has at most `length` ids, the prefix included, and begins `stride` ids after the one
    before. Without a prefix the very first id, which nothing precedes, is not scored, nor is the
    first id of any window if windows do not overlap.
    """
    text_ids, done = length - len(prefix), 0
    for begin in range(0, len(ids), stride):
        end = min(begin + text_ids, len(ids))
        start = max(len(prefix) + done - begin, 1)
        if start < len(prefix) + end - begin:
            yield [*prefix, *ids[begin:end]], start
        done = end
        if end == len(ids):
            return


def limited_count(limit: float | None, count: int) -> int:
    """Return how many of `count` remain: `limit` or, if it is below 1, that share (as lm_eval)."""
    if limit is None:
        return count
    return math.ceil(count * limit) if limit < 1 else limit


def nats_per_token(
    lm: LoadedModel, sequences: Sequence[tuple[Ids, int]], batch_size: int | None = None
) -> float:
    """Return the mean negative log-likelihood of the scored ids of (ids, start), with a bar."""
    nats, total = 0.0, sum(len(ids) - start for ids, start in sequences)
    with tqdm(total=total, desc="perplexity", unit="token", unit_scale=True) as bar:
        for score in log_likelihoods(lm, sequences, batch_size):
            ids, start = sequences[score.number]
            nats -= score.nats
            bar.update(len(ids) - start)
    return nats / total
