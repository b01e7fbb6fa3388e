"""Conversations: the template's ids, what the caches hold of them, and what is forgotten."""

import io
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from common import DEMO, ROOT

from engine import complete
from load import load_model
from text import chat
from text.chat import Conversation
from text.completion import Completion
from text.generation_config import GenerationConfig
from text.tokenizer import Tokenizer, load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ end or '' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat") / "demo"
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder)


def test_ids_are_the_templates(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, max_length=400, max_new_tokens=50, system="Be kind.")
    ids, held = conversation.ask("Hello!")
    variables = {"end": "!"}
    other = Conversation(tokenizer, 400, 50, "Be kind.", variables).ask("Hello!")[0]
    assert tokenizer.decode(other) == tokenizer.decode(ids) + "!"
    assert tokenizer.decode(ids) == "[system] Be kind.\n[user] Hello!\n[assistant]"
    assert held == 0
    conversation.add_answer(ids, tokenizer.encode(" Hi.", bos=False), " Hi.")
    ids, held = conversation.ask("Bye")
    assert tokenizer.decode(ids).endswith("[assistant]  Hi.\n[user] Bye\n[assistant]")
    assert held > 10


def test_a_model_without_template_gets_the_plain_texts():
    conversation = Conversation(load_tokenizer(DEMO), max_length=400, max_new_tokens=50)
    ids, _ = conversation.ask("Once upon")
    conversation.add_answer(ids, [1, 2], " a time")
    ids, _ = conversation.ask(" there")
    assert conversation.tokenizer.decode(ids) == "Once upon a time there"


def test_answers_from_kept_caches_are_those_from_fresh_ones(tokenizer: Tokenizer):
    lm = load_model(DEMO, device="cpu", dtype=torch.float32)
    config = GenerationConfig(max_new_tokens=20, temperature=0, ignore_eos=True)
    conversation = Conversation(tokenizer, max_length=400, max_new_tokens=20)
    caches, reused = lm.make_caches(1, 400), []
    for text in ("Once upon a time", "Who was it?", "Why?", "The end"):
        ids, held = conversation.ask(text)
        (kept,) = complete(lm, [ids], config, caches=caches, past=held)
        (fresh,) = complete(lm, [ids], config)
        assert kept.ids == fresh.ids
        conversation.add_answer(ids, kept.ids, kept.text)
        reused.append(held)
    assert reused[0] == 0 and reused == sorted(set(reused))


def test_the_oldest_exchanges_are_forgotten_and_the_system_message_is_not(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, max_length=90, max_new_tokens=10, system="Be kind.")
    for n in range(8):
        ids, _ = conversation.ask(f"Message {n}")
        assert len(ids) + 10 <= 90
        conversation.add_answer(ids, [5], f" answer {n}")
    text = tokenizer.decode(ids)
    assert text.startswith("[system] Be kind.\n[user] Message")
    assert "Message 7" in text and "Message 0" not in text
    roles = [m["role"] for m in conversation.messages]
    assert roles[1::2] == ["user"] * (len(roles) // 2)


def test_a_message_that_is_too_long_is_refused_and_not_kept(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, max_length=60, max_new_tokens=20)
    with pytest.raises(ValueError, match="room for 40"):
        conversation.ask("word " * 100)
    assert conversation.messages == []
    assert conversation.ask("short")[1] == 0


def test_a_message_that_the_template_refuses_is_not_kept(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, max_length=400, max_new_tokens=50)
    first, _ = conversation.ask("Hello!")
    conversation.add_answer(first, [5, 6], " Hi.")
    before, working = [*conversation.messages], tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="no"):
        conversation.ask("What?")
    tokenizer.chat_template = working
    assert conversation.messages == before


def test_an_answer_stopped_before_its_first_token_leaves_nothing_half_read(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, max_length=400, max_new_tokens=50)
    ids, _ = conversation.ask("Hello!")
    conversation.add_answer(ids, tokenizer.encode(" Hi.", bos=False), " Hi.")
    ids, held = conversation.ask("Tell me of the sea.")
    conversation.add_answer(ids, [], "")  # the caches were being filled from `held` on
    assert conversation.ask("Now?")[1] == held


def test_reset_begins_again(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, max_length=400, max_new_tokens=50, system="Be kind.")
    first, _ = conversation.ask("Hello!")
    conversation.add_answer(first, [5, 6], " Hi.")
    conversation.reset()
    assert conversation.ask("Hello!")[0] == first


def test_the_loop_answers_until_the_end_of_input(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"One\n\n{'word ' * 300}\n/reset\nTwo\n"))
    conversation, asked = Conversation(tokenizer, max_length=100, max_new_tokens=20), []

    def answer(ids: list[int], held: int, show: Callable) -> Completion:
        asked.append(tokenizer.decode(ids))
        completion = Completion(tokenizer, ids, GenerationConfig())
        completion.extend(tokenizer.encode("said", bos=False))
        return completion

    chat.chat(conversation, answer)
    assert asked == ["[user] One\n[assistant]", "[user] Two\n[assistant]"]
    assert "shorten it" in capsys.readouterr().err
    assert conversation.messages[-1]["content"] == "said"


def test_an_interrupted_answer_keeps_what_was_said():
    lm = load_model(DEMO, device="cpu", dtype=torch.float32)
    config = GenerationConfig(max_new_tokens=40, temperature=0)
    (whole,) = complete(lm, [[0, 5]], config)
    pieces = []

    def interrupt(row: int, text: str) -> None:
        pieces.append(text)
        if len(pieces) == 5:
            raise KeyboardInterrupt

    (part,) = complete(lm, [[0, 5]], config, on_text=interrupt, interruptible=True)
    assert part.text == "".join(pieces) and whole.text.startswith(part.text)
    with pytest.raises(KeyboardInterrupt):
        pieces.clear()
        complete(lm, [[0, 5]], config, on_text=interrupt)


# ---- at a terminal ------------------------------------------------------------------------------

# Answers with what the message was: its length, lines and first word.
ECHO = """
import sys
if "no readline" in sys.argv:
    sys.modules["readline"] = None
sys.path.insert(0, {root!r})
from text import chat
from text.tokenizer import load_tokenizer

class Answer:
    ids, text = [5], " said"

def answer(ids, held, show):
    asked = conversation.messages[-1]["content"]
    count = len(conversation.messages)
    show(0, f"<{{len(asked)}} {{asked.count(chr(10))}} {{asked.split()[0][:9]}} #{{count}}>")
    return Answer()

conversation = chat.Conversation(load_tokenizer({demo!r}), max_length=10**6, max_new_tokens=20)
chat.chat(conversation, answer)
print("left", flush=True)
"""


class Terminal:
    """A program that runs in a terminal of its own."""

    def __init__(self, command: list[str]):
        self._fd, self._theirs = os.openpty()
        # The first terminal that a new session's leader opens becomes its controlling one.
        shell = ["/bin/sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self._theirs)]
        env = os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*shell, *command], start_new_session=True, env=env)
        self.seen = ""

    def expect(self, text: str) -> str:
        """What is shown up to this text and with it; nothing of it is looked at again."""
        end = time.monotonic() + 100
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0 and select.select([self._fd], [], [], left)[0], self.seen[-2000:]
            self.seen += os.read(self._fd, 1 << 16).decode(errors="replace")
        shown, found, self.seen = self.seen.partition(text)
        return shown + found

    def send(self, text: str) -> None:
        rest = text.encode()
        while rest:  # what the program echoes must be read, or it waits
            readable, writable, _ = select.select([self._fd], [self._fd], [], 100)
            assert readable or writable
            if readable:
                self.seen += os.read(self._fd, 1 << 16).decode(errors="replace")
            if writable:
                rest = rest[os.write(self._fd, rest[:500]) :]

    def say(self, text: str, answer: str) -> str:
        self.expect("> ")
        self.send(text)
        return self.expect(answer)

    def press(self, key: str, seen: str) -> None:
        """Again after a while: Python can miss a signal that comes just before it waits."""
        self.send(key)
        while seen not in self.seen:
            if select.select([self._fd], [], [], 3)[0]:
                self.seen += os.read(self._fd, 1 << 16).decode(errors="replace")
            else:
                self.send(key)
        self.expect(seen)

    def close(self) -> int:
        code = self.process.wait(100)
        os.close(self._fd)
        os.close(self._theirs)
        return code


def echoing(*how: str) -> Terminal:
    script = ECHO.format(root=str(ROOT), demo=str(DEMO))
    return Terminal([sys.executable, "-c", script, *how])


def test_at_a_terminal():
    terminal = echoing()
    terminal.say("Hello\r", "<5 0 Hello #1>")
    terminal.say("\x1b[200~one\rtwo\n\nfour\x1b[201~\r", "<13 3 one #3>")
    terminal.say("word" * 2000 + "\r", "<8000 0 wordwordw #5>")
    terminal.say("half", "half")
    terminal.press("\x03", "leaves)")
    terminal.say("Still there?\r", "<12 0 Still #7>")
    terminal.say("/help\r", "/reset")
    assert "/exit" in terminal.say("/hlep me\r", "/exit ") and "<" not in terminal.seen
    terminal.say("/usr/bin is what?\r", "<17 0 /usr/bin #9>")
    terminal.say("\x1b[A\x1b[A\x1b[A\x1b[A\r", "<12 0 Still #11>")
    terminal.say("  \r", "> ")
    terminal.send("\x04")
    terminal.expect("left")
    assert terminal.close() == 0


def test_at_a_terminal_without_readline():
    terminal = echoing("no readline")
    terminal.say("one\ntwo\nthree\n", "<13 2 one #1>")
    terminal.say("/exit\n", "left")
    assert terminal.close() == 0


def test_ctrl_c_under_torchrun_stops_the_answer_on_all_ranks_and_nothing_else():
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--temperature", "0", "--ignore_eos", "--max_new_tokens", "480", "--device", "cpu"]
    chat = [str(ROOT / "generate.py"), "--interactive", "--checkpoint_path", str(DEMO), *options]
    terminal = Terminal([sys.executable, *launch, *chat])
    terminal.say("Once upon a time\r", " was ")
    terminal.send("\x03")
    assert len(terminal.expect("> ")) < 800  # of 1,700 characters
    terminal.send("\x03/exit\r")
    terminal.expect("loaded in")
    assert terminal.close() == 0


def test_from_a_pipe_each_line_is_a_message_and_bad_bytes_do_not_end_it():
    script = ECHO.format(root=str(ROOT), demo=str(DEMO))
    given = b"caf\xe9\n\n/nothing\nHello\r\nlast"
    done = subprocess.run(
        [sys.executable, "-c", script], input=given, capture_output=True, check=True
    )
    shown = done.stdout.decode()
    assert shown == "<4 0 caf\ufffd #1><5 0 Hello #3><4 0 last #5>left\n"
    assert b"/nothing is not a command" in done.stderr


def test_a_models_own_switches_and_paths_are_no_commands():
    for text in ("/no_think What is 2 + 2?", " /think", "/etc/hosts", "a /help"):
        assert chat.command_in(text) is None
    for text in ("/help", " /exit now", "/no_thinking", "/"):
        assert chat.command_in(text) == text.split()[0]


def test_a_closed_stdin_is_one_line(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="stdin, which is closed"):
        chat.chat(Conversation(tokenizer, max_length=100, max_new_tokens=20), lambda *given: None)


# ---- prompts of a batch -------------------------------------------------------------------------


def test_a_prompt_by_the_template(tokenizer: Tokenizer):
    def text(*given):
        return tokenizer.decode(chat.prompt_ids(tokenizer, *given))

    assert text("Hi") == "[user] Hi\n[assistant]"
    assert text("Hi", "Be kind.") == "[system] Be kind.\n[user] Hi\n[assistant]"
    assert text("Hi", None, {"end": "!"}) == "[user] Hi\n[assistant]!"
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": role[0]} for role in roles]
    expected = "[system] s\n[user] u\n[assistant] a\n[user] u\n[assistant]"
    assert text(messages, "not this one") == text(messages) == expected


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ([], "a list of messages"),
        ({"role": "user", "content": "a"}, "a list of messages"),
        (None, "a list of messages"),
        (["Hi"], "message 1 of 1 is a str"),
        (
            [{"role": "user", "content": "a"}, {"content": "b"}],
            'message 2 of 2: its "role" is miss',
        ),
        ([{"role": "user", "content": 5}], '"content" is int'),
        ([{"role": None, "content": "a"}], '"role" is NoneType'),
    ],
)
def test_what_is_no_conversation_is_said(tokenizer: Tokenizer, messages: object, wrong: str):
    with pytest.raises(ValueError, match=wrong):
        chat.prompt_ids(tokenizer, messages)


def test_who_has_a_template_is_told_of_chat(tokenizer: Tokenizer):
    assert "--chat" in chat.template_hint(tokenizer)
    assert chat.template_hint(load_tokenizer(DEMO)) is None
