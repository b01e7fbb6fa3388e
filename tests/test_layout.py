"""The house in order: who imports whom, how long functions are, which options there are."""

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from cli import options

ROOT = Path(__file__).resolve().parent.parent
# What each file of the root may import of the others, directly: downwards only.
FLOORS = {
    "model": set(),
    "disk": set(),
    "ring": {"disk"},
    "policy": set(),
    "tiered_cache": {"disk", "model", "policy", "ring"},
    "ranks": set(),
    "links": set(),
    "probe": {"disk", "model"},
    "reads": set(),
    "controller": {"ranks"},
    "command": {"ranks"},
    "files": set(),
    "hf": {"command", "files", "model"},
    "quantized": {"files", "model"},
    "quantized_cache": {"model", "quantized"},
    "gpu_products": {"model", "quantized", "quantized_cache"},
    "neurons": {"disk", "quantized", "reads"},
    "formats": {"files"},
    "foreign": {"files", "quantized"},
    "generation_config": set(),
    "arguments": {"generation_config"},
    "chat_template": set(),
    "jobs": {"chat_template", "command", "files"},
    "host": set(),
    "hub": {"command", "files"},
    "measurements": {"command", "files"},
    "cpu_products": {"command", "disk", "measurements", "model", "quantized"},
    "compiled": {"cpu_products", "model", "quantized", "ranks"},
    "neuron_products": {"cpu_products", "neurons", "ring"},
    "model_defaults": {"files", "generation_config"},
    "options": {"arguments", "generation_config", "links"},
    "special_tokens": {"files"},
    "vocabulary": {"special_tokens"},
    "tokenizer": {"chat_template", "files", "special_tokens", "vocabulary"},
    "terminal": set(),
    "chat": {"chat_template", "command", "ranks", "terminal", "tokenizer"},
    "processors": {"generation_config"},
    "sampling": {"generation_config", "processors"},
    "completion": {"generation_config", "sampling", "tokenizer"},
    "weight_files": {"files"},
    "checkpoint": {
        "command", "disk", "files", "foreign", "formats", "hf", "quantized", "weight_files",
    },
    "pack": {"checkpoint", "files", "model", "neurons"},
    "gptq": {"checkpoint", "model", "quantized"},
    "offload": {"checkpoint", "cpu_products", "disk", "model", "policy", "quantized", "ring"},
    "decoding": {"checkpoint", "model", "controller", "sampling", "tokenizer"},
    "tp": {"checkpoint", "decoding", "formats", "model", "offload", "quantized", "ranks"},
    "pp": {"checkpoint", "decoding", "model", "offload", "quantized", "ranks", "sampling"},
    "planner": {"checkpoint", "decoding", "disk", "policy", "probe"},
    "speculate": {"decoding", "model", "controller", "sampling"},
    "bench": {"checkpoint", "decoding", "disk", "generation_config", "measurements", "model"},
    "window": {
        "bench", "checkpoint", "disk", "measurements", "neuron_products", "neurons", "pack",
        "probe", "ring",
    },
    "sparse": {
        "checkpoint", "disk", "model", "neuron_products", "neurons", "pack", "reads", "ring",
        "window",
    },
    "load": {
        "checkpoint", "compiled", "cpu_products", "decoding", "files", "gpu_products", "hf",
        "model", "offload", "controller", "pack", "policy", "pp", "quantized", "quantized_cache", "ranks",
        "sparse", "speculate", "tiered_cache", "tokenizer", "tp",
    },
    "predictor": {"checkpoint", "gptq", "load", "model", "neurons", "quantized", "ring"},
    "plan": {
        "bench", "checkpoint", "command", "decoding", "disk", "hf", "links", "load", "measurements",
        "model", "offload", "planner", "policy", "probe", "quantized", "ring", "tokenizer", "tp",
    },
    "distill": {"checkpoint", "gptq", "load", "model", "quantized"},
    "calibrate": {"checkpoint", "distill", "files", "gptq", "load", "model", "tokenizer"},
    "flash": {
        "calibrate", "checkpoint", "command", "disk", "files", "gptq", "host", "load", "model",
        "neurons", "options", "pack", "predictor", "sparse",
    },
    "quantize": {
        "calibrate", "checkpoint", "command", "cpu_products", "host", "load", "model", "options",
        "quantized",
    },
    "scoring": {"checkpoint", "decoding", "load", "model", "ranks"},
    "finite": {"decoding", "model", "ranks"},
    "generate": {
        "bench", "chat", "checkpoint", "command", "compiled", "completion", "decoding", "files",
        "finite", "flash", "generation_config", "host", "hub", "jobs", "load", "model",
        "model_defaults", "options", "plan", "pp", "processors", "quantized", "ranks", "sampling",
        "speculate", "tokenizer",
    },
    "harness": {"completion", "decoding", "generate", "generation_config", "scoring"},
    "eval": {
        "checkpoint", "command", "decoding", "files", "harness", "host", "hub", "load", "options",
        "ranks", "scoring",
    },
}  # fmt: skip
PARSERS = {
    "eval.py": options.parse_eval_args,
    "flash.py": options.parse_flash_args,
    "generate.py": options.parse_args,
    "quantize.py": options.parse_quantize_args,
}
ROOT_FILES = sorted(ROOT.glob("*.py"))
KERNEL_FILES = sorted((ROOT / "kernels").rglob("*.py"))
ALL_FILES = [
    *ROOT_FILES,
    *KERNEL_FILES,
    *sorted(
        f for folder in ("scripts", "benchmarks", "tests") for f in (ROOT / folder).glob("*.py")
    ),
]


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_every_file_has_its_floor_and_is_packaged():
    names = {file.stem for file in ROOT_FILES}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert names == set(FLOORS) == set(project["tool"]["setuptools"]["py-modules"])


@pytest.mark.parametrize("file", ROOT_FILES, ids=lambda file: file.name)
def test_imports_go_downwards(file: Path):
    upstairs = {"scripts", "benchmarks", "tests", "conftest"}
    ours = imported(file) & (set(FLOORS) | upstairs)
    assert ours == FLOORS[file.stem]


@pytest.mark.parametrize("file", KERNEL_FILES, ids=lambda file: file.name)
def test_kernels_import_no_file_of_the_root(file: Path):
    assert not imported(file) & set(FLOORS)


def test_the_floors_have_no_cycle():
    below: dict[str, set[str]] = {}
    while len(below) < len(FLOORS):
        ready = {n for n, needs in FLOORS.items() if n not in below and needs <= below.keys()}
        assert ready, f"a cycle among {FLOORS.keys() - below.keys()}"
        below |= {name: FLOORS[name] for name in ready}


@pytest.mark.parametrize("file", ALL_FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_habits(file: Path):
    module = tree(file)
    assert ast.get_docstring(module), "no docstring"
    for node in ast.walk(module):
        assert not isinstance(node, ast.Global), f"global in line {node.lineno}"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"bare except in line {node.lineno}"
        if isinstance(node, ast.FunctionDef):
            # A kernel's arguments, one a line with its shape, do not count.
            assert node.end_lineno - node.body[0].lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("file", ROOT_FILES, ids=lambda file: file.name)
def test_importing_changes_no_setting_of_torch(file: Path):
    for node in tree(file).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        calls = node.value if isinstance(node, ast.Expr) else None
        assert not any(ast.unparse(t).startswith("torch.") for t in targets)
        called = ast.unparse(calls.func) if isinstance(calls, ast.Call) else ""
        assert not re.match(r"torch\.(set_|manual_seed|use_)", called)


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^torchrun .*?(?=\w+\.py)", "python ", line) for line in lines]
    return [line.partition("  #")[0] for line in lines if line.startswith("python ")]


def test_the_commands_of_the_readme_parse():
    commands = [shlex.split(line) for line in readme_commands()]
    assert len([c for c in commands if c[1] == "generate.py"]) >= 3
    for _, script, *args in commands:
        assert (ROOT / script).is_file(), script
        if script in PARSERS:
            PARSERS[script](args)


def test_the_readme_names_every_file_of_the_root():
    readme = (ROOT / "README.md").read_text()
    assert [f.name for f in ROOT_FILES if f"`{f.name}`" not in readme] == []


@pytest.mark.parametrize(
    "script",
    [*ROOT.glob("scripts/*.sh"), *ROOT.glob("benchmarks/*.sh"), ROOT / ".ci" / "run"],
    ids=lambda script: script.name,
)
def test_shell_scripts_parse_and_can_be_run(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o100
