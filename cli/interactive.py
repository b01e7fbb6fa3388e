"""generate.py --interactive: a chat in the terminal. Start at ChatMode.run."""

from collections.abc import Callable, Sequence
from typing import Any

from cli.session import Session
from decoding import LoadedModel
from engine import complete
from host.memory import available_memory
from model import Cache, ModelArgs
from options.settings import ModelChoice
from ranks import broadcast_from_rank0
from text import chat
from text.completion import Completion
from text.tokenizer import Tokenizer


class ChatMode:
    """A Mode (session.py) that answers messages from the terminal until the input ends.

    system: the system message, or None.
    """

    def __init__(self, system: str | None):
        self.system = system

    def prompt_lengths(self, tokenizer: Tokenizer, args: ModelArgs, new: int) -> list[int]:
        """Returns the length of one prompt that, with its answer, fills the context."""
        return [args.context - 1 - new]

    def open(self, model: ModelChoice, settings: dict[str, Any]) -> None: ...

    def run(self, session: Session, batch_size: int | None, cache_length: int | None) -> None:
        """Chat with the user. All messages share one KV cache, so only new ones are computed.

        cache_length: positions of the cache; None: as many as fit into half of the free memory.
        Never more than the model's context. batch_size: not used, as there is one conversation.
        """
        lm, config = session.lm, session.config
        caches = lm.make_caches(1, min(lm.model.args.context, cache_length or max_cache_length(lm)))
        session.compile(caches)
        length = caches[0].length
        conversation = chat.Conversation(lm.tokenizer, length, config.max_new_tokens, self.system)
        chat.chat(conversation, answerer(session, conversation, caches))


def max_cache_length(lm: LoadedModel) -> int:
    """Returns how many positions of a KV cache, of one row, fit into half of the free memory."""
    half_free = broadcast_from_rank0(lambda: available_memory(lm.device) // 2)
    return half_free // lm.kv_bytes_per_token()


def answerer(
    session: Session, conversation: chat.Conversation, caches: Sequence[Cache]
) -> Callable[..., Completion]:
    """Returns the function that chat.chat calls for each answer, and which returns a Completion.

    Its parameters: ids of the whole conversation; how many of them, from the first on, the caches
    already contain; the function that prints a piece of the answer's text.
    """

    def answer(ids: list[int], cached: int, show: Callable[[int, str], None]) -> Completion:
        """Generate an answer; Ctrl-C ends it early, without an error."""
        (completion,) = complete(
            session.lm,
            [ids],
            session.config,
            rows=[
                len(conversation.messages)
            ],  # the number of the random stream: each answer has its own
            caches=caches,
            past=cached,
            stats=session.stats,
            interruptible=True,
            on_text=show,
        )
        print(flush=True)
        return completion

    return answer
