"""Damaged files of every kind: each works, or is refused in one line, within limits.

Start at KINDS, the table of what is damaged, how often, and what is done with it. All of it is
seeded; the seed is printed, and GPT_FLEX_FUZZ_SEED sets another. Counts of the outcomes are printed
at the end of each kind. A failure names the file, what was done to it, and where the error arose.
"""

import copy
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
from common import ROOT
from safetensors.torch import save
from tokenizers import decoders, models, pre_tokenizers, trainers

from cli.command import MISTAKES
from engine import generate
from load import load_model
from model import Transformer
from quant.linear import make_scheme, quantized_copy
from text.generation_config import GenerationConfig
from text.jobs import Provenance, ResultsFile, make_jobs, read_prompts
from text.tokenizer import load_tokenizer
from weights.hf import export_tensors, model_args

SEED = int(os.environ.get("GPT_FLEX_FUZZ_SEED", "0"))
SECONDS = 5  # of this process's computing, for one input
MEMORY = 1 << 30  # bytes of address space that an input may take beside what there is
LONGEST = 2000  # characters of a message

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems limit otherwise")
Files = dict[str, bytes]  # of a checkpoint's folder, by name


# --- what is damaged: small checkpoints

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": None,
    "torch_dtype": "float32",
    "architectures": ["AnyForCausalLM"],
}
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA = SHAPE | {
    "model_type": "llama",
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rope_scaling": ROPE,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
MISTRAL = LLAMA | {
    "model_type": "mistral",
    "sliding_window": 32,
    "tie_word_embeddings": True,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}
OPT = SHAPE | {
    "model_type": "opt",
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "do_layer_norm_before": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "enable_bias": True,
    "tie_word_embeddings": True,
}
CONFIGS = LLAMA, MISTRAL, OPT
GENERATION = {"do_sample": True, "temperature": 0.7, "top_k": 5, "eos_token_id": [2], "top_p": 0.9}
TEXT = "Once upon a time there was a little girl. She had a red hat, and a dog named Bo. " * 20
SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "special": True},
    "unk_token": "<unk>",
    "add_bos_token": True,
    "chat_template": TEMPLATE,
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True, "lstrip": False}},
    "model_max_length": 64,
    "tokenizer_class": "LlamaTokenizer",
}
SPECIAL_MAP = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
ADDED = {"<|im_start|>": 290, "<|im_end|>": 291}


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def tensors_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    exported = export_tensors(Transformer(model_args(config)).state_dict(), config)
    return {name: tensor.clone() for name, tensor in exported.items()}


def json_tokenizer() -> bytes:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str().encode()


def gpt2_files(tokenizer: bytes) -> Files:
    model = json.loads(tokenizer)["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    return {"vocab.json": dumped(model["vocab"]), "merges.txt": merges.encode()}


def sentencepiece_tokenizer() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split(". ")),
        model_writer=model,
        vocab_size=290,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
    return model.getvalue()


TENSORS = [tensors_of(config) for config in CONFIGS]
TOKENIZER = {"tokenizer.json": json_tokenizer()}
SENTENCEPIECE = {"tokenizer.model": sentencepiece_tokenizer()}
RANKS = {"tokenizer.model": b"".join(b64encode(bytes([i])) + b" %d\n" % i for i in range(256))}
MERGES = gpt2_files(TOKENIZER["tokenizer.json"])
BASES: list[Files] = [
    {"config.json": dumped(config), "model.safetensors": save(tensors), **TOKENIZER}
    for config, tensors in zip(CONFIGS, TENSORS, strict=True)
]


def pickled(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def prepared(mode: str | None) -> dict[str, Any]:
    """What a model.pth holds."""
    torch.manual_seed(0)
    model, scheme = Transformer(model_args(LLAMA)), make_scheme(mode) if mode else None
    model = quantized_copy(model, scheme) if scheme else model
    return {"config": LLAMA, "scheme": scheme, "tensors": dict(model.state_dict())}


PREPARED = [prepared(mode) for mode in (None, "int8", "int4")]


# --- how it is damaged

NESTED: Any = []
for _ in range(40):
    NESTED = [NESTED]
WRONG = (
    [None, True, False, "", "x", "nan", "torch.float32", "\ud800", "\0", "é" * 5000]
    + [0, -1, 1, 2, 3, 7, 64, 2**16, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400]
    + [0.0, -0.5, 0.5, 1e-320, 1e30, math.inf, -math.inf, math.nan]
    + [[], {}, [0], ["x"], {"content": None}, {"x": 0}, [None], NESTED]
)
INSERTS = [
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xff",
    b"\0",
    b"\xed\xa0\x80",
    b'"\\ud800"',
    b"NaN",
    b"1e999",
] + [b"\n", b"\r\n", b"{}", b"null", b'"x":', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000]
Parent = dict | list


def replace(rng: random.Random, parent: Parent, key: Any) -> None:
    parent[key] = copy.deepcopy(rng.choice(WRONG))


def delete(rng: random.Random, parent: Parent, key: Any) -> None:
    del parent[key]


def rename(rng: random.Random, parent: Parent, key: Any) -> None:
    if isinstance(parent, dict):
        parent[f"{key}_"] = parent.pop(key)


def repeat(rng: random.Random, parent: Parent, key: Any) -> None:
    """The value takes the place of another."""
    others = list(parent) if isinstance(parent, dict) else range(len(parent))
    parent[rng.choice(others)] = copy.deepcopy(parent[key])


def scale(rng: random.Random, parent: Parent, key: Any) -> None:
    if isinstance(parent[key], (int, float)):
        parent[key] = parent[key] * rng.choice([2, 1024, 2**20, -1, 0.5])
    else:
        replace(rng, parent, key)


ACTS = [replace] * 6 + [delete, rename, repeat, scale, scale]


def places(value: Any) -> Iterator[tuple[Parent, Any]]:
    """Each container within a value that JSON can hold, with each of its keys."""
    for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(child, (dict, list)):
            yield from places(child)


def damage_value(rng: random.Random, value: Any, acts: list = ACTS) -> tuple[Any, str]:
    """A copy in which something is wrong, and what."""
    value = copy.deepcopy(value)
    parent, key = rng.choice(list(places(value)))
    act = rng.choice(acts)
    act(rng, parent, key)
    now = parent.get(key) if isinstance(parent, dict) else parent
    return value, f"{act.__name__} {key}: {str(now)[:60]!r}"


def flip(rng: random.Random, data: bytearray, at: int) -> None:
    for _ in range(rng.choice([1, 1, 8])):
        data[rng.randrange(at, len(data))] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, data: bytearray, at: int) -> None:
    del data[at:]


def cut(rng: random.Random, data: bytearray, at: int) -> None:
    del data[at : at + rng.choice([1, 8, 100])]


def insert(rng: random.Random, data: bytearray, at: int) -> None:
    data[at:at] = rng.choice(INSERTS)


def double(rng: random.Random, data: bytearray, at: int) -> None:
    data[at:at] = data[at : at + rng.choice([1, 8, 100])]


def fill(rng: random.Random, data: bytearray, at: int) -> None:
    end = min(len(data), at + rng.choice([1, 8, 64]))
    data[at:end] = bytes([rng.choice([0, 255])]) * (end - at)


def damage_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Somewhere, and as often at the beginning, where headers are."""
    damaged, act = bytearray(data), rng.choice([flip, flip, truncate, cut, insert, double, fill])
    most = rng.choice([1, 64, 2000, len(data)])
    at = rng.randrange(max(1, min(most, len(data))))
    if data:
        act(rng, damaged, at)
    return bytes(damaged), f"{act.__name__} at byte {at}"


def damage_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    if rng.random() < 0.2:
        return damage_bytes(rng, data)
    value, what = damage_value(rng, json.loads(data))
    return dumped(value), what


def damaged(
    rng: random.Random, files: Files, name: str, how: Callable = damage_json
) -> tuple[Files, str]:
    content, what = how(rng, files[name])
    return files | {name: content}, f"{name}: {what}"


# --- each kind: what it makes


def configs(rng: random.Random) -> tuple[Files, str]:
    files = rng.choice(BASES)
    name = rng.choice(["config.json"] * 5 + ["generation_config.json"])
    return damaged(rng, files | {"generation_config.json": dumped(GENERATION)}, name)


def damage_safetensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    if rng.random() < 0.4:
        return damage_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header, what = damage_value(rng, json.loads(data[8 : 8 + size]))
    text = dumped(header)
    return len(text).to_bytes(8, "little") + text + data[8 + size :], what


def safetensors(rng: random.Random) -> tuple[Files, str]:
    if rng.random() < 0.8:
        return damaged(rng, rng.choice(BASES), "model.safetensors", damage_safetensors)
    index = {"weight_map": dict.fromkeys(TENSORS[0], "model.safetensors"), "metadata": {}}
    name = "model.safetensors.index.json"
    return damaged(rng, BASES[0] | {name: dumped(index)}, name)


TENSOR_ACTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    "not contiguous": lambda t: t.t().contiguous().t() if t.dim() == 2 else t[::1],
    "transposed": lambda t: t.t() if t.dim() == 2 else t,
    "a row less": lambda t: t[1:],
    "a dimension more": lambda t: t[None],
    "a scalar": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
    "float64": torch.Tensor.double,
    "float16": torch.Tensor.half,
    "int64": torch.Tensor.long,
    "bool": torch.Tensor.bool,
    "complex": lambda t: t.to(torch.complex64),
    "sparse": torch.Tensor.to_sparse,
    "on meta": lambda t: t.to("meta"),
    "NaN": lambda t: torch.full_like(t.float(), math.nan),
    "infinite": lambda t: torch.full_like(t.float(), math.inf),
    "huge": lambda t: torch.full_like(t.float(), 3e38),
    "expanded": lambda t: t.flatten()[:1].expand(t.numel()).view(t.shape),
    "a list": lambda t: t.tolist(),
    "a string": lambda t: "x",
    "nothing": lambda t: None,
}


def damage_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> tuple[dict, str]:
    name, act = rng.choice(list(tensors)), rng.choice([*TENSOR_ACTS, *["missing", "renamed"] * 2])
    rest = {n: t for n, t in tensors.items() if n != name}
    if act == "renamed":
        other = rng.choice([f"{name}_", "", 7, None, f"model.{name}", "layers.99.x"])
        return rest | {other: tensors[name]}, f"{name} is renamed {other}"
    if act != "missing":
        rest[name] = TENSOR_ACTS[act](tensors[name])
    return rest, f"{name} is {act}"


def old_or_new(rng: random.Random) -> dict[str, Any]:
    return {"_use_new_zipfile_serialization": rng.random() < 0.8}


def bins(rng: random.Random) -> tuple[Files, str]:
    number = rng.randrange(len(CONFIGS))
    files = {n: d for n, d in BASES[number].items() if n != "model.safetensors"}
    if rng.random() < 0.4:
        data, what = damage_bytes(rng, pickled(TENSORS[number], **old_or_new(rng)))
    else:
        tensors, what = damage_tensors(rng, TENSORS[number])
        data = pickled(tensors, **old_or_new(rng))
    return files | {"pytorch_model.bin": data}, f"pytorch_model.bin: {what}"


def prepared_files(rng: random.Random) -> tuple[Files, str]:
    content, what = rng.choice(PREPARED), ""
    part = rng.choice(["config", "scheme", "tensors", "bytes", "whole"])
    if part == "tensors":
        tensors, what = damage_tensors(rng, content["tensors"])
        content = content | {"tensors": tensors}
    elif part in ("config", "scheme"):
        value, what = damage_value(rng, {part: content[part]})
        content = {k: v for k, v in content.items() if k != part} | value
    elif part == "whole":
        content, what = damage_value(rng, {k: v for k, v in content.items() if k != "tensors"})
        content["tensors"] = rng.choice([PREPARED[0]["tensors"], {}, None, [1]])
    data = pickled(content, **old_or_new(rng))
    if part == "bytes":
        data, what = damage_bytes(rng, data)
    return TOKENIZER | {"model.pth": data}, f"model.pth, {part}: {what}"


def tokenizer_files(rng: random.Random) -> tuple[Files, str]:
    beside = {
        "config.json": dumped(LLAMA),
        "tokenizer_config.json": dumped(TOKENIZER_CONFIG),
        "special_tokens_map.json": dumped(SPECIAL_MAP),
        "added_tokens.json": dumped(ADDED),
    }
    files = rng.choice([TOKENIZER, SENTENCEPIECE, RANKS, MERGES]) | beside
    name = rng.choice([*files, "tokenizer_config.json"])
    how = damage_json if name.endswith(".json") else damage_bytes
    return damaged(rng, files, name, how)


ORIGIN = Provenance("model", "hash", {"seed": 0})
ROWS = [
    {
        "index": i,
        "sample": 0,
        "prompt": f"Once {i}",
        "text": " x",
        "tokens": 1,
        "finish_reason": "stop",
    }
    | ORIGIN.fields()
    for i in range(3)
]
PROMPTS = [row["prompt"] for row in ROWS]


def damage_rows(rng: random.Random, rows: list) -> tuple[bytes, str]:
    rows, what = damage_value(rng, rows)
    rows = rows if isinstance(rows, list) else [rows]
    data = b"".join(dumped(row) + b"\n" for row in rows)
    return (data, what) if rng.random() < 0.75 else damage_bytes(rng, data)


def prompt_files(rng: random.Random) -> tuple[Files, str]:
    if rng.random() < 0.4:
        data, what = damage_bytes(rng, "Once\n\nzwei é 你好\r\n three 😀\n".encode())
        return TOKENIZER | {"prompts.txt": data}, what
    rows = rng.choice([PROMPTS, ROWS, [{"prompt": p} for p in PROMPTS]])
    data, what = damage_rows(rng, rows)
    return TOKENIZER | {"prompts.jsonl": data}, what


def output_files(rng: random.Random) -> tuple[Files, str]:
    data, what = damage_rows(rng, ROWS)
    return {"out.jsonl": data}, what


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "prints": "{% for a in range(99999) %}{% for b in range(99999) %}xxxx{% endfor %}{% endfor %}",
    "pads": "{{ '%999999999d' | format(1) }}",
    "pads to the left": "{{ 'x'.rjust(99999999999) }}",
    "multiplies": "{{ 'x' * 9999999999 }}",
    "doubles": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}"
    "{% endfor %}{{ n.s }}",
    "takes a power": "{{ 9 ** (9 ** 8) }}",
    "calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "nests": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "joins": "{{ range(99999) | list | join('x' * 99999) }}",
    "indents": "{{ messages | tojson(indent=999999999) }}",
    "imports": "{% include 'x' %}{% import 'os' as os %}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "divides": "{{ 1 // 0 }}",
}


def templates(rng: random.Random) -> tuple[Files, str]:
    data, what = damage_bytes(rng, TEMPLATE.encode())
    return TOKENIZER | {"chat_template.jinja": data}, what


# --- each kind: what is done with it


class Unnoticed(Exception):
    """A text was generated that means nothing."""


def generate_text(folder: Path) -> None:
    lm = load_model(folder, device="cpu")
    for _ in generate(lm, [[1, 2, 3]], GenerationConfig(max_new_tokens=2, temperature=0.0)):
        pass
    tokens, key_pos = torch.tensor([[1, 2, 3]]), torch.arange(3)
    with torch.no_grad():
        logits = lm.model(tokens, key_pos[None], key_pos, lm.model.make_caches(1, 3))
    if not logits.isfinite().all():
        raise Unnoticed("the logits are not finite")


def tokenize(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in ("Once upon a time", "é 你好 😀\n<s></s><|im_start|>\0", ""):
        tokenizer.decode(tokenizer.encode(text, special=True))
    tokenizer.decode(range(tokenizer.vocab_size + 2))
    if tokenizer.chat_template is not None:
        chat(folder)


def chat(folder: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    load_tokenizer(folder).apply_chat_template(messages)


def read_and_encode(folder: Path) -> None:
    (path,) = folder.glob("prompts.*")
    prompts, tokenizer = read_prompts(path), load_tokenizer(folder)
    make_jobs([(prompt, tokenizer.encode(prompt)) for prompt in prompts], 1, 9, 512)


def go_on(folder: Path) -> None:
    ResultsFile(folder / "out.jsonl", PROMPTS, 1, ORIGIN)


@dataclass(frozen=True)
class Kind:
    name: str
    count: int
    make: Callable[[random.Random], tuple[Files, str]]  # the files, and what is wrong with them
    use: Callable[[Path], None]


KINDS = (
    Kind("configs", 300, configs, generate_text),
    Kind("model.pth", 80, prepared_files, generate_text),
    Kind("safetensors", 70, safetensors, generate_text),
    Kind("bin", 50, bins, generate_text),
    Kind("tokenizers", 100, tokenizer_files, tokenize),
    Kind("prompts", 60, prompt_files, read_and_encode),
    Kind("outputs", 60, output_files, go_on),
    Kind("templates", 40, templates, chat),
)


# --- how it ends


class TookTooLong(BaseException):
    """No Exception, so that nothing on the way takes it for an error of its own."""


def stop(*_: Any) -> None:
    raise TookTooLong(f"more than {SECONDS} s")


@contextmanager
def limits() -> Iterator[None]:
    """Of this process's time, which other programs do not use up, and of its address space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    before = signal.signal(signal.SIGPROF, stop)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fault_of(error: BaseException) -> str | None:
    """What is wrong with the line that the user gets to see; None: nothing."""
    length = len(" ".join(str(error).split()))
    if not 0 < length <= LONGEST:
        return f"its message has {length} characters"
    if isinstance(error, (UnicodeError, json.JSONDecodeError)):
        return f"it names no file: {error}"
    return None


def outcome(use: Callable[[Path], None], folder: Path) -> tuple[str, str | None]:
    """What came of it in a few words; and what is wrong with that, None: nothing."""
    try:
        with limits():
            use(folder)
    except MISTAKES as error:
        return f"refused, {type(error).__name__}", fault_of(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the panics of Rust libraries are no Exceptions
        ours = [
            f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))
        ]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].name}"
        return f"{type(error).__name__} in {place}", " ".join(str(error).split())[:100]
    return "worked", None


def write(folder: Path, files: Files) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damaged(kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture):
    counts, examples = Counter(), {}
    for number in range(kind.count):
        files, what = kind.make(random.Random(f"{SEED} {kind.name} {number}"))
        folder = write(tmp_path / "input", files)
        result, fault = outcome(kind.use, folder)
        counts[result] += 1
        if fault is not None and result not in examples:
            kept = folder.rename(tmp_path / f"input{number}")
            examples[result] = f"{fault}; {what}; {kept}"
    with capsys.disabled():
        listed = ", ".join(f"{n} {result}" for result, n in counts.most_common())
        print(f"\n{kind.name}, seed {SEED}: {listed}")
    assert not examples, "\n".join(f"{result}: {example}" for result, example in examples.items())


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_or_does_harm_is_refused(name: str, tmp_path: Path):
    files = TOKENIZER | {"chat_template.jinja": ENDLESS[name].encode()}
    result, _ = outcome(chat, write(tmp_path / "input", files))
    assert result == "refused, ValueError"
