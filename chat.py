"""A conversation in the terminal: history is kept, and so is what the KV cache holds of it.

Start at `chat`. Conversation turns messages into ids by the model's chat template; a model without
one gets the plain texts, one after the other. What the caches hold is compared with what the next
turn needs, and only the rest is prefilled.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ranks import agreed
from tokenizer import Tokenizer

HELP = "Ctrl-C stops an answer, Ctrl-D or /exit leaves, /reset begins again."


class Conversation:
    """Messages so far, and the ids that the caches hold of them.

    limit: tokens that prompt and answer may have together; room: those kept for an answer.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int, room: int, system: str | None = None):
        self.tokenizer, self.limit, self.room = tokenizer, limit, min(room, limit // 2)
        self.messages = [{"role": "system", "content": system}] if system else []
        self._fixed = len(self.messages)
        self._held: list[int] = []
        self._reused = 0  # how many of those the answer under way builds on

    def ask(self, text: str) -> tuple[list[int], int]:
        """The ids to continue after the user's next message, and how many the caches hold.

        Where the conversation has outgrown the limit its oldest exchanges are forgotten.
        Raises ValueError for a message that is too long by itself, or that the template refuses;
        the conversation is then as before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._ids(messages)
        while len(ids) + self.room > self.limit and len(messages) > self._fixed + 1:
            del messages[self._fixed : self._fixed + 2]
            ids = self._ids(messages)
        if len(ids) + self.room > self.limit:
            raise ValueError(
                f"the message needs {len(ids)} tokens and there is room for "
                f"{self.limit - self.room}: shorten it"
            )
        self.messages = messages
        same = len(os.path.commonprefix([ids, self._held]))
        self._reused = min(same, len(ids) - 1)  # the last token's logits are needed anew
        return ids, self._reused

    def answered(self, asked: Sequence[int], ids: Sequence[int], text: str) -> None:
        """The model said `text`, in `ids`, after `asked`.

        The last id was not fed back to it. Where it was stopped before the first, how far it had
        read is not known: only what was held before is certain.
        """
        self.messages.append({"role": "assistant", "content": text})
        self._held = [*asked, *ids[:-1]] if ids else [*asked[: self._reused]]

    def reset(self) -> None:
        del self.messages[self._fixed :]

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode("".join(m["content"] for m in messages))
        return self.tokenizer.apply_chat_template(messages)


def chat(conversation: Conversation, answer: Callable[[list[int], int], Any]) -> None:
    """Ask, answer, repeat, until end of input.

    answer: takes ids and how many of them the caches hold, prints as it goes and returns a
    Completion, cut short by Ctrl-C or not.
    """
    print(HELP, file=sys.stderr)
    while (text := agreed(read_message)) is not None:
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            continue
        try:
            ids, held = conversation.ask(text)
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        completion = answer(ids, held)
        conversation.answered(ids, completion.ids, completion.text)


def read_message() -> str | None:
    """The next line that says something; None at the end of the input."""
    text = ""
    while not text.strip():
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
    return text
