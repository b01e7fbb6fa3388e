"""A conversation in the terminal that reuses the KV cache from turn to turn.

Start at `chat`. Conversation turns messages into ids with the model's chat template; without a
template it joins the plain texts. The ids of a turn are compared with those in the KV cache, and
only the ids after the common prefix are prefilled. prompt_ids applies the template to one prompt of
a batch.

Words: a turn is a user's message and the model's answer; prefill is the reading of a prompt by the
model, which fills the KV cache; a rank is a process of torchrun.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
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
MODEL_SWITCHES = "/think", "/no_think"  # Qwen3 and SmolLM3 read them in a message


class Conversation:
    """The messages of a conversation, and the ids whose keys and values are in the KV cache.

    For each turn, call `ask`, let the model generate, and call `add_answer`.

    max_length: the limit on the tokens of prompt and answer together. max_new_tokens: the tokens
    that are reserved for an answer, at most half of max_length. system: the text of a system
    message, or None. variables: values that the chat template reads, see Tokenizer.chat_text.
    reusable: decoding.reusable_tokens for the model and its KV cache. It takes three numbers: how
    many ids at the beginning of a prompt are in the KV cache, how many ids the KV cache has had at
    most since a prompt was computed completely, and how many ids the prompt has. It returns how
    many of the first ids need not be computed again.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        max_new_tokens: int,
        system: str | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
        reusable: Callable[[int, int, int], int] = lambda shared, stored, length: shared,
    ):
        """Begin a conversation without messages but the system message; the KV cache is empty."""
        self.tokenizer, self.variables = tokenizer, variables
        self.max_prompt = max_length - min(max_new_tokens, max_length // 2)
        self.messages = [{"role": "system", "content": system}] if system else []
        self._system_messages = len(self.messages)
        self._reusable = reusable
        self._cached: list[int] = []  # the ids whose keys and values are in the KV cache
        # The most ids that the KV cache has had since a prompt was computed without reused ids.
        self._stored = 0
        self._reused = 0  # how many ids at the beginning of _cached the current turn reuses

    def ask(self, text: str) -> tuple[list[int], int]:
        """Add a user's message. Return the ids of the whole prompt, and how many ids at its
        beginning prefill need not compute, because they are in the KV cache already.

        If the prompt is too long, the oldest user's messages are dropped with their answers. Raises
        ValueError for a message that is too long even without all earlier ones, or that the
        template rejects; then the conversation does not change.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._ids(messages)
        while len(ids) > self.max_prompt and len(messages) > self._system_messages + 1:
            # the oldest user's message and its answer
            del messages[self._system_messages : self._system_messages + 2]
            ids = self._ids(messages)
        if len(ids) > self.max_prompt:
            raise ValueError(
                f"the message needs {len(ids)} tokens and there is room for {self.max_prompt}: "
                "shorten it"
            )
        self.messages = messages
        common = len(os.path.commonprefix([ids, self._cached]))
        # Prefill must read one id at least, the last one: the answer begins with its logits.
        self._reused = self._reusable(min(common, len(ids) - 1), self._stored, len(ids))
        return ids, self._reused

    def add_answer(self, prompt: Sequence[int], ids: Sequence[int], text: str) -> None:
        """Add the model's answer, `text`, and record which ids the KV cache has now.

        prompt: the ids that `ask` returned. ids: the new ids. The last of them is not in the KV
        cache, because the model did not read it. Without new ids the answer was interrupted during
        prefill, and only the reused ids of the prompt are certain to be in the cache.
        """
        self.messages.append({"role": "assistant", "content": text})
        self._cached = [*prompt, *ids[:-1]] if ids else [*prompt[: self._reused]]
        # Without reused ids the prompt was computed completely, so that earlier ids do not count.
        before = self._stored if self._reused else 0
        self._stored = max(before, len(prompt), len(self._cached))

    def reset(self) -> None:
        """Remove all messages but the system message. The KV cache keeps its ids, so the next
        prompt can still reuse those of the system message."""
        del self.messages[self._system_messages :]

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the ids of the messages in the chat template or, without a template, the ids of
        their joined texts."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode("".join(m["content"] for m in messages))
        return self.tokenizer.apply_chat_template(messages, **self.variables)


def chat(conversation: Conversation, answer: Callable[..., Any]) -> None:
    """Read a message, print the answer, and repeat until the end of the input or /exit.

    answer(ids, cached, show) generates an answer and returns its Completion. ids: the prompt;
    cached: how many ids at its beginning need not be computed; show(row, text): prints new text of
    a row, of which a chat has one, and raises KeyboardInterrupt if the user stops the answer.
    `answer` must catch this exception, and return the Completion as it is then. ChatMode.run
    (cli/interactive.py) calls `chat`. Under torchrun all ranks call `chat`; rank 0 reads the
    messages and broadcasts them.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    messages = Messages(under_torchrun)
    if under_torchrun:
        # Ctrl-C arrives as a byte (see Messages). A SIGINT comes from torchrun, which has received
        # one itself and ends all ranks with it. 130: a shell's code for SIGINT.
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    # Whether `stopped` below must be polled. Only rank 0 has the keyboard, so its value counts.
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
            try:
                ids, cached = conversation.ask(text)
            except ValueError as error:
                print(error, file=sys.stderr)
                continue
            with messages.stoppable() as stopped:
                completion = answer(ids, cached, printer(stopped if polls else None))
            conversation.add_answer(ids, completion.ids, completion.text)


def printer(stopped: Callable[[], bool] | None) -> Callable[[int, str], None]:
    """Return the function show(row, text) of `chat`, which prints new text of an answer.

    stopped: returns whether the user has pressed Ctrl-C. Only rank 0 calls it, and broadcasts the
    result, so that all ranks raise KeyboardInterrupt at the same token. None: Ctrl-C raises
    KeyboardInterrupt itself, and nothing is polled.
    """

    def show(row: int, text: str) -> None:
        print(text, end="", flush=True)
        if stopped and broadcast_from_rank0(stopped):
            raise KeyboardInterrupt

    return show


def command_in(text: str) -> str | None:
    """Return the command, such as "/help", with which a message begins, or None. Whitespace or the
    end of the message must follow it, so that a path, /a/b, is no command. MODEL_SWITCHES are no
    commands either."""
    match = re.match(r"\s*(/\w*)(?!\S)", text)
    return match[1] if match and match[1] not in MODEL_SWITCHES else None


def run_command(command: str, conversation: Conversation) -> None:
    """Run /reset on the conversation; for /help and unknown commands print the list of commands.
    command: as command_in returns it. `chat` handles /exit itself."""
    if command == "/reset":
        conversation.reset()
        return
    if command not in COMMANDS:
        print(f"{command} is not a command; these are:", file=sys.stderr)
    for name, text in COMMANDS.items():
        print(f"  {name:8}{text}", file=sys.stderr)


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: Any,
    system: str | None = None,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> list[int]:
    """Return the ids of a prompt in the chat template, up to the beginning of the model's answer.

    prompt: the text of a user's message, or a list of messages (see check_messages). system: the
    text of a system message; it is added unless the first message is a system message. variables:
    values that the chat template reads, see Tokenizer.chat_text. Raises ValueError for malformed
    messages, without a template, or if the template rejects the messages.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    check_messages(messages)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.apply_chat_template(messages, **variables)


def template_hint(tokenizer: Tokenizer) -> str | None:
    """Return a hint that the model has a chat template, which the user of a plain prompt may have
    forgotten; None if it has no template."""
    if tokenizer.chat_template is None:
        return None
    return (
        "this model has a chat template: --chat applies it to the prompt, --interactive holds a "
        "conversation"
    )
