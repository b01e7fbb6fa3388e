"""harness.py against lm_eval's own Hugging Face backend: answers to every question, and scores."""

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # the other backend needs it

import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, manager
from lm_eval.utils import setup_logging
from torch.utils import collect_env

import quantize
from eval import main, parse_args
from evaluation.harness import (
    HarnessModel,
    HarnessOptions,
    find_tasks,
    generation_config,
    run_tasks,
)
from evaluation.scoring import log_likelihoods
from load import load_model

TASKS = ROOT / "scripts" / "tasks"
sys.path.insert(0, str(TASKS))
from local_files import lines, read_hellaswag

DEMOS = {"llama": ROOT / "checkpoints" / "demo", "opt": ROOT / "checkpoints" / "demo-opt"}
TOLERANCE = 1e-3
setup_logging(logging.ERROR)

STORIES = [
    "Once upon a time, there was a little girl named Lily. She liked to play outside with her dog.",
    "Tom saw a big red ball in the park. He wanted to play, but",
    "One day, the cat sat on a mat\n\nand looked at the",
    'Mom said, "Do not touch the stove. It is hot!" Ben was',
]
HELLASWAG = [
    {
        "activity_label": "Playing",
        "ctx_a": f"{story} [title] A day.",
        "ctx_b": "then the boy",
        "endings": ["ran home.", "ate [step] a cake with  his mom and dad.", "slept", "was sad."],
        "label": number % 4,
    }
    for number, story in enumerate(STORIES)
]
ARC = [
    {
        "question": "What do you wear when it is cold?",
        "choices": {"text": ["a hat", "a ball", "the sun"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "question": "Which one can fly?",
        "choices": {"text": ["a bird", "a dog"], "label": ["1", "2"]},
        "answerKey": "1",
    },
]
WINOGRANDE = [
    {
        "sentence": "Sam gave Lily the toy because _ was sad.",
        "option1": "Sam",
        "option2": "Lily",
        "answer": "2",
    },
    {
        "sentence": "The ball did not fit in the box because the _ was too big.",
        "option1": "ball",
        "option2": "box",
        "answer": "1",
    },
]
BLIMP = [
    {"sentence_good": "The dogs run home.", "sentence_bad": "The dogs runs home."},
    {"sentence_good": "She sees herself.", "sentence_bad": "She sees himself."},
]
LAMBADA = [{"text": story.rstrip(".")} for story in STORIES]
DOCUMENTS = {
    "hellaswag_local": HELLASWAG,
    "arc_easy_local": ARC,
    "winogrande_local": WINOGRANDE,
    "blimp_local": BLIMP,
    "lambada_local": LAMBADA,
}
SHARED = {
    "hellaswag_local": "hellaswag_val_full.txt.bz2",
    "arc_easy_local": "arc_easy.jsonl",
    "winogrande_local": "winogrande.jsonl",
    "blimp_local": "blimp",
    "lambada_local": "lambada_test.jsonl",
}
CHAT = (
    "{% for m in messages %}{{ '<s>' if loop.first }}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(autouse=True, scope="module")
def described_once() -> Iterator[None]:
    """Each evaluation asks pip and others what this machine is, which takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", cache(collect_env.get_pretty_env_info))
        yield
    theirs.cache_clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A few documents of each task, as the sets are published."""
    folder = tmp_path_factory.mktemp("documents")
    for task, documents in DOCUMENTS.items():
        lines = (f"{json.dumps(document)}\n" for document in documents)
        (folder / f"{task}.jsonl").write_text("".join(lines))
    return {task: str(folder / f"{task}.jsonl") for task in DOCUMENTS}


@pytest.fixture(scope="module", params=DEMOS)
def path(request: pytest.FixtureRequest) -> Path:
    return DEMOS[request.param]


def ours(path: Path, batch_size: int | None = None, **options: Any) -> HarnessModel:
    lm = load_model(path, device="cpu", dtype=torch.float32, **options)
    return HarnessModel(lm, batch_size, lm.model.args.context, True)


@cache
def theirs(path: Path, batch_size: int = 4, **options: Any) -> HFLM:
    options = {"add_bos_token": True} | options
    return HFLM(
        pretrained=str(path), dtype="float32", batch_size=batch_size, device="cpu", **options
    )


def evaluated(model: Any, data: dict[str, str], **options: Any) -> dict[str, Any]:
    options = {"include_path": TASKS, "tasks": list(data), "task_data": data} | options
    manager = find_tasks(HarnessOptions(**options))
    if isinstance(model, HarnessModel):
        return run_tasks(model, HarnessOptions(log_samples=True, **options), manager)
    options["system_instruction"] = options.pop("system", None)
    del options["include_path"], options["task_data"]
    return lm_eval.simple_evaluate(model, task_manager=manager, **options)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every answer, and every score."""
    assert found["samples"].keys() == expected["samples"].keys()
    for task, samples in expected["samples"].items():
        assert len(samples) > 1
        for mine, other in zip(found["samples"][task], samples, strict=True):
            assert mine["arguments"] == other["arguments"]
            for [answer], [right] in zip(mine["resps"], other["resps"], strict=True):
                if isinstance(right, str):
                    assert answer == right
                else:
                    assert answer[0] == pytest.approx(right[0], abs=TOLERANCE)
                    assert answer[1] == right[1]
        scores = expected["results"][task]
        for name, score in scores.items():
            if name.startswith(("acc", "exact_match")):
                assert found["results"][task][name] == score
            elif isinstance(score, float):
                assert found["results"][task][name] == pytest.approx(score, rel=1e-3)


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_local_tasks(path: Path, files: dict[str, str], num_fewshot: int):
    data = (
        files if num_fewshot == 0 else {t: files[t] for t in ("hellaswag_local", "lambada_local")}
    )
    expected = evaluated(theirs(path), data, num_fewshot=num_fewshot)
    for batch_size in (None, 3):
        found = evaluated(ours(path, batch_size), data, num_fewshot=num_fewshot)
        check(found, expected)
        assert len(found["samples"]) == len(data)


@pytest.fixture(scope="module")
def published(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The beginning of each published set; of BLiMP that of each of its files."""
    folder, found = tmp_path_factory.mktemp("published"), {}
    for task, name in SHARED.items():
        source = data_dir / "eval" / name
        if source.is_dir():
            (folder / name).mkdir()
        for file in sorted(source.glob("*.jsonl")) if source.is_dir() else [source]:
            target = folder / file.relative_to(data_dir / "eval").with_suffix("")
            target = target if target.suffix == ".txt" else target.with_suffix(".jsonl")
            count = {".bz2": 6 * 6}.get(file.suffix, 1 if source.is_dir() else 6)
            target.write_text("".join(f"{line}\n" for line in islice(lines(file), count)))
        found[task] = str(folder / name.removesuffix(".bz2"))
    return found


@pytest.mark.parametrize("name", ["demo", "demo-opt", "stories260K", "tinystories-656k"])
def test_published_sets(name: str, published: dict[str, str], data_dir: Path):
    path = ROOT / "checkpoints" / name if "demo" in name else data_dir / "models" / name
    tokenizer = None  # where transformers does not make of the files what they say, told how
    if name == "stories260K":
        tokenizer = transformers.LlamaTokenizer.from_pretrained(path, add_bos_token=True)
    if name == "tinystories-656k":
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(path / "tokenizer.json"),
            bos_token="<|start_story|>",
            eos_token="<|end_story|>",
        )
    found = evaluated(ours(path), published)
    check(found, evaluated(theirs(path, tokenizer=tokenizer), published))
    assert sorted(map(len, found["samples"].values())) == [6, 6, 6, 6, 10]


def test_what_is_too_long_loses_its_beginning_as_theirs_does(path: Path, tmp_path: Path):
    file = tmp_path / "long.jsonl"
    documents = [{"text": " ".join(STORIES * count)} for count in (1, 20, 9)]
    file.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    model = ours(path)
    data = {"lambada_local": str(file)}
    check(evaluated(model, data), evaluated(theirs(path), data))
    assert model.shortened == 2


def test_chat_templates(files: dict[str, str], tmp_path: Path):
    for file in DEMOS["llama"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    data = {"arc_easy_local": files["arc_easy_local"]}
    options = {"apply_chat_template": True, "system": "You know it all.", "num_fewshot": 1}
    model = ours(tmp_path)
    found = evaluated(model, data, **options)
    check(found, evaluated(theirs(tmp_path), data, **options))
    asked = found["samples"]["arc_easy_local"][0]["arguments"][0][0]
    assert asked.startswith("<s>system: You know it all.") and asked.endswith("assistant:")
    ids = model.tok_encode(asked)
    assert ids[0] == 0 and ids[1] != 0  # BOS, once
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am "}]
    other = theirs(tmp_path).apply_chat_template(begun, add_generation_prompt=False)
    assert model.apply_chat_template(begun, add_generation_prompt=False) == other.rstrip()


GENERATIVE = """
task: riddles
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: generate_until
test_split: train
doc_to_text: "{{{{text}}}}"
doc_to_target: " home"
generation_kwargs:
  until: ["\\n\\n", "."]
  max_gen_toks: 40
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def riddles(tmp_path: Path, files: dict[str, str]) -> dict[str, Any]:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "riddles.yaml").write_text(GENERATIVE.format(file=files["lambada_local"]))
    return {"include_path": folder, "tasks": ["riddles"]}


def test_generation(path: Path, riddles: dict[str, Any]):
    expected = evaluated(theirs(path, 1), {}, **riddles)
    for batch_size in (None, 1, 3):
        found = evaluated(ours(path, batch_size), {}, **riddles)
        check(found, expected)
        texts = [sample["resps"][0][0] for sample in found["samples"]["riddles"]]
        assert len(set(texts)) == len(STORIES)
        assert not any("." in text or "\n\n" in text for text in texts)
        assert 0 < min(map(len, texts)) < max(map(len, texts))


def test_a_compiled_model_generates_the_same(riddles: dict[str, Any]):
    plain = evaluated(ours(DEMOS["llama"]), {}, **riddles)
    compiled = ours(DEMOS["llama"], compile=True, compile_prefill=True)
    check(evaluated(compiled, {}, **riddles), plain)


def test_a_prompt_that_leaves_no_room_loses_its_beginning(path: Path):
    asked = [(" ".join(STORIES * 9), {"until": [], "max_gen_toks": 30}), (STORIES[0], {})]
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)
        for arguments in asked
    ]
    model = ours(path)
    assert model.generate_until(requests, disable_tqdm=True) == theirs(path, 1).generate_until(
        requests, disable_tqdm=True
    )
    assert model.shortened == 1


def test_drawn_texts_depend_on_seed_and_place_alone(path: Path):
    kwargs = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20, "until": []}

    def drawn(batch_size: int, **more: Any) -> list[str]:
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=(s, kwargs | more), idx=0)
            for s in [*STORIES, STORIES[0]]
        ]
        return ours(path, batch_size).generate_until(requests, disable_tqdm=True)

    alone, together = drawn(1), drawn(3)
    assert alone == together
    assert alone != drawn(1, seed=5)
    assert together[0] != together[-1]  # the same prompt twice: two samples


def test_whole_texts(path: Path):
    """Longer than the context, too. Theirs would put BOS before its own BOS: told not to."""
    texts = [STORIES[0], " ".join(STORIES * 16), "", "Tom"]
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        for text in texts
    ]
    model = ours(path)
    assert len(model.tok_encode(texts[1])) > 2 * model.max_length
    found = model.loglikelihood_rolling(requests, disable_tqdm=True)
    other = theirs(path, 2, add_bos_token=False, prefix_token_id=0)
    expected = other.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=TOLERANCE)


def test_a_text_that_needs_no_more_ids_than_the_one_before_it(path: Path):
    """Found on tinystories-656k and LAMBADA: "you," and "you, Sara" have 90 ids each."""
    model = ours(path)
    model._ids = {"ab": [5, 7], "a": [5, 6], "cd": [8], "c": [8], "ce": [8, 9]}.__getitem__
    assert model._encode_pair("a", "b") == ([0, 5], [7])
    assert model._encode_pair("c", "d") == ([0], [8])
    assert model.fused == 2
    assert model._encode_pair("c", "e") == ([0, 8], [9])
    assert model.fused == 2


def test_merges_across_words(data_dir: Path, tmp_path: Path):
    said = 'She said, "I really, really like you, Sara'
    (tmp_path / "said.jsonl").write_text(json.dumps({"text": said}) + "\n")
    model = ours(data_dir / "models" / "tinystories-656k")
    found = evaluated(model, {"lambada_local": str(tmp_path / "said.jsonl")})
    [[(nats, greedy)]] = found["samples"]["lambada_local"][0]["resps"]
    assert model.fused == 1
    whole = model.tok_encode(said)
    start = len(whole) - 2  # "you," has other ids then
    [(_, expected, _)] = log_likelihoods(model.lm, [(whole, start)])
    assert nats == pytest.approx(expected, abs=TOLERANCE) and not greedy


def test_without_bos(path: Path, files: dict[str, str]):
    lm = load_model(path, device="cpu", dtype=torch.float32)
    model = HarnessModel(lm, None, lm.model.args.context, False)
    data = {"hellaswag_local": files["hellaswag_local"]}
    check(evaluated(model, data), evaluated(theirs(path, add_bos_token=False), data))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantised_models_answer(mode: str, files: dict[str, str], tmp_path: Path):
    """Near the dense model's answers, and not the same."""
    for file in DEMOS["llama"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    options = ["--checkpoint_path", str(tmp_path), "--mode", mode]
    quantised = ours(quantize.run(quantize.parse_args(options)))
    data = {"hellaswag_local": files["hellaswag_local"]}
    found, dense = (evaluated(m, data)["samples"] for m in (quantised, ours(DEMOS["llama"])))
    pairs = [
        (float(mine["resps"][n][0][0]), float(other["resps"][n][0][0]))
        for mine, other in zip(found["hellaswag_local"], dense["hellaswag_local"], strict=True)
        for n in range(4)
    ]
    assert all(a == pytest.approx(b, rel=0.02 if mode == "int8" else 0.2) for a, b in pairs)
    assert any(abs(a - b) > TOLERANCE for a, b in pairs)


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("arc_easy_local", {"query": "Question: Which?", "choices": ["a", "b"], "gold": 1}),
        (
            "winogrande_local",
            {"context_options": ["A so A", "A so B"], "continuation": "won.", "gold": 0},
        ),
    ],
)
def test_the_other_form_of_a_set(task: str, line: dict, tmp_path: Path):
    file = tmp_path / "other.jsonl"
    file.write_text(json.dumps(line) + "\n")
    manager = TaskManager(
        include_path=TASKS, include_defaults=False, metadata={"task_data": {task: str(file)}}
    )
    (found,) = manager.load([task])["tasks"].values()
    (doc,) = found.dataset["test"]
    assert list(doc["choices"]) == line.get("choices", line.get("context_options"))
    assert doc["gold"] == line["gold"]


def test_hellaswag_in_six_lines_is_hellaswag(tmp_path: Path):
    published, six = tmp_path / "a.jsonl", tmp_path / "a.txt"
    published.write_text("".join(f"{json.dumps(document)}\n" for document in HELLASWAG))
    documents = list(read_hellaswag(published))
    lines = [[d["query"].replace("\n", " "), str(d["gold"]), *d["choices"]] for d in documents]
    six.write_text("".join(f"{line}\n" for document in lines for line in document))
    expected = [d | {"query": d["query"].replace("\n", " ")} for d in documents]
    assert list(read_hellaswag(six)) == expected
    assert documents[0]["choices"][1] == "ate a cake with his mom and dad."
    assert documents[0]["query"].endswith(". A day. Then the boy")
    six.write_text("context\n7\na\nb\nc\nd\n")
    with pytest.raises(ValueError, match="line 2: expected 0 to 3"):
        list(read_hellaswag(six))


def test_what_a_task_asks_for_of_the_sampler():
    config = generation_config({"until": ["\n", ""], "max_gen_toks": 7}, 100)
    assert (config.temperature, config.max_new_tokens, config.stop) == (0.0, 7, ("\n",))
    config = generation_config({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, 512)
    assert (config.temperature, config.top_p, config.top_k) == (0.5, 0.9, 0)
    with pytest.raises(ValueError, match="num_beams"):
        generation_config({"num_beams": 4}, 512)
    with pytest.raises(ValueError, match="asks for 256 tokens and the model's context is 256"):
        generation_config({}, 256)


def command(capsys: pytest.CaptureFixture, *options: Any) -> tuple[int, str, str]:
    code = main(parse_args(["--device", "cpu", *map(str, options)]))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "results.json"
    given = ["--include_path", TASKS, "--task_data", *(f"{t}={f}" for t, f in files.items())]
    given += ["--tasks", "hellaswag_local", "lambada_local", "--dtype", "float32"]
    code, out, err = command(capsys, *given, "--output", output, "--log_samples")
    assert code == 0
    results, printed = json.loads(output.read_text()), json.loads(out)
    assert printed["results"] == results["results"] and "configs" not in printed
    assert results["bos"] == "<s> before every text" and results["limit"] is None
    assert "|hellaswag_local" in err and "note" not in results
    expected = evaluated(theirs(DEMOS["llama"]), {t: files[t] for t in results["results"]})
    for task in results["results"]:
        lines = (tmp_path / f"results.{task}.jsonl").read_text().splitlines()
        assert len(lines) == len(expected["samples"][task]) == len(DOCUMENTS[task])
        scores = results["results"][task]
        assert scores["acc,none"] == expected["results"][task]["acc,none"]
    assert len(list(tmp_path.iterdir())) == 3
    capsys.readouterr()  # what the other backend made lm_eval print
    code, out, err = command(capsys, *given, "--limit", 2)
    assert code == 0 and "not a score" in json.loads(out)["note"] and "not a score" in err


def test_an_interrupted_run_goes_on(
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """Answers that are in the cache are not asked for again; of another model none is used."""
    from evaluation import harness

    asked, score = [], harness.log_likelihoods

    def interrupted(lm: Any, sequences: Any, rows: Any):
        for n, result in enumerate(score(lm, sequences, rows)):
            if n == 5 and not asked:
                asked.append(len(sequences))
                raise KeyboardInterrupt
            yield result
        asked.append(len(sequences))

    monkeypatch.setattr(harness, "log_likelihoods", interrupted)
    given = ["--include_path", TASKS, "--tasks", "hellaswag_local", "--use_cache", tmp_path / "c"]
    given += ["--task_data", f"hellaswag_local={files['hellaswag_local']}"]
    code, out, err = command(capsys, *given)
    assert code == 130 and out == "" and "goes on from --use_cache" in err
    code, out, _ = command(capsys, *given)
    assert code == 0 and asked == [16, 11]
    plain = command(capsys, *given[:4], *given[6:])[1]
    assert json.loads(out)["results"] == json.loads(plain)["results"]
    assert command(capsys, *given, "--no_bos")[0] == 0
    assert asked[2:] == [16, 16]


@pytest.fixture
def few_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval has ARC alone: to list its 14,000 tasks takes ten seconds."""
    shutil.copytree(Path(manager.__file__).parent / "arc", tmp_path / "arc")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))


def test_tasks_of_lm_eval_are_found_after_those_of_the_directory(few_defaults: None):
    options = HarnessOptions(tasks=["arc_easy", "lambada_local"], include_path=TASKS)
    assert sorted(find_tasks(options).match_tasks(["arc_*", "lambada_*"])) == [
        "arc_challenge",
        "arc_challenge_chat",
        "arc_easy",
        "arc_easy_local",
        "lambada_local",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "no_such_task"], "there is no task no_such_task"),
        (["--tasks", "hellaswag_local"], "give --task_data hellaswag_local=PATH"),
        (
            ["--tasks", "arc_easy_local", "--task_data", "arc_easy_local=none.jsonl"],
            "none.jsonl",
        ),
        (
            ["--tasks", "blimp_local", "--task_data", "blimp_local={arc_easy_local}"],
            "line 1 has no 'sentence_good'",
        ),
        (
            ["--tasks", "winogrande_local", "--task_data", "winogrande_local={lambada_local}"],
            "line 1 has no 'sentence'",
        ),
        (
            ["--tasks", "lambada_local", "--apply_chat_template"]
            + ["--task_data", "lambada_local={lambada_local}"],
            "no chat template",
        ),
    ],
)
def test_mistakes_are_one_line(
    options: list[str],
    message: str,
    files: dict[str, str],
    few_defaults: None,
    capsys: pytest.CaptureFixture,
):
    given = [option.format(**files) for option in options]
    code, out, err = command(capsys, "--include_path", TASKS, *given)
    assert code == 2 and out == ""
    assert message in err.strip().splitlines()[-1]


@pytest.mark.parametrize("until", [["."], ["girl", "."], [" said", "."]], ids="-".join)
def test_a_stop_string_that_is_a_special_token(until: list[str], tmp_path: Path):
    """As <|im_end|> is: it ends a text and has none itself."""
    for file in DEMOS["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    token = {"id": tokenizer["model"]["vocab"]["."], "content": ".", "special": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append(token | plain)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = "Once upon a time, there was a"
    requests = [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(text, {"until": until, "max_gen_toks": 30}),
            idx=0,
        )
    ]
    found = ours(tmp_path).generate_until(requests, disable_tqdm=True)
    assert found == theirs(tmp_path, 1).generate_until(requests, disable_tqdm=True)
    assert len(found[0]) < 30
