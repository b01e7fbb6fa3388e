"""Tensor parallelism gives one process's tokens; what ranks load, hold and communicate."""

import functools
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT
from torch import Tensor

import quantize
import tp
from checkpoint import Checkpoint
from layers.args import ModelArgs
from layers.basic import Linear
from load import meta_model
from quant.linear import Int4Linear, make_scheme, pack_nibbles, unpack_nibbles
from ranks import Ranks
from tests.ranks_worker import TEXTS, answers
from weights import formats
from weights.allocation import allocate, stored_tensors
from weights.hf import model_args
from weights.saving import save_checkpoint

WORKER = ROOT / "tests" / "ranks_worker.py"
CPU = torch.device("cpu")
SEED = 20261122


def on_ranks(count: int, cases: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """Run the cases on `count` ranks; return each rank's results, see ranks_worker.answers."""
    asked, results = folder / "cases.json", folder / "results"
    asked.write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, WORKER, str(count), asked, results],
        env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},  # no pool of processes a rank
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{results}.{rank}") for rank in range(count)]


def quantised(path: Path, *options: str) -> Path:
    words = ["--checkpoint_path", str(path), "--device", "cpu", *options]
    before = set(path.glob("*.pth"))
    assert quantize.main(quantize.parse_args(words)) == 0
    (made,) = set(path.glob("*.pth")) - before
    return made


def random_llama(folder: Path, **options: Any) -> Path:
    """Save a small Llama with random weights and biases. options: changes to its config."""
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 2051,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_bias": True,
        "mlp_bias": True,
    }
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(**(shape | options))
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        weight.data.normal_(std=0.2).add_("norm" in name)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((ROOT / "checkpoints" / "demo" / file).read_bytes())
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name in ("demo", "demo-opt"):
        found[name] = folder / name
        found[name].mkdir()
        for file in (ROOT / "checkpoints" / name).iterdir():
            (found[name] / file.name).symlink_to(file)
        found[f"{name}-int8"] = quantised(found[name], "--mode", "int8")
        found[f"{name}-int4"] = quantised(found[name], "--mode", "int4")
    text = folder / "text.txt"
    text.write_text("Once upon a time there was a little girl. " * 200)
    # Two key/value heads; three groups of 32 neurons for each of two ranks: two share a byte.
    random = found["random"] = random_llama(folder / "random")
    found["random-int8"] = quantised(random, "--mode", "int8")
    found["random-int4"] = quantised(random, "--mode", "int4")
    gptq = "--mode", "int4-gptq", "--train_steps", "0", "--calibration_file", str(text)
    found["random-gptq"] = quantised(
        random, *gptq, "--calibration_seq_length", "64", "--calibration_samples", "2"
    )
    return found


# Besides greedy steps: drafts, quantised caches, layers on other tiers.
OTHERS = [
    {"name": "demo", "draft": "ngram"},
    {"name": "demo", "draft": "self-int8"},
    {"name": "demo-opt", "draft": "self-int4", "how": {"temperature": 0.8}},
    {"name": "demo", "kv_dtype": "int8"},
    {"name": "demo-opt", "how": {"temperature": 0.8, "ignore_eos": False}},
    {"name": "demo", "percent": [0, 50, 0, 0]},
]
# In groups of 32 four ranks cannot share the random model's neurons, nor the demo OPT's heads. Two
# of four ranks have the same key/value head of the random model.
CASES = {
    2: ["demo", "demo-opt", "demo-int8", "demo-opt-int4", "random", "random-int4", "random-gptq"],
    4: ["demo", "demo-opt", "demo-int4", "demo-opt-int8", "random", "random-int8"],
}
# All of the demos were tried on both; a rank takes 3 to 9 s for each, so two ranks must do: the
# graphs of four differ in sizes alone. The vocabulary of the random model is uneven on two, too.
COMPILED = {2: ["demo-opt", "demo-int4", "random-int8"], 4: []}


@pytest.fixture(scope="module")
def run_all(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], list[list[dict[str, Any]]]]:
    """A function of the number of ranks, which returns, for each case, all ranks' results."""

    @functools.cache
    def run(count: int) -> list[list[dict[str, Any]]]:
        cases = [{"name": name} for name in CASES[count]]
        cases += [{"name": name, "compile": True} for name in COMPILED[count]]
        cases += OTHERS if count == 2 else []
        cases = [case | {"path": str(checkpoints[case["name"]])} for case in cases]
        for case in cases:
            del case["name"]
        by_rank = on_ranks(count, cases, tmp_path_factory.mktemp("ranks"))
        return list(zip(*by_rank, strict=True))

    return run


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path]) -> Callable[[str], dict[str, Any]]:
    """A function of a model's name, which returns what one process answers."""
    return functools.cache(lambda name: answers(str(checkpoints[name]), None))


@pytest.fixture(scope="module", params=[2, 4])
def found(
    request: pytest.FixtureRequest, run_all: Callable[[int], list[list[dict[str, Any]]]]
) -> tuple[int, dict[tuple[str, bool], list[dict[str, Any]]]]:
    """Return the number of ranks, and all ranks' results for each model, eager and compiled."""
    count = request.param
    names = [(name, False) for name in CASES[count]] + [(name, True) for name in COMPILED[count]]
    return count, dict(zip(names, run_all(count)[: len(names)], strict=True))


def test_tokens_and_logits_are_those_of_one_rank(found, alone: Callable[[str], dict[str, Any]]):
    """Distinct prompts: gpt-fast's sharding gives every row of a batch what row 0 attends to."""
    _, results = found
    for (name, compile), by_rank in results.items():
        expected = alone(name)
        assert len({tuple(ids) for ids in expected["ids"]}) == len(TEXTS)
        for rank, result in enumerate(by_rank):
            assert result["ids"] == expected["ids"], (name, compile, rank)
            error = (result["logits"] - expected["logits"]).abs().max()
            assert error < 1e-4, (name, compile, rank)


def test_drafts_caches_and_tiers(
    checkpoints: dict[str, Path],
    run_all: Callable[[int], list[list[dict[str, Any]]]],
    alone: Callable[[str], dict[str, Any]],
):
    for case, by_rank in zip(OTHERS, run_all(2)[-len(OTHERS) :], strict=True):
        more = {k: v for k, v in case.items() if k not in ("name", "draft", "percent")}
        path = str(checkpoints[case["name"]])
        expected = answers(path, None, **more) if more else alone(case["name"])
        for rank in range(2):
            assert by_rank[rank]["ids"] == expected["ids"], (case, rank)


def test_all_ranks_have_the_same_logits(found):
    for case, by_rank in found[1].items():
        for result in by_rank:
            assert torch.equal(result["logits"], by_rank[0]["logits"]), case


def test_two_all_reduces_a_layer_and_one_gather(found, checkpoints: dict[str, Path]):
    for (name, compile), by_rank in found[1].items():
        layers = Checkpoint(checkpoints[name]).args.n_layers
        for result in by_rank if not compile else []:
            assert result["calls"] == {"all_reduce": 2 * layers, "all_gather": 1}


def test_a_rank_holds_its_share(found, checkpoints: dict[str, Path]):
    """Every rank has the table, norms and biases, and a part of the rest."""
    count, results = found
    (result, *_) = results["demo", False]
    checkpoint = Checkpoint(checkpoints["demo"])
    whole = sum(4 * torch.Size(r.shape).numel() for r in checkpoint.tensors.values())
    table = 4 * torch.Size(checkpoint.tensors["tok_embeddings.weight"].shape).numel()
    assert result["weights"] < 1.1 * ((whole - table) / count + table)


@pytest.mark.parametrize(
    ("count", "scheme", "says"),
    [(3, None, "8 heads; 1, 2, 4, 8 can"), (8, {"linears": {"bits": 4, "groupsize": 128}}, "1, 2")],
)
def test_ranks_that_do_not_fit_are_told_which_would(count: int, scheme: dict | None, says: str):
    args = Checkpoint(ROOT / "checkpoints" / "demo").args
    with pytest.raises(ValueError, match=says):
        tp.shard_args(args, scheme, Ranks(0, count))


def test_parts_cover_everything_once():
    for whole, count in ((2051, 4), (8, 2), (5, 4), (3, 3), (1, 1)):
        parts = [Ranks(rank, count).shard_range(whole) for rank in range(count)]
        assert [n for part in parts for n in part] == list(range(whole))


def rank_of(path: Path, ranks: Ranks) -> torch.nn.Module:
    """Load the model of one rank in this process."""
    checkpoint = Checkpoint(path)
    strategy = tp.TensorParallel(ranks)
    model = strategy.build_skeleton(checkpoint.args, checkpoint.scheme)
    fill = strategy.fill_function(checkpoint, model, CPU, checkpoint.fill_function(CPU))
    allocate(model, CPU, torch.float32, fill)
    return model


def test_packed_int4_sharding_is_sharding_then_packing(tmp_path: Path):
    draw = random.Random(SEED)
    print("seed", SEED)
    for n in range(8):
        count, groupsize = draw.choice((2, 3, 4)), draw.choice((32, 64))
        heads = count * draw.randint(1, 2)
        shape = {
            "vocab_size": 2048 + n,
            "num_attention_heads": heads,
            "num_key_value_heads": draw.choice([g for g in (1, count, heads) if heads % g == 0]),
            "head_dim": groupsize,
            "hidden_size": heads * groupsize,
            "intermediate_size": count * groupsize * draw.randint(1, 5),
            "num_hidden_layers": 1,
        }
        path = random_llama(tmp_path / str(n), **shape)
        path = quantised(path, "--mode", "int4", "--groupsize", str(groupsize), "--head", "int4")
        checkpoint = Checkpoint(path)
        whole = meta_model(checkpoint.args, checkpoint.scheme)
        checkpoint.load_into(whole)
        for rank in range(count):
            ranks = Ranks(rank, count)
            model = rank_of(path, ranks)
            for name, part in cut_linears(checkpoint.args, ranks):
                theirs = whole.get_submodule(name)
                mine = model.get_submodule(name)
                mine = getattr(mine, "shard", mine)
                for key, values in sharded_then_packed(theirs, part).items():
                    assert torch.equal(getattr(mine, key), values), (shape, rank, name, key)


def cut_linears(args: ModelArgs, ranks: Ranks) -> Iterator[tuple[str, tp.ShardSlice]]:
    for name, part in tp.shard_slices(args, ranks):
        if name == "output":
            yield name, part
        elif not name.endswith("w1"):
            yield from ((f"layers.{n}.{name}", part) for n in range(args.n_layers))


def sharded_then_packed(linear: Int4Linear, part: tp.ShardSlice) -> dict[str, Tensor]:
    """Cut an int4 linear's unpacked numbers, and pack them again."""
    S, rows = linear.groupsize, slice(None)
    q, zeros = unpack_nibbles(linear.weight), unpack_nibbles(linear.zeros)
    if part.rows:
        rows = torch.cat([torch.arange(r.start, r.stop) for r in part.rows])
    inputs = part.columns or range(linear.in_features)
    groups = slice(inputs.start // S, -(-inputs.stop // S))
    return {
        "weight": pack_nibbles(q[rows][:, groups.start * S : groups.stop * S]),
        "scales": linear.scales[rows][:, groups],
        "zeros": pack_nibbles(zeros[rows][:, groups]),
    }


@pytest.mark.parametrize("name", ["demo", "demo-opt", "demo-int8", "demo-int4"])
def test_no_more_is_read_than_is_kept(
    name: str, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    read = []
    transfer = formats.transfer

    def counting(*given: Any) -> int:
        read.append(transfer(*given))
        return read[-1]

    monkeypatch.setattr(formats, "transfer", counting)
    model = rank_of(checkpoints[name], Ranks(1, 2))
    checkpoint = Checkpoint(checkpoints[name])
    stored = {n: checkpoint.tensors[tp.checkpoint_name(n)].dtype for n in stored_tensors(model)}
    kept = sum(t.numel() * stored[n].itemsize for n, (t, _) in stored_tensors(model).items())
    assert sum(read) <= 1.02 * kept


SCHEMES = [None, make_scheme("int8"), *(make_scheme("int4", S, "int4") for S in (32, 64, 128))]
WIDTHS = (32, 64, 96, 128, 192, 256)  # heads times their channels, or neurons


def small_models() -> Iterator[tuple[dict[str, int], dict[str, Any] | None, int]]:
    """Yield shapes of wo's and w2's shards, schemes, and numbers of ranks that divide them."""
    draw = random.Random(SEED)
    for count, width, scheme in itertools.product((2, 3, 4), WIDTHS, SCHEMES):
        every = [n for n in (count, 2 * count) if width % n == 0 and width // n % 2 == 0]
        for heads in draw.sample(every, min(1, len(every))):
            shape = {
                "num_attention_heads": heads,
                "num_key_value_heads": 2 if heads % 2 == 0 and count <= 2 else heads,
                "head_dim": width // heads,
                "intermediate_size": width,
            }
            if not tp.indivisible_reason(model_args(SMALL | shape), scheme, count):
                yield shape, scheme, count


SMALL = {
    "model_type": "llama",
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "max_position_embeddings": 8,
    "attention_bias": True,
    "mlp_bias": True,
}


def random_values(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.randint(0, 127, t.shape).to(t.dtype)
        if not t.is_floating_point()
        else torch.rand(t.shape).to(t.dtype)
        for name, (t, _) in stored_tensors(model).items()
    }


def dense_weight(linear: torch.nn.Module) -> Tensor:
    return linear.weight if isinstance(linear, Linear) else linear.dequantize(torch.float32)


def test_a_share_is_the_share_of_the_dense_weights(tmp_path: Path):
    """Includes two groups on two ranks, where a shard's zero points have the whole's shape."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    tried = 0
    for shape, scheme, count in small_models():
        config, path = SMALL | shape, tmp_path / "model.pth"
        whole = meta_model(model_args(config), scheme)
        save_checkpoint(path, config, scheme, random_values(whole))
        checkpoint = Checkpoint(path)
        checkpoint.load_into(whole)
        for rank in range(count):
            tried += 1
            model = rank_of(path, Ranks(rank, count))
            for name, part in cut_linears(checkpoint.args, Ranks(rank, count)):
                theirs, mine = whole.get_submodule(name), model.get_submodule(name)
                rows = [n for r in part.rows for n in r] if part.rows else slice(None)
                columns = slice(part.columns.start, part.columns.stop) if part.columns else ...
                wanted = dense_weight(theirs)[rows][:, columns]
                case = shape, scheme, count, rank, name
                found = dense_weight(getattr(mine, "shard", mine))
                assert torch.equal(found, wanted), case
                if theirs.bias is not None:
                    assert torch.equal(mine.bias, theirs.bias[rows]), case
    assert tried > 100
