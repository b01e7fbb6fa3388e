"""Conversations: the template's ids, what the caches hold of them, and what is forgotten."""

import io
import shutil
from pathlib import Path

import pytest
import torch

import chat
from chat import Conversation
from generate import Completion, GenerationConfig, complete
from load import load_model
from tokenizer import Tokenizer, load_tokenizer

DEMO = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat") / "demo"
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder)


def test_ids_are_the_templates(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, limit=400, room=50, system="Be kind.")
    ids, held = conversation.ask("Hello!")
    assert tokenizer.decode(ids) == "[system] Be kind.\n[user] Hello!\n[assistant]"
    assert held == 0
    conversation.answered(ids, tokenizer.encode(" Hi.", bos=False), " Hi.")
    ids, held = conversation.ask("Bye")
    assert tokenizer.decode(ids).endswith("[assistant]  Hi.\n[user] Bye\n[assistant]")
    assert held > 10


def test_a_model_without_template_gets_the_plain_texts():
    conversation = Conversation(load_tokenizer(DEMO), limit=400, room=50)
    ids, _ = conversation.ask("Once upon")
    conversation.answered(ids, [1, 2], " a time")
    ids, _ = conversation.ask(" there")
    assert conversation.tokenizer.decode(ids) == "Once upon a time there"


def test_answers_from_kept_caches_are_those_from_fresh_ones(tokenizer: Tokenizer):
    lm = load_model(DEMO, device="cpu", dtype=torch.float32)
    config = GenerationConfig(max_new_tokens=20, temperature=0, ignore_eos=True)
    conversation = Conversation(tokenizer, limit=400, room=20)
    caches, reused = lm.make_caches(1, 400), []
    for text in ("Once upon a time", "Who was it?", "Why?", "The end"):
        ids, held = conversation.ask(text)
        (kept,) = complete(lm, [ids], config, caches=caches, past=held)
        (fresh,) = complete(lm, [ids], config)
        assert kept.ids == fresh.ids
        conversation.answered(ids, kept.ids, kept.text)
        reused.append(held)
    assert reused[0] == 0 and reused == sorted(set(reused))


def test_the_oldest_exchanges_are_forgotten_and_the_system_message_is_not(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, limit=90, room=10, system="Be kind.")
    for n in range(8):
        ids, _ = conversation.ask(f"Message {n}")
        assert len(ids) + 10 <= 90
        conversation.answered(ids, [5], f" answer {n}")
    text = tokenizer.decode(ids)
    assert text.startswith("[system] Be kind.\n[user] Message")
    assert "Message 7" in text and "Message 0" not in text
    roles = [m["role"] for m in conversation.messages]
    assert roles[1::2] == ["user"] * (len(roles) // 2)


def test_a_message_that_is_too_long_is_refused_and_not_kept(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, limit=60, room=20)
    with pytest.raises(ValueError, match="room for 40"):
        conversation.ask("word " * 100)
    assert conversation.messages == []
    assert conversation.ask("short")[1] == 0


def test_a_message_that_the_template_refuses_is_not_kept(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, limit=400, room=50)
    first, _ = conversation.ask("Hello!")
    conversation.answered(first, [5, 6], " Hi.")
    before, working = [*conversation.messages], tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="no"):
        conversation.ask("What?")
    tokenizer.chat_template = working
    assert conversation.messages == before


def test_an_answer_stopped_before_its_first_token_leaves_nothing_half_read(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, limit=400, room=50)
    ids, _ = conversation.ask("Hello!")
    conversation.answered(ids, tokenizer.encode(" Hi.", bos=False), " Hi.")
    ids, held = conversation.ask("Tell me of the sea.")
    conversation.answered(ids, [], "")  # the caches were being filled from `held` on
    assert conversation.ask("Now?")[1] == held


def test_reset_begins_again(tokenizer: Tokenizer):
    conversation = Conversation(tokenizer, limit=400, room=50, system="Be kind.")
    first, _ = conversation.ask("Hello!")
    conversation.answered(first, [5, 6], " Hi.")
    conversation.reset()
    assert conversation.ask("Hello!")[0] == first


def test_the_loop_answers_until_the_end_of_input(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"One\n\n{'word ' * 300}\n/reset\nTwo\n"))
    conversation, asked = Conversation(tokenizer, limit=100, room=20), []

    def answer(ids: list[int], held: int) -> Completion:
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
