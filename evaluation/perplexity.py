"""Perplexity of a text: exp of the mean negative log-likelihood of its ids, over windows.

Start at perplexity. `windows` divides the ids into windows of at most max_seq_length ids. The
stride is the number of ids from the beginning of a window to that of the next. If it is shorter
than a window, windows overlap: ids that an earlier window scored are context, which is read and not
scored.

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

DEFAULT_WINDOW = 2048  # ids of a window; the model's context if it is shorter


@dataclass(frozen=True)
class PerplexityOptions:
    """How a text is divided into windows and scored."""

    max_seq_length: int  # ids of a window, BOS included
    stride: int | None = None  # ids from window to window; None or 0: windows do not overlap
    limit: float | None = None  # windows to score: a number or, below 1, a share; None: all
    batch_size: int | None = None  # windows of one call of the model; None: chosen by the scorer
    bos: bool = True  # whether every window begins with BOS


def perplexity(lm: LoadedModel, text: str, name: str, options: PerplexityOptions) -> dict[str, Any]:
    """Score a text; return its perplexity, nats per token, bits per byte, tokens/s and settings.

    name: of the text, for the output and the log. "tokens" in the output: how many are scored. Bits
    per byte extend the mean over the scored tokens to all tokens of the text. Raises ValueError for
    a stride longer than a window, and for a text without an id to score, besides what
    log_likelihoods raises.
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
    """Return the stride; None or 0 becomes text_ids, so that windows do not overlap.

    text_ids: the ids of a window without BOS. Raises ValueError for a stride out of 1 to text_ids.
    """
    stride = stride or text_ids
    if not 0 < stride <= text_ids:
        raise ValueError(f"--stride {stride} is not between 1 and {text_ids}, a window's tokens")
    return stride


def windows(ids: Ids, prefix: Ids, length: int, stride: int) -> Iterator[tuple[Ids, int]]:
    """Yield windows (ids, start) that together score each id once: a window scores ids[start:].

    A window is the prefix (BOS, or no id) and ids of the text, together at most `length`. Windows
    begin `stride` ids apart. Without a prefix some ids are not scored, because no id precedes them
    in their window: the first id of the text and, if windows do not overlap, of every window.
    """
    text_ids = length - len(prefix)
    scored = 0  # ids of the text that earlier windows score
    for begin in range(0, len(ids), stride):
        end = min(begin + text_ids, len(ids))
        start = max(len(prefix) + scored - begin, 1)
        if start < len(prefix) + end - begin:
            yield [*prefix, *ids[begin:end]], start
        scored = end
        if end == len(ids):
            return


def limited_count(limit: float | None, count: int) -> int:
    """Return how many windows to score; the result may exceed `count`, the number of all. limit:
    their number, or, if it is below 1, a share of `count`, rounded up, as in lm_eval; None: all."""
    if limit is None:
        return count
    return math.ceil(count * limit) if limit < 1 else limit


def nats_per_token(
    lm: LoadedModel, sequences: Sequence[tuple[Ids, int]], batch_size: int | None = None
) -> float:
    """Return the mean negative log-likelihood, in nats, of the ids from `start` on of all sequences
    (ids, start), and show a progress bar. batch_size: see log_likelihoods."""
    nats, total = 0.0, sum(len(ids) - start for ids, start in sequences)
    with tqdm(total=total, desc="perplexity", unit="token", unit_scale=True) as bar:
        for score in log_likelihoods(lm, sequences, batch_size):
            ids, start = sequences[score.number]
            nats -= score.nats
            bar.update(len(ids) - start)
    return nats / total
