"""generate.py --interactive: a chat in the terminal."""

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
    """Answers messages until the input ends. system: the system message."""

    def __init__(self, system: str | None):
        self.system = system

    def prompt_lengths(self, tokenizer: Tokenizer, args: ModelArgs, new: int) -> list[int]:
        """Returns the length of a prompt that leaves `new` positions of the context."""
        return [args.context - 1 - new]

    def open(self, model: ModelChoice, settings: dict[str, Any]) -> None: ...

    def run(self, session: Session, batch_size: int | None, cache_length: int | None) -> None:
        lm, config = session.lm, session.config
        most = cache_length or positions_that_fit(lm)
        caches = lm.make_caches(1, min(lm.model.args.context, most))
        session.compile(caches)
        length = caches[0].length
        conversation = chat.Conversation(lm.tokenizer, length, config.max_new_tokens, self.system)
        chat.chat(conversation, answerer(session, conversation, caches))


def positions_that_fit(lm: LoadedModel) -> int:
    """Returns the number of positions of a KV cache that takes half of the free memory."""
    half_free = broadcast_from_rank0(lambda: available_memory(lm.device) // 2)
    return half_free // lm.kv_bytes_per_token()


def answerer(
    session: Session, conversation: chat.Conversation, caches: Sequence[Cache]
) -> Callable[..., Completion]:
    """Returns a function that answers a conversation, as chat.chat calls it: with the ids, the
    number of leading ids that the caches have, and a function that shows pieces of text."""

    def answer(ids: list[int], cached: int, show: Callable[[int, str], None]) -> Completion:
        (completion,) = complete(
            session.lm,
            [ids],
            session.config,
            rows=[len(conversation.messages)],  # each answer has its own random stream
            caches=caches,
            past=cached,
            stats=session.stats,
            interruptible=True,
            on_text=show,
        )
        print(flush=True)
        return completion

    return answer
