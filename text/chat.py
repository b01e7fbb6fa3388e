"""A conversation in the terminal that reuses the KV cache from turn to turn.

Start at `chat`. Conversation turns messages into ids with the model's chat template; without a
template it joins the plain texts. The ids of a turn are compared with those in the KV cache, and
only the ids after the common prefix are prefilled. prompt_ids applies the template to one prompt of
a batch.
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
    """The messages of a conversation, and the ids that the KV cache has of them.

    max_length: the tokens of prompt and answer together. max_new_tokens: the tokens that are
    reserved for an answer, at most half of max_length.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, max_new_tokens: int, system: str | None = None
    ):
        self.tokenizer = tokenizer
        self.max_prompt = max_length - min(max_new_tokens, max_length // 2)
        self.messages = [{"role": "system", "content": system}] if system else []
        self._system_messages = len(self.messages)
        self._cached: list[int] = []
        self._reused = 0  # the leading ids of _cached that the current answer is based on

    def ask(self, text: str) -> tuple[list[int], int]:
        """Add a user's message; return the ids of the prompt, and how many the KV cache has.

        The oldest exchanges are dropped if the prompt is too long. Raises ValueError for a message
        that is too long by itself, or that the template rejects; it is then not added.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._ids(messages)
        while len(ids) > self.max_prompt and len(messages) > self._system_messages + 1:
            del messages[self._system_messages : self._system_messages + 2]
            ids = self._ids(messages)
        if len(ids) > self.max_prompt:
            raise ValueError(
                f"the message needs {len(ids)} tokens and there is room for {self.max_prompt}: "
                "shorten it"
            )
        self.messages = messages
        common = len(os.path.commonprefix([ids, self._cached]))
        self._reused = min(common, len(ids) - 1)  # prefill must compute the last token's logits
        return ids, self._reused

    def add_answer(self, prompt: Sequence[int], ids: Sequence[int], text: str) -> None:
        """Add the model's answer `text`, with its ids, to the prompt that `ask` returned.

        The KV cache lacks the last id, which was not fed back. If the answer has no ids, it was
        interrupted during prefill: only the reused ids are certainly in the cache.
        """
        self.messages.append({"role": "assistant", "content": text})
        self._cached = [*prompt, *ids[:-1]] if ids else [*prompt[: self._reused]]

    def reset(self) -> None:
        """Remove all messages but the system message."""
        del self.messages[self._system_messages :]

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode("".join(m["content"] for m in messages))
        return self.tokenizer.apply_chat_template(messages)


def chat(conversation: Conversation, answer: Callable[..., Any]) -> None:
    """Read a message, print the answer, and repeat until the end of the input or /exit.

    answer: called with the ids of the prompt, how many of them the KV cache has, and a function
    show(row, text) that prints the text as it is generated and raises KeyboardInterrupt if the user
    stops the answer; it returns a Completion, which may be interrupted.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    messages = Messages(under_torchrun)
    if under_torchrun:  # Ctrl-C is a byte then, and a SIGINT means that torchrun ends
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    polls = broadcast_from_rank0(lambda: messages.polls_ctrl_c)
    log(HELP)
    with messages.opened():
        while (text := broadcast_from_rank0(messages.read)) is not None:
            command = command_in(text)
            if command == "/exit":
                return
            if command:
                run_command(command, conversation)
                continue
            with messages.stoppable() as stopped:
                take_turn(conversation, text, answer, stopped if polls else None)


def take_turn(
    conversation: Conversation,
    text: str,
    answer: Callable[..., Any],
    stopped: Callable[[], bool] | None,
) -> None:
    """Answer one message, or print why it cannot be answered. stopped: see printer."""
    try:
        ids, cached = conversation.ask(text)
    except ValueError as error:
        print(error, file=sys.stderr)
        return
    completion = answer(ids, cached, printer(stopped))
    conversation.add_answer(ids, completion.ids, completion.text)


def printer(stopped: Callable[[], bool] | None) -> Callable[[int, str], None]:
    """Return a function that prints a row's text, and raises KeyboardInterrupt if `stopped`, which
    rank 0 calls, returns True: all ranks then stop at the same token."""

    def show(row: int, text: str) -> None:
        print(text, end="", flush=True)
        if stopped and broadcast_from_rank0(stopped):
            raise KeyboardInterrupt

    return show


def command_in(text: str) -> str | None:
    """Return the command that a message begins with: /word, but not /a/path."""
    found = re.match(r"\s*(/\w*)(?!\S)", text)
    return found and found[1]


def run_command(command: str, conversation: Conversation) -> None:
    """Run /reset, or print the list of commands."""
    if command == "/reset":
        conversation.reset()
        return
    if command not in COMMANDS:
        print(f"{command} is not a command; these are:", file=sys.stderr)
    for name, text in COMMANDS.items():
        print(f"  {name:8}{text}", file=sys.stderr)


def prompt_ids(tokenizer: Tokenizer, prompt: Any, system: str | None = None) -> list[int]:
    """Return the ids of a prompt in the chat template, up to the beginning of the answer.

    prompt: the text of a user's message, or a list of messages, see check_messages. system: the
    system message for a conversation that has none.
    Raises ValueError for malformed messages, and what apply_chat_template raises.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    check_messages(messages)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.apply_chat_template(messages)


def template_hint(tokenizer: Tokenizer) -> str | None:
    """Return the hint for a plain prompt if the model has a chat template, else None."""
    if tokenizer.chat_template is None:
        return None
    return (
        "this model has a chat template: --chat applies it to the prompt, --interactive holds a "
        "conversation"
    )
