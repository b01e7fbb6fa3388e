"""generate.py --interactive: a chat in the terminal. Start at ChatMode.run.

A session has the loaded model, the sampling settings and the statistics. The KV cache holds the
tokens of the conversation so far, so that only new ones are computed.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cli.session import Session
from decoding import LoadedModel, reusable_tokens
from engine import complete
from host.memory import available_memory
from layers.args import ModelArgs
from layers.kv_cache import Cache
from options.settings import ModelChoice
from ranks import broadcast_from_rank0
from text import chat
from text.completion import Completion
from text.tokenizer import Tokenizer


class ChatMode:
    """A Mode (session.py) that answers messages from the terminal until the input ends.

    system: the system message, or None. variables: values that the chat template reads.
    """

    def __init__(self, system: str | None, variables: dict[str, Any]):
        self.system, self.variables = system, variables

    def prompt_lengths(self, tokenizer: Tokenizer, args: ModelArgs, new: int) -> list[int]:
        """Returns the length of one prompt that, with its answer of `new` tokens, fills the
        context: the planner of offloading reserves memory for the longest conversation."""
        return [max(1, args.context - 1 - new)]

    def open(self, model: ModelChoice, settings: dict[str, Any]) -> None: ...

    def run(self, session: Session, batch_size: int | None, cache_length: int | None) -> None:
        """Chat with the user until the input ends. All messages share one KV cache.

        cache_length: positions of the cache, at most the model's context; None: as many as fit into
        half of the free memory. batch_size: not used, as there is one conversation.
        """
        lm, config = session.lm, session.config
        positions = min(lm.model.args.context, cache_length or positions_that_fit(lm))
        caches = lm.make_caches(1, positions)
        session.compile(caches)
        length = caches[0].length  # make_caches has rounded the positions up
        reusable = partial(reusable_tokens, lm, caches)
        given = length, config.max_new_tokens, self.system, self.variables, reusable
        conversation = chat.Conversation(lm.tokenizer, *given)
        chat.chat(conversation, answerer(session, conversation, caches))


def positions_that_fit(lm: LoadedModel) -> int:
    """Returns how many positions of a KV cache, of one row, fit into half of the free memory of the
    device of rank 0, so that all ranks make equal caches."""
    half_free = broadcast_from_rank0(lambda: available_memory(lm.device) // 2)
    # Counts the lengths from 0 to the context whose bytes fit; - 1: the longest of these.
    return bisect_right(range(lm.model.args.context + 1), half_free, key=lm.kv_bytes) - 1


def answerer(
    session: Session, conversation: chat.Conversation, caches: Sequence[Cache]
) -> Callable[..., Completion]:
    """Returns the function `answer` that chat.chat calls for each answer.

    caches: of one row, for all answers of the conversation.
    """

    def answer(ids: list[int], cached: int, show: Callable[[int, str], None]) -> Completion:
        """Generate an answer and return its Completion; Ctrl-C ends it early, without an error.

        ids: of the whole conversation. cached: how many of them, from the first on, the caches
        contain already. show: prints a piece of the answer's text.
        """
        (completion,) = complete(
            session.lm,
            [ids],
            session.config,
            # Each answer has a random stream of its own: the number of messages grows.
            streams=[len(conversation.messages)],
            caches=caches,
            past=cached,
            stats=session.stats,
            interruptible=True,
            on_text=show,
        )
        print(flush=True)
        return completion

    return answer
