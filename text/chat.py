"""A conversation in the terminal: history is kept, and so is what the KV cache holds of it.

Start at `chat`. Conversation turns messages into ids by the model's chat template; a model without
one gets the plain texts, one after the other. What the caches hold is compared with what the next
turn needs, and only the rest is prefilled. prompt_ids does the same for one prompt of a batch.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from host.log import log
from ranks import broadcast_from_rank0
from text.chat_template import check_messages
from text.terminal import Messages
from text.tokenizer import Tokenizer

HELP = "Ctrl-C stops an answer, Ctrl-D or /exit leaves, /reset begins again, /help lists commands."
COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation and begin again",
    "/exit": "leave, as Ctrl-D does",
}


class Conversation:
    """Messages so far, and the ids that the caches hold of them.

    limit: tokens that prompt and answer may have together; room: those kept for an answer.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, max_new_tokens: int, system: str | None = None):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.reserved = min(max_new_tokens, max_length // 2)
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
        while len(ids) + self.reserved > self.max_length and len(messages) > self._fixed + 1:
            del messages[self._fixed : self._fixed + 2]
            ids = self._ids(messages)
        if len(ids) + self.reserved > self.max_length:
            raise ValueError(
                f"the message needs {len(ids)} tokens and there is room for "
                f"{self.max_length - self.reserved}: shorten it"
            )
        self.messages = messages
        same = len(os.path.commonprefix([ids, self._held]))
        self._reused = min(same, len(ids) - 1)  # the last token's logits are needed anew
        return ids, self._reused

    def add_answer(self, asked: Sequence[int], ids: Sequence[int], text: str) -> None:
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


def chat(conversation: Conversation, answer: Callable[..., Any]) -> None:
    """Ask, answer, repeat, until end of input.

    answer: takes ids, how many of them the caches hold and what shows a row's text as it comes
    (which raises KeyboardInterrupt to end the answer); returns a Completion, whole or cut short.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    messages = Messages(launched)
    if launched:  # a signal, unlike the key, means that torchrun is about to end all processes
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    watched = broadcast_from_rank0(lambda: messages.keeps_ctrl_c)
    log(HELP)
    with messages.opened():
        while (text := broadcast_from_rank0(messages.read)) is not None:
            command = command_in(text)
            if command == "/exit":
                return
            if command:
                obey(command, conversation)
                continue
            try:
                ids, held = conversation.ask(text)
            except ValueError as error:
                print(error, file=sys.stderr)
                continue
            with messages.stoppable() as stopped:

                def show(row: int, piece: str, stopped: Callable[[], bool] = stopped) -> None:
                    print(piece, end="", flush=True)
                    if watched and broadcast_from_rank0(stopped):  # on all ranks at the same token
                        raise KeyboardInterrupt

                completion = answer(ids, held, show)
            conversation.add_answer(ids, completion.ids, completion.text)


def command_in(text: str) -> str | None:
    """The command that a message is: /word, but not /a/path."""
    found = re.match(r"\s*(/\w*)(?!\S)", text)
    return found and found[1]


def obey(command: str, conversation: Conversation) -> None:
    if command == "/reset":
        conversation.reset()
        return
    if command not in COMMANDS:
        print(f"{command} is not a command; these are:", file=sys.stderr)
    for name, text in COMMANDS.items():
        print(f"  {name:8}{text}", file=sys.stderr)


def prompt_ids(tokenizer: Tokenizer, prompt: Any, system: str | None = None) -> list[int]:
    """The ids of a prompt by the chat template, up to where the answer begins.

    prompt: the text of a user's message, or a list of messages as check_messages takes it. system:
    a first message for a conversation that does not begin with one of that role.
    Raises ValueError for messages of another form, and what apply_chat_template raises.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    check_messages(messages)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.apply_chat_template(messages)


def template_hint(tokenizer: Tokenizer) -> str | None:
    """A line for who gives a plain prompt to a model that has a chat template."""
    if tokenizer.chat_template is None:
        return None
    return (
        "this model has a chat template: --chat applies it to the prompt, --interactive holds a "
        "conversation"
    )
