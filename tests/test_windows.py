"""Layers with a sliding window keep their keys in rings, which here wrap every few tokens.

A ring has SLOTS slots: those of a window and a few more. Texts are many times as long. They are
compared with transformers, and with the same model whose caches keep all positions ("flat").
"""

import copy
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from common import complete_ids, window_slack
from families import CONTEXT, VOCAB, WINDOW
from torch import Tensor

from calibration.distill import log_probabilities
from compiled import CudaGraphs, ReusedCaches
from decoding import MAX_DRAFT_TOKENS, LoadedModel, prefill, reusable_tokens
from draft_length import DraftLengthController
from engine import generate
from evaluation.scoring import log_likelihoods
from finite import explain_not_finite
from host.memory import BLOCK_BYTES
from host.torch_private import compiled_graphs, copy_with_buffers
from layers.args import LayerType, ModelArgs
from layers.kv_cache import CacheFactory, KVCache, Scores, hidden_keys, slots_and_keys
from load import compile_now, load_model
from model import Transformer
from pp import stage_layers
from quant.linear import meta_model
from ranks import Ranks
from speculate import ModelDraft
from tests.ranks_worker import answers
from tests.test_offload import MIXED, some_policy
from tests.test_speculate import steady
from tests.test_tp import on_ranks
from text.chat import Conversation
from text.generation_config import GenerationConfig
from tiers.host_attention import SparseHostAttention
from tiers.kv_cache import TieredCaches
from tiers.policy import Policy, Share
from tiers.prefetch import HostMemory

Folder = Callable[[str], Path]
Dictionary = list[dict[int, tuple[int, int]]]
SEED = 20261201
SLACK = 16  # positions of a ring beyond the window; a verify pass writes as many
SLOTS = WINDOW + SLACK
CPU = torch.device("cpu")
# All layers have windows; five of six; every other one, with a softcap; all but the first.
VARIANTS = ["mistral-window", "gemma3", "gemma2", "qwen2-windows"]
LENGTHS = 1, 5, WINDOW - 1, WINDOW, WINDOW + 1, SLOTS, SLOTS + 1, 5 * SLOTS
GREEDY = GenerationConfig(max_new_tokens=100, temperature=0, ignore_eos=True)
SHORT = dataclasses.replace(GREEDY, max_new_tokens=12)
# Cells that move take long: a few prompts, whose texts all wrap, in three micro-batches. The last
# one is not full; one has rows whose new slots lie more than a block of the store apart.
MOVING = dataclasses.replace(GREEDY, max_new_tokens=SLOTS + 12)
FEW = 1, WINDOW, SLOTS + 1, 5 * SLOTS, 5 * SLOTS + 1


@pytest.fixture(autouse=True)
def small_rings() -> Iterator[None]:
    with window_slack(SLACK):
        yield


def loaded(path: Path, **options: Any) -> LoadedModel:
    return load_model(path, **({"device": "cpu", "dtype": "float32"} | options))


def flat(lm: LoadedModel) -> LoadedModel:
    """The model whose caches keep all positions."""
    model = copy.copy(lm.model)
    model.cache_factory = dataclasses.replace(model.cache_factory, windows=False)
    return LoadedModel(model, model, model, lm.tokenizer)


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    print(f"seed {SEED}")
    return families.prompts_of(SEED, lengths)


@torch.no_grad()
def of_transformers(variant: str, text: list[int]) -> Tensor:
    """The logits after each token of a text, (T, V)."""
    return families.reference(variant)(torch.tensor([text])).logits[0]


# Slots and keys alone, without a model.


class Simulation:
    """Random rows of a ring, with a dictionary for each: slot -> position and number of the token
    that was last written there. A text may replace its last tokens; each token has a number."""

    def __init__(self, draw: random.Random):
        self.draw, self.window = draw, draw.randint(1, 9)
        self.ring = self.window + SLACK
        self.length = draw.randint(3 * self.ring, 5 * self.ring)
        self.held: Dictionary = [{} for _ in range(draw.randint(1, 4))]
        self.texts: list[list[int]] = [[] for _ in self.held]
        self.numbers, self.wrapped = itertools.count(), 0

    def read(self, past: int) -> None:
        """Prefill of all texts from `past` on, in chunks of a random size."""
        lengths = torch.tensor([[len(text)] for text in self.texts])
        end, chunk = int(lengths.max()), self.draw.randint(1, SLACK + 1)
        for start in range(past, end, chunk):
            pos = torch.arange(start, min(start + chunk, end)).expand(len(self.texts), -1)
            self.step(pos, lengths)

    def step(self, pos: Tensor, lengths: Tensor | None = None) -> None:
        """Write the tokens at pos, (B, T), and check what each of them sees."""
        key_pos = torch.arange(self.draw.randint(int(pos.max()) + 1, self.length))
        slot, keys = slots_and_keys(pos, key_pos, self.ring, lengths)
        hidden = hidden_keys(pos, keys, self.window)  # (B, T, S)
        assert not hidden.all(-1).any()
        keys = keys.expand(len(pos), -1)
        for row, text in enumerate(self.texts):
            for p, s in zip(pos[row].tolist(), slot[row].tolist(), strict=True):
                self.held[row][s] = p, text[p] if p < len(text) else -1
            for p, unseen in zip(pos[row].tolist(), hidden[row].tolist(), strict=True):
                if p < len(text):
                    self.check(row, p, [s for s, not_seen in enumerate(unseen) if not not_seen])

    def check(self, row: int, p: int, slots: list[int]) -> None:
        expected = range(max(0, p - self.window + 1), p + 1)
        self.wrapped += p >= self.ring
        assert len(slots) == len(expected)
        assert {self.held[row][s] for s in slots} == {(n, self.texts[row][n]) for n in expected}

    def grow(self, row: int, count: int) -> None:
        self.texts[row] += [next(self.numbers) for _ in range(count)]

    def verify(self, k: int) -> None:
        """One step with k draft tokens, of which some are rejected and replaced."""
        last = [len(text) - 1 for text in self.texts]
        for row in range(len(self.texts)):
            self.grow(row, k)
        pos = torch.tensor(last).unsqueeze(1) + torch.arange(k + 1)  # (B, k + 1)
        self.step(pos)
        for row, n in enumerate(last):
            del self.texts[row][n + 1 + self.draw.randint(0, k) :]
            self.grow(row, 1)

    def go_back(self) -> None:
        """Drop the ends of all texts, as many tokens as rings allow, and read other ones."""
        written = max(map(len, self.texts)) + MAX_DRAFT_TOKENS
        past = self.draw.randint(0, min(map(len, self.texts)) - 1)
        past = past if written - past <= SLACK else 0
        for row, text in enumerate(self.texts):
            del text[past:]
            self.grow(row, self.draw.randint(1, max(1, min(30, self.length - 20 - past))))
        self.read(past)


@pytest.mark.parametrize("number", range(40))
def test_slots_against_a_dictionary(number: int):
    print(f"seed {SEED + number}")
    draw = random.Random(SEED + number)
    run = Simulation(draw)
    for row in range(len(run.texts)):
        run.grow(row, draw.randint(1, run.length - 20))
    run.read(0)
    for _ in range(30):
        if max(map(len, run.texts)) > run.length - 20 or draw.random() < 0.05:
            run.go_back()
        run.verify(draw.choice([0, 0, 1, 5, MAX_DRAFT_TOKENS]))
    assert run.wrapped


def test_more_tokens_than_a_ring_takes_are_refused():
    pos, key_pos = torch.arange(SLACK + 2).unsqueeze(0), torch.arange(SLOTS + 1)
    slots_and_keys(pos[:, 1:], key_pos, SLOTS)
    with pytest.raises(ValueError, match=f"take {SLACK + 1} at a time"):
        slots_and_keys(pos, key_pos, SLOTS)


# Models.


@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_that_wrap_are_those_of_transformers(variant: str, family_folder: Folder):
    given, lm = prompts(), loaded(family_folder(variant))
    assert {c.ring for c in lm.make_caches(1, CONTEXT)} <= {SLOTS, None}
    rows = families.continued(lm, given, 100)
    for prompt, (ids, logits) in zip(given, rows, strict=True):
        expected = of_transformers(variant, prompt + ids)[len(prompt) - 1 : -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert expected.argmax(-1).tolist() == ids
    assert len({tuple(ids) for ids, _ in rows}) == len(rows)


@pytest.mark.parametrize("variant", VARIANTS[:2])
@torch.inference_mode()
def test_prompts_in_chunks_of_every_size(variant: str, family_folder: Folder):
    lm, given = loaded(family_folder(variant)), prompts()
    key_pos = torch.arange(CONTEXT)
    expected = torch.stack([of_transformers(variant, prompt)[-1] for prompt in given])
    for chunk in (1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 25, 100):
        chunked = dataclasses.replace(lm, prefill_chunk_tokens=chunk * len(given))
        caches = lm.make_caches(len(given), CONTEXT)
        logits = prefill(chunked, given, caches, 0, key_pos)[:, 0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def check_rows_that_end(lm: LoadedModel, alone: LoadedModel) -> None:
    """Seven of eight rows end one after another; all have the ids of `alone`, another model."""
    live, given = set(), prompts()
    config = dataclasses.replace(GREEDY, max_new_tokens=2 * SLOTS)
    expected = complete_ids(alone, given, config)
    found: list[list[int]] = [[] for _ in given]
    ends = {5 * n: row for n, row in enumerate((7, 0, 4, 6, 1, 3, 2), 1)}  # step -> row
    for n, step in enumerate(generate(lm, given, config, live=live), 1):
        for row, ids in enumerate(step):
            found[row] += ids
        live.discard(ends.get(n))
    lengths = {row: n for n, row in ends.items()} | {5: config.max_new_tokens}
    for row, ids in enumerate(found):
        assert ids == expected[row][: lengths[row]], row


def test_rows_that_end_leave_the_others_their_rings(family_folder: Folder):
    lm = loaded(family_folder("gemma3"))
    check_rows_that_end(lm, flat(lm))


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_quantised_rings_hold_what_flat_caches_hold(kv_dtype: str, family_folder: Folder):
    """In float64, since in float32 a value between two integers may go to either one."""
    path = family_folder("ministral-layer-types")
    lm = loaded(path, dtype=torch.float64, kv_dtype=kv_dtype)
    (given,) = prompts([5 * SLOTS])
    held = []
    for model in (lm, flat(lm)):
        caches = model.make_caches(1, CONTEXT)
        held.append((complete_ids(model, [given], GREEDY, caches=caches), caches))
    (ids, rings), (expected, flats) = held
    assert ids == expected
    read = torch.arange(len(given) + 99)[-SLOTS:]  # the positions that the rings still have
    for ring, other in zip(rings, flats, strict=True):
        for mine, theirs in zip(ring.buffers(), other.buffers(), strict=True):
            slots = read % ring.ring if ring.ring else read
            assert torch.equal(mine[:, slots], theirs[:, read])


@pytest.mark.parametrize("draft", ["ngram", "self-int8", "self-int4"])
@pytest.mark.parametrize("variant", VARIANTS[:2])
def test_drafts_change_no_token(variant: str, draft: str, family_folder: Folder):
    lm = loaded(family_folder(variant))
    drafted = steady(loaded(family_folder(variant), draft=draft), [MAX_DRAFT_TOKENS, 0, 3, 7])
    config = dataclasses.replace(GREEDY, max_new_tokens=2 * SLOTS)
    assert complete_ids(drafted, prompts(), config) == complete_ids(lm, prompts(), config)
    stats = drafted.draft.controller.stats
    assert 0 < sum(stats.accepted) < sum(stats.drafted)


def with_draft_model(lm: LoadedModel, draft: LoadedModel, ks: list[int]) -> LoadedModel:
    by_model = dataclasses.replace(lm, draft=ModelDraft(DraftLengthController(None), draft))
    return steady(by_model, ks)


@pytest.mark.parametrize("other", ["gemma3", "mistral-window"])
def test_a_draft_model_has_rings_of_its_own(other: str, family_folder: Folder):
    """Rows of unlike lengths, and plain steps between, after which it reads what it missed."""
    lm = loaded(family_folder("gemma3"))
    ks = [MAX_DRAFT_TOKENS, 0, 0, 0, 0, 5, *[0] * 30, 2]
    drafted = with_draft_model(lm, loaded(family_folder(other)), ks)
    assert complete_ids(drafted, prompts(), GREEDY) == complete_ids(lm, prompts(), GREEDY)
    stats = drafted.draft.controller.stats
    assert sum(stats.drafted) > 100
    # A draft model that is the model itself is always right, if its rings are.
    accepted = sum(stats.accepted) / sum(stats.drafted)
    assert accepted > 0.99 if other == "gemma3" else accepted < 0.9


# Texts that go on from what the caches have.


class Letters:
    """A tokenizer with an id for each letter, and no template: a prompt is all messages joined."""

    chat_template, eos_ids = None, ()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 1000 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(1000 + token) for token in ids)


def some_letters(draw: random.Random, count: int) -> str:
    return Letters().decode(draw.randrange(VOCAB) for _ in range(count))


class Chat:
    """A conversation whose every answer is compared with that of new caches. reused: for each turn,
    how many ids the prompt shares with the one before, and how many were not computed again."""

    def __init__(self, lm: LoadedModel, new_tokens: int):
        self.lm, self.caches = lm, lm.make_caches(1, CONTEXT)
        self.config = dataclasses.replace(GREEDY, max_new_tokens=new_tokens)
        self.draw = random.Random(SEED)
        self.reused: list[tuple[int, int]] = []
        system, given = self.letters(10), {"reusable": self.reusable}
        self.talk = Conversation(Letters(), CONTEXT, new_tokens, system, **given)

    def letters(self, count: int) -> str:
        return Letters().decode([self.draw.randrange(VOCAB) for _ in range(count)])

    def reusable(self, shared: int, stored: int, length: int) -> int:
        kept = reusable_tokens(self.lm, self.caches, shared, stored, length)
        self.reused.append((shared, kept))
        return kept

    def drop(self, count: int) -> None:
        """Forget the last letters of what was said."""
        said = "".join(message["content"] for message in self.talk.messages)
        self.talk.messages = [{"role": "user", "content": said[: len(said) - count]}]

    def say(self, count: int) -> None:
        """A message of so many letters, and its answer."""
        ids, held = self.talk.ask(self.letters(count))
        (answer,) = complete_ids(self.lm, [ids], self.config, caches=self.caches, past=held)
        assert [answer] == complete_ids(flat(self.lm), [ids], self.config)
        self.talk.add_answer(ids, answer, Letters().decode(answer))

    def interrupt(self, count: int) -> None:
        """A message whose answer ends while the model has read only a part of it."""
        ids, held = self.talk.ask(self.letters(count))
        complete_ids(self.lm, [ids[: held + 7]], self.config, caches=self.caches, past=held)
        self.talk.add_answer(ids, [], "")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_chat_computes_again_what_its_rings_have_lost(variant: str, family_folder: Folder):
    chat = Chat(loaded(family_folder(variant)), 12)
    for count in (3, 40, 5, 60):
        chat.say(count)
    assert chat.reused[-1][0] > SLOTS and all(shared == kept for shared, kept in chat.reused)
    chat.talk.reset()  # all but the first ten letters are dropped
    chat.say(4)
    assert chat.reused[-1] == (10, 0)
    chat.say(4)
    assert chat.reused[-1][1] > 10
    for _ in range(2):
        chat.say(80)
        chat.talk.reset()
        chat.interrupt(20)  # what had been read before is lost, and the new text is not there
        chat.talk.reset()
        chat.say(20)


@pytest.mark.parametrize("variant", ["llama-dynamic", "llama-longrope", "phi3-longrope"])
def test_a_chat_computes_again_what_has_other_rotations(variant: str, family_folder: Folder):
    """The third message exceeds the trained context. Only Phi 3 goes on from keys beyond it: when
    an answer exceeds the context, it computes all keys again."""
    chat = Chat(loaded(family_folder(variant)), 8)
    for count in (3, 1, 20, 30, 5):
        chat.say(count)
    assert [kept > 0 for _, kept in chat.reused[1:]] == [True, False, *[variant[0] == "p"] * 2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_may_be_shortened_again_and_again(variant: str, family_folder: Folder):
    """By less than a ring has to spare each time, and by more altogether."""
    with window_slack(40):
        chat = Chat(loaded(family_folder(variant)), 1)
        chat.say(190)
        for _ in range(8):
            chat.drop(20)
            chat.say(1)
        kept = [kept for _, kept in chat.reused[1:]]
        assert any(kept) and not all(kept)
        for _ in range(30):
            chat.drop(chat.draw.choice([0, 0, 3, 8, 11, 15]))
            chat.say(chat.draw.randint(1, 15))


def test_a_draft_model_goes_on_from_its_caches(family_folder: Folder):
    """After an answer, after a reset, and when a text becomes shorter again and again: a draft
    model that is the model itself is always right, if its rings are."""
    lm, (text,) = loaded(family_folder("gemma3")), prompts([100])
    drafted = with_draft_model(lm, lm, [5])
    stats = drafted.draft.controller.stats
    with window_slack(30):
        caches = drafted.make_caches(1, CONTEXT)
        for kept in (0, 100, 20, 15, 0, 100, 85, 70, 55, 40):  # tokens of the first text
            # Of one new token none is left to read before the first draft step.
            given = [*text[:kept], *([7] if kept == 20 else [7, 8])] if kept else [*text]
            found = complete_ids(drafted, [given], SHORT, caches=caches)
            assert found == complete_ids(lm, [given], SHORT)
            assert sum(stats.accepted) == sum(stats.drafted)
    assert sum(stats.drafted) > 50


@torch.inference_mode()
def test_a_draft_model_reads_the_token_that_replaced_a_rejected_one(family_folder: Folder):
    lm, (text,) = loaded(family_folder("mistral-window")), prompts([30])
    drafted = with_draft_model(lm, loaded(family_folder("gemma2")), [5])
    caches = drafted.make_caches(1, CONTEXT)
    for (ids,) in itertools.islice(generate(drafted, [text], GREEDY, caches=caches), 6):
        text = [*text, *ids]
    fresh = with_draft_model(lm, drafted.draft.lm, [5])
    for draft in (drafted.draft, fresh.draft):
        draft.start([[*text, 3, 4]], [[*text, 3, 4]], caches, None)
    pairs = zip(drafted.draft._latest.caches, fresh.draft._latest.caches, strict=True)
    seen = torch.arange(len(text) + 1 - WINDOW, len(text) + 1)
    for kept, new in pairs:
        held = seen % (kept.ring or CONTEXT)
        torch.testing.assert_close(kept.k[:, held], new.k[:, held])


@pytest.mark.parametrize(
    "variant, lengths", [("gemma2", (50, 1, 30, 60)), ("llama-dynamic", (10, 15, 20, 40))]
)
def test_the_caller_may_keep_caches(variant: str, lengths: list[int], family_folder: Folder):
    """generate with caches and past: each prompt begins with the last one and its new ids."""
    lm = loaded(family_folder(variant))
    caches, text, past = lm.make_caches(1, CONTEXT), [], 0
    for more in prompts(lengths):
        text += more
        steps = list(generate(lm, [text], SHORT, caches=caches, past=past))
        assert [ids for ((ids,),) in steps] == complete_ids(flat(lm), [text], SHORT)[0]
        text += [ids for ((ids,),) in steps]
        past = len(text) - 1
    assert past > 5 * SLOTS


# Caches on several tiers, whose layers have cells of different sizes.


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_policy_gives_the_logits_of_the_model_in_memory(
    variant: str, number: int, family_folder: Folder, tmp_path: Path
):
    draw = random.Random(f"{SEED} {variant} {number}")
    policy = some_policy(draw, tmp_path)
    cache = policy.cache if policy.cache.device < 100 else Share(0, draw.choice([0, 50, 100]))
    policy = dataclasses.replace(policy, cache=cache, tokens_at_once=draw.choice((7, 512)))
    given = draw.sample(prompts(), draw.randint(policy.micro_batch + 1, len(LENGTHS)))
    print(policy, [len(prompt) for prompt in given])
    # Batches of other sizes round differently. Gemma's embeddings take no float64.
    dtype, atol = (torch.float32, 1e-4) if "gemma" in variant else (torch.float64, 1e-12)
    path = family_folder(variant)
    count = SLOTS + 6  # even the text of one token wraps
    wanted = families.continued(loaded(path, dtype=dtype), given, count)
    found = families.continued(loaded(path, dtype=dtype, policy=policy), given, count)
    for (ids, logits), (wanted_ids, wanted_logits) in zip(found, wanted, strict=True):
        assert ids == wanted_ids
        torch.testing.assert_close(logits, wanted_logits, atol=atol, rtol=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kv_dtype", "cache"),
    [
        ("int8", Share(0, 100)),
        ("int4", Share(30, 30)),
        ("int8", Share(0, 0)),
        ("int4", Share(0, 0)),
    ],
    ids=str,
)
def test_quantised_rings_move(kv_dtype: str, cache: Share, family_folder: Folder, tmp_path: Path):
    """In float64, since in float32 a value between two integers may go to either one."""
    path = family_folder("ministral-layer-types")
    policy = dataclasses.replace(MIXED, cache=cache, directory=tmp_path)
    options = {"dtype": torch.float64, "kv_dtype": kv_dtype}
    wanted = complete_ids(loaded(path, **options), prompts(FEW), MOVING)
    assert complete_ids(loaded(path, policy=policy, **options), prompts(FEW), MOVING) == wanted


@pytest.mark.parametrize("draft", ["ngram", "gemma2"])
def test_drafts_over_moving_rings(draft: str, family_folder: Folder, tmp_path: Path):
    path, ks = family_folder("gemma3"), [MAX_DRAFT_TOKENS, 0, 3, 7]
    policy = dataclasses.replace(MIXED, directory=tmp_path)
    if draft == "ngram":
        drafted = steady(loaded(path, policy=policy, draft=draft), ks)
    else:
        drafted = with_draft_model(loaded(path, policy=policy), loaded(family_folder(draft)), ks)
    wanted = complete_ids(loaded(path), prompts(FEW), MOVING)
    assert complete_ids(drafted, prompts(FEW), MOVING) == wanted
    stats = drafted.draft.controller.stats
    assert sum(stats.accepted) < sum(stats.drafted)


@pytest.mark.parametrize("cache", [Share(0, 100), Share(30, 30), Share(0, 0)], ids=str)
def test_moving_rings_of_rows_that_end(cache: Share, family_folder: Folder, tmp_path: Path):
    """The rows that go on are moved to the front of other cells, some of them more than once."""
    policy = dataclasses.replace(MIXED, cache=cache, micro_batches=4, directory=tmp_path)
    lm = loaded(family_folder("gemma3"), policy=policy)
    check_rows_that_end(lm, loaded(family_folder("gemma3")))


@pytest.mark.parametrize("cache", [Share(0, 100), Share(30, 30), Share(0, 0)], ids=str)
def test_a_chat_goes_on_from_moving_rings(cache: Share, family_folder: Folder, tmp_path: Path):
    policy = Policy(cache=cache, micro_batch=1, directory=tmp_path)
    with window_slack(40):
        chat = Chat(loaded(family_folder("gemma3"), policy=policy), 1)
        assert isinstance(chat.caches, TieredCaches)
        chat.say(150)
        for _ in range(12):
            chat.drop(chat.draw.choice([0, 0, 3, 8, 20, 25]))
            chat.say(chat.draw.randint(1, 15))
        kept = [kept for _, kept in chat.reused[1:]]
        assert any(kept) and not all(kept)
        chat.talk.reset()
        chat.interrupt(20)
        chat.say(20)


def test_compiled_blocks_over_moving_rings(family_folder: Folder, tmp_path: Path):
    with window_slack(72):
        policy = dataclasses.replace(MIXED, directory=tmp_path)
        path, given = family_folder("ministral-tied"), prompts((3, 40))
        config = dataclasses.replace(GREEDY, max_new_tokens=80)  # a ring has 77 slots
        lm = loaded(path, policy=policy, compile=True)
        wanted = complete_ids(loaded(path), given, config)
        assert complete_ids(lm, given, config) == wanted
        graphs = compiled_graphs()
        assert complete_ids(lm, given[::-1], config) == wanted[::-1]
        assert compiled_graphs() == graphs


def test_a_long_text_moves_a_window_of_each_ring(
    family_folder: Folder, monkeypatch: pytest.MonkeyPatch
):
    lm = loaded(family_folder("gemma3"), policy=Policy(cache=Share(0, 100), micro_batch=1))
    read, write, moved = HostMemory.read, HostMemory.write, {"in": 0, "out": 0}

    def counted(move: Callable, way: str) -> Callable:
        def count(store: HostMemory, pieces: Sequence[tuple[int, Tensor]]) -> None:
            moved[way] += sum(len(memory) for _, memory in pieces)
            move(store, pieces)

        return count

    monkeypatch.setattr(HostMemory, "read", counted(read, "in"))
    monkeypatch.setattr(HostMemory, "write", counted(write, "out"))
    (given,), caches = prompts([200]), lm.make_caches(1, CONTEXT)
    cells = [cell for cache in caches for cell in cache.cells]
    allocated = sum(len(cell.store.memory) for cell in cells)
    assert allocated == sum(cell.kind.layout.nbytes for cell in cells)
    steps = generate(lm, [given], SHORT, caches=caches)
    for _ in range(3):
        next(steps)
    before, count = dict(moved), 8
    for _ in range(count):
        next(steps)
    blocks = 2 * BLOCK_BYTES  # by which keys and values are longer than the filled slots
    slot = 2 * 2 * 24 * 4  # bytes of a slot's keys and values
    slots, windows = lm.model.cache_factory.slots, [t.window for t in lm.model.args.layer_types]
    most = sum(slot * slots(215, window) + blocks for window in windows)
    # Threads read ahead for the next step, and write behind the latest one.
    assert 0 < moved["in"] - before["in"] <= (count + 1) * most
    assert 0 < moved["out"] - before["out"] <= (count + 1) * 2 * blocks * len(cells)


# Other uses of the caches.


def test_compiled_tokens_are_eager_tokens_and_a_text_that_wraps_compiles_nothing(
    family_folder: Folder,
):
    with window_slack(72):
        path, given = family_folder("ministral-tied"), prompts((3, 40))
        lm = loaded(path, compile=True)
        caches = lm.make_caches(2, CONTEXT)
        assert {c.ring for c in caches} == {77, None}  # the window is 5
        compile_now(lm, caches)
        graphs = compiled_graphs()
        assert complete_ids(lm, given, GREEDY, caches=caches) == complete_ids(
            loaded(path), given, GREEDY
        )
        assert compiled_graphs() == graphs


def test_a_warm_up_leaves_numbers_in_the_caches(family_folder: Folder):
    eager = loaded(family_folder("gemma2"))
    views = {name: lambda *given: eager.model(*given) for name in ("prefill", "decode")}
    lm = dataclasses.replace(eager, **views)
    caches = lm.make_caches(1, CONTEXT)
    compile_now(lm, caches)
    assert all(cache.k[:, 0].any() and cache.k.isfinite().all() for cache in caches)


@pytest.mark.parametrize("variant", ["gemma3", "phi3-longrope", "llama-dynamic"])
@torch.inference_mode()
def test_whole_texts_are_read_as_one_prompt(variant: str, family_folder: Folder):
    """By training after GPTQ, and layer by layer: beyond the trained context, and more tokens than
    a ring takes."""
    model, (text,) = loaded(family_folder(variant)).model, prompts([100])
    tokens, expected = torch.tensor([text]), of_transformers(variant, text).log_softmax(-1)
    x = model.tok_embeddings(tokens)
    for n, block in enumerate(model.layers):
        x = model.run_layer(n, block, x)
    for found in (log_probabilities(model, tokens), model.unembed(x).log_softmax(-1)):
        torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)


def test_the_search_for_numbers_that_are_not_finite_reads_one_prompt(family_folder: Folder):
    """Rotations of shorter texts may not take part."""
    lm, (text,) = loaded(family_folder("phi3-longrope")), prompts([50])
    lm.model.positions.ropes[0].freqs.fill_(torch.nan)
    said = explain_not_finite(lm, text, lm.make_caches(1, CONTEXT))
    assert "a second pass over the text gives finite ones" in said


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_do_not_depend_on_rings(variant: str, family_folder: Folder):
    lm, texts = loaded(family_folder(variant)), prompts((2, 30, 30, 130, 200))
    texts += [texts[3][:100] + texts[0], texts[3][:60] + texts[1]]  # shared beginnings
    asked = [(text, max(1, len(text) // 3)) for text in texts]
    factory, found = lm.model.cache_factory, []
    for windows in (True, False):
        lm.model.cache_factory = dataclasses.replace(factory, windows=windows)
        found.append(sorted(log_likelihoods(lm, asked)))
        assert lm.model.cache_factory.windows == windows
    assert found[0] == found[1]
    for score, (text, start) in zip(found[0], asked, strict=True):
        log_probs = of_transformers(variant, text)[:-1].log_softmax(-1)
        nats = log_probs[torch.arange(start - 1, len(text) - 1), text[start:]].sum()
        assert score.nats == pytest.approx(float(nats), abs=1e-3)


def test_two_ranks_are_one(family_folder: Folder, tmp_path: Path):
    """In chunks longer than a ring takes. Of gemma2-layer-types the first stage has no rings."""
    how = {"max_new_tokens": SLOTS + 4}
    shared = {"texts": prompts((3, 9, 100)), "how": how, "slack": SLACK}
    names = ["gemma3", "gemma3", "mistral-window", "gemma2-layer-types"]
    cases = [
        shared | {"path": str(family_folder(name)), "pipeline": n % 2 == 1}
        for n, name in enumerate(names)
    ]
    by_rank = on_ranks(2, cases, tmp_path)
    for n, case in enumerate(cases):
        expected = answers(case["path"], None, **shared)["ids"]
        assert [results[n]["ids"] for results in by_rank] == [expected] * 2, names[n]


def test_all_stages_know_of_the_rings_of_one(family_folder: Folder):
    """Else one would read a prompt, or what a chat has lost, in other steps than another."""
    args = loaded(family_folder("gemma2-layer-types")).model.args
    stages = [args.with_layers(stage_layers(args, Ranks(rank, 2))) for rank in range(2)]
    assert [any(layer.window for layer in stage.layer_types) for stage in stages] == [False, True]
    for stage in stages:
        model = meta_model(stage, None)
        assert model.has_rings(SLOTS + 1) and not model.has_rings(SLOTS)


def test_bytes_of_a_model_with_few_layers_without_windows():
    """The shape of Gemma 3 1B, at 32k positions."""
    with window_slack(512):
        full = [n % 6 == 5 for n in range(26)]
        types = tuple(LayerType(window=None if every else 512) for every in full)
        args = ModelArgs(1152, 26, 4, 1, 256, 6912, 1000, 32768, 1152, layer_types=types)
        model = meta_model(args, None)
        caches = model.make_caches(1, 32768)
        one = 2 * 256 * caches[0].k.itemsize  # bytes of a position in a layer
        for cache, every in zip(caches, full, strict=True):
            slots = 32768 if every else 512 + 512
            assert sum(buffer.nbytes for buffer in cache.buffers()) == (slots + 1) * one
        allocated = sum(buffer.nbytes for cache in caches for buffer in cache.buffers())
        assert model.kv_bytes(32768) == allocated - 26 * one == (4 * 32768 + 22 * 1024) * one
        assert 5 < 26 * 32768 * one / allocated < 6
        assert model.kv_bytes(600) == 26 * 600 * one


def test_only_a_window_that_hides_something_needs_its_own_attention():
    def causal(*given: Any) -> None: ...

    def windowed(*given: Any) -> None: ...

    factory = CacheFactory(attention=causal, window_attention=windowed)
    for window, expected in ((None, causal), (20, causal), (19, windowed)):
        made = factory((1, 21, 1, 4), torch.float32, torch.device("cpu"), window)
        assert made.attention is expected


def made(lengths: Sequence[int], windows: bool = True) -> list[KVCache]:
    """Caches of two layers, of which the first is a ring, for each length: at the same address."""
    factory = CacheFactory(windows=windows)
    memory = torch.zeros(2 * 2 * 300 * 4)
    found = []
    for length in lengths:
        caches = [factory((2, length + 1, 1, 4), torch.float32, CPU, w) for w in (WINDOW, None)]
        long = caches[1]
        views = {name: memory[: long.k.numel()].view_as(long.k) for name in ("k", "v")}
        found.append([caches[0].part(slice(0, 2)), copy_with_buffers(long, views)])
    ring = found[0][0]
    return [[ring, long] for _, long in found]


def test_a_cuda_graph_serves_caches_of_its_shapes_alone():
    """The rings of texts of any length have the same shape, and other caches may follow them."""
    short, long = made((100, 200))
    ran = []
    graphs = CudaGraphs(lambda *given: ran.append(given[3]), CPU)
    for caches in (short, long):
        graphs(torch.zeros(2, 1), torch.zeros(2, 1), torch.arange(64), caches)
    assert [caches[1].length for caches in ran] == [100, 200]


def test_caches_that_are_used_again_are_of_the_same_kind():
    args = ModelArgs(8, 1, 1, 1, 8, 8, 10, 500, 8, layer_types=(LayerType(window=WINDOW),))
    with torch.device("meta"):
        model = Transformer(args)
    lm = LoadedModel(model, model, model, None)
    make = ReusedCaches(lambda lm, rows, length: lm.model.make_caches(rows, length))
    assert [c.ring for c in make(lm, 1, 200)] == [SLOTS]
    assert [c.ring for c in make(lm, 1, 100)] == [SLOTS]
    for windows, ring in ((False, None), (False, None), (True, SLOTS)):
        model.cache_factory = dataclasses.replace(model.cache_factory, windows=windows)
        assert [c.ring for c in make(lm, 1, 100)] == [ring]
    assert make(lm, 1, 150)[0].length == 150


def test_the_search_for_what_is_not_finite_reads_no_more_than_rings_take(family_folder: Folder):
    lm = loaded(family_folder("gemma3"))
    (text,) = prompts([5 * SLOTS])
    caches = lm.make_caches(1, CONTEXT)
    assert "a second pass over the text gives finite ones" in explain_not_finite(lm, text, caches)
    lm.model.layers[3].attention.wo.weight.data.fill_(torch.inf)
    assert "layer 3 (counted from 0)" in explain_not_finite(lm, text, caches)


@pytest.mark.parametrize("softcap", [None, 0.3])
def test_sparse_attention_scores_as_exact_attention_does(softcap: float | None):
    """Of the tokens of a window all are read with a share of 1."""
    torch.manual_seed(SEED)
    factory = CacheFactory(scores=Scores(scale=0.7, softcap=softcap))
    exact = factory((2, 30, 2, 8), torch.float32, CPU)
    for buffer in exact.buffers():
        buffer.normal_()
    pos = torch.tensor([[20], [3]])
    hidden = hidden_keys(pos, torch.arange(29), WINDOW)  # (B, 1, S)
    mask = torch.zeros(2, 1, 2, 29).masked_fill(hidden.unsqueeze(1), -torch.inf)
    q, k, v = torch.randn(2, 1, 4, 8), *torch.randn(2, 2, 1, 2, 8)
    found = SparseHostAttention(exact.part(slice(0, 2)), 1.0).attend(q, k, v, mask, pos)
    torch.testing.assert_close(found, exact.attend(q, k, v, mask, pos))
