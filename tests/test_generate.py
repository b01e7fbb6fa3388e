"""Generation: against transformers, compiled against eager, rows of a batch against single runs."""

import dataclasses
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from common import ROOT, hugging_face_model
from common import complete_ids as ids

import decoding
from decoding import LoadedModel, launch_ahead
from engine import complete, generate
from host.torch_private import compiled_graphs
from layers.kv_cache import visible_length
from load import load_model, random_model
from text.completion import Completion
from text.generation_config import GenerationConfig

DEMOS = ("demo", "demo-opt")
TEXTS = (
    "Once upon a time",
    "Lily",
    # Comes to 64 positions, where more become visible, within few new tokens.
    f"Tim and his dog saw a big red ball. They wanted to play with it. The ball was {'very ' * 24}",
    "One day, a little",
)
# From torch 2.13 on compiled code rounds where eager code does; in 2.11 not everywhere.
SAME_BITS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
GREEDY = GenerationConfig(max_new_tokens=30, temperature=0, ignore_eos=True)
SAMPLED = dataclasses.replace(GREEDY, temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=3)


def demo(name: str, **options) -> LoadedModel:
    return load_model(ROOT / "checkpoints" / name, device="cpu", **options)


@pytest.fixture(scope="module", params=DEMOS)
def eager(request: pytest.FixtureRequest) -> LoadedModel:
    return demo(request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def free(eager: LoadedModel) -> list[Completion]:
    """What nothing ends but the number of tokens."""
    return complete(eager, prompts(eager), GREEDY)


@pytest.fixture(scope="module", params=DEMOS)
def both(request: pytest.FixtureRequest) -> tuple[LoadedModel, LoadedModel]:
    """The same model, eager and compiled, prefill too."""
    options = {"dtype": torch.bfloat16 if SAME_BITS else torch.float32}
    compiled = demo(request.param, compile=True, compile_prefill=True, **options)
    return demo(request.param, **options), compiled


def prompts(lm: LoadedModel) -> list[list[int]]:
    return [lm.tokenizer.encode(text) for text in TEXTS]


def test_greedy_text_of_200_tokens_is_that_of_transformers(eager: LoadedModel):
    """Each token is the likeliest after those before it."""
    path = ROOT / "checkpoints" / ("demo-opt" if eager.model.args.norm == "layer" else "demo")
    theirs, given = hugging_face_model(path), prompts(eager)
    config = dataclasses.replace(GREEDY, max_new_tokens=200)
    found = ids(eager, given, config)
    assert ids(eager, given[:1], config) == found[:1]
    for prompt, new in zip(given, found, strict=True):
        assert len(new) == 200
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + new])).logits
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == new


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_is_its_rows_alone(eager: LoadedModel, config: GenerationConfig):
    given = prompts(eager)
    alone = [ids(eager, [p], config, streams=[row])[0] for row, p in enumerate(given)]
    assert ids(eager, given, config) == alone
    assert len(set(map(tuple, alone))) == len(alone)


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_compiled_text_is_eager_text(both: tuple[LoadedModel, ...], config: GenerationConfig):
    eager, compiled = both
    config = dataclasses.replace(config, max_new_tokens=60)  # other bits show in one token of many
    for row, prompt in enumerate(prompts(eager)):
        wanted = ids(eager, [prompt], config, streams=[row])
        assert ids(compiled, [prompt], config, streams=[row]) == wanted


@pytest.mark.parametrize("name", DEMOS)
def test_a_compiled_batch_of_four_is_four_single_runs(name: str):
    """In float32: in bfloat16 a product of other shape rounds otherwise, and near ties may fall."""
    compiled = demo(name, dtype=torch.float32, compile=True)
    given = prompts(compiled)
    assert ids(compiled, given, GREEDY) == [ids(compiled, [p], GREEDY)[0] for p in given]


def test_one_graph_serves_every_prompt_length(both: tuple[LoadedModel, ...]):
    eager, compiled = both
    caches = compiled.make_caches(1, 400)
    generator = torch.Generator().manual_seed(0)
    vocab, short = eager.model.args.vocab_size, dataclasses.replace(GREEDY, max_new_tokens=4)
    counts, sizes = [], set()
    for length in (2, 3, 17, 70, 95, 140, 250, 301):
        given = torch.randint(vocab, (1, length), generator=generator).tolist()
        assert ids(compiled, given, short, caches=caches) == ids(eager, given, short)
        counts.append(compiled_graphs())
        sizes.add(visible_length(length + 1, 400))
    assert len(sizes) > 4
    assert counts[0] == counts[-1]


def test_a_compiled_step_maps_no_memory_whatever_the_depth_of_its_caller(
    both: tuple[LoadedModel, ...],
):
    """Python maps a new chunk for frames at every 16 kB; a step across such a place took 1.4 times
    as long. Here the caller's frame is made larger and larger, until it has been everywhere."""
    lm = both[1]
    caches = lm.make_caches(1, 64)
    token, pos, key_pos = torch.tensor([[5]]), torch.tensor([[9]]), torch.arange(64)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with torch.inference_mode():
            for _ in range(4):
                lm.decode(token, pos, key_pos, caches)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def called_from_a_frame_of(words: int) -> int:
        def caller() -> int:
            return faults()

        caller.__code__ = caller.__code__.replace(co_stacksize=words)
        return caller()

    faults()
    found = [called_from_a_frame_of(words) for words in range(16, 2200, 8)]
    assert sorted(found)[-3] < 4 * 8  # a step; its own frame takes 3, and chance a few


@pytest.mark.parametrize("chunk", [4, 12, 20])
def test_prefill_in_chunks_is_prefill(
    eager: LoadedModel, free: list[Completion], chunk: int, monkeypatch: pytest.MonkeyPatch
):
    given = prompts(eager)
    assert len({(len(p) - 1) // (chunk // len(given)) for p in given}) > 1
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", chunk)
    assert ids(eager, given, GREEDY) == [c.ids for c in free]


def test_what_the_caches_hold_is_not_prefilled_again(eager: LoadedModel):
    text = prompts(eager)[2]
    caches = eager.make_caches(1, 200)
    (first,) = ids(eager, [text], GREEDY, caches=caches)
    longer = [*text, *first, *prompts(eager)[0][1:]]
    held = len(text) + len(first) - 1
    seen = []

    def prefill(tokens: torch.Tensor, *others: object) -> torch.Tensor:
        seen.append(tokens.shape[1])
        return eager.prefill(tokens, *others)

    watched = dataclasses.replace(eager, prefill=prefill)
    assert ids(watched, [longer], GREEDY, caches=caches, past=held) == ids(eager, [longer], GREEDY)
    assert seen == [len(longer) - held]


def test_rows_of_the_caches_may_idle(eager: LoadedModel, free: list[Completion]):
    given, caches = prompts(eager), eager.make_caches(6, 200)
    assert ids(eager, given, GREEDY, caches=caches) == [c.ids for c in free]
    assert len(next(generate(eager, given[:1], GREEDY, caches=caches))) == 1


def test_a_row_ends_at_eos_and_its_neighbours_go_on(eager: LoadedModel, free: list[Completion]):
    given, texts = prompts(eager), [c.ids for c in free]
    ends = (texts[0][7], texts[2][11])  # two ids that some row comes to
    tokenizer = type("Ended", (), {"eos_ids": ends, "stream": eager.tokenizer.stream})()
    lm = dataclasses.replace(eager, tokenizer=tokenizer)
    stopped = complete(lm, given, dataclasses.replace(GREEDY, ignore_eos=False))
    for completion, whole in zip(stopped, texts, strict=True):
        first = next((n for n, token in enumerate(whole) if token in ends), None)
        assert completion.ids == (whole if first is None else whole[: first + 1])
        assert completion.finish_reason == ("length" if first is None else "eos")
    assert ids(lm, given, GREEDY) == texts


def test_stop_strings_end_each_row_by_itself(eager: LoadedModel, free: list[Completion]):
    given, whole = prompts(eager), [c.text for c in free]
    stops = (whole[0][20:27], whole[3][31:33], "never said")
    shown = [""] * len(given)

    def show(row: int, text: str) -> None:
        shown[row] += text

    stopping = dataclasses.replace(GREEDY, stop=stops)
    for row, completion in enumerate(complete(eager, given, stopping, on_text=show)):
        cuts = [at for stop in stops if (at := whole[row].find(stop)) >= 0]
        assert completion.text == shown[row] == whole[row][: min(cuts, default=None)]
        assert completion.finish_reason == ("stop" if cuts else "length")


def test_the_context_ends_a_row_and_not_its_neighbours(eager: LoadedModel):
    context = eager.model.args.context
    long = (prompts(eager)[2] * 60)[: context - 5]
    config = dataclasses.replace(GREEDY, max_new_tokens=12)
    rows = ids(eager, [long, prompts(eager)[0]], config)
    assert [len(row) for row in rows] == [5, 12]
    assert rows == [ids(eager, [p], config)[0] for p in (long, prompts(eager)[0])]


def test_a_cache_shorter_than_the_context_ends_a_row(eager: LoadedModel):
    given, caches = prompts(eager)[:1], eager.make_caches(1, 70)
    config = dataclasses.replace(GREEDY, max_new_tokens=100)
    (short,), (whole,) = ids(eager, given, config, caches=caches), ids(eager, given, config)
    assert len(short) == caches[0].length - len(given[0]) < 100
    assert short == whole[: len(short)]


def test_prompts_that_cannot_be_continued(eager: LoadedModel):
    context, vocab = eager.model.args.context, eager.model.args.vocab_size
    for given, said in (
        ([], "no prompt"),
        ([[]], "empty"),
        ([[5], [5] * context], rf"prompt 2 of 2 has {context} tokens .* context is {context}"),
        ([[5, vocab]], f"ids from 5 to {vocab} and the model knows 0 to {vocab - 1}"),
    ):
        with pytest.raises(ValueError, match=said):
            next(generate(eager, given, GREEDY))


def test_visible_positions_are_enough_and_few():
    sizes = [visible_length(n, 10**6) for n in range(1, 5000)]
    assert all(n <= size <= max(64, 1.5 * n) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 2 * 13
    assert sizes == sorted(sizes)
    assert visible_length(100, 110) == 110


def test_a_step_is_launched_before_the_one_before_it_is_read():
    order = []

    def steps() -> Iterator[int]:
        for n in range(3):
            order.append(f"launch {n}")
            yield n

    for n in launch_ahead(steps()):
        order.append(f"read {n}")
    launches = ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "read 2"]
    assert order == launches


@pytest.mark.parametrize("stop", ["aab", "€", "ö€"])
def test_a_completion_shows_what_is_certain(stop: str):
    """Text "aaab xö€!" one byte at a time: shown text never grows into a stop string."""
    tokenizer = demo("demo").tokenizer
    byte_ids = tokenizer.encode("aaab xö€!", bos=False)
    for cut in range(len(byte_ids) + 1):
        completion = Completion(tokenizer, [], GenerationConfig(stop=(stop,)))
        shown = "".join(completion.extend([i]) for i in byte_ids[:cut]) + completion.close()
        assert shown == completion.text == tokenizer.decode(byte_ids[:cut]).split(stop)[0]


def test_a_random_model_has_a_shape_and_no_tokenizer(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text((ROOT / "checkpoints" / "demo" / "config.json").read_text())
    lm = random_model(file, device="cpu")
    assert lm.model.tok_embeddings.weight.dtype == torch.bfloat16
    (completion,) = complete(lm, [[1, 2, 3]], GREEDY)
    assert completion.text.split() == [str(i) for i in completion.ids]
    with pytest.raises(ValueError, match="no tokenizer"):
        lm.tokenizer.encode("text")
