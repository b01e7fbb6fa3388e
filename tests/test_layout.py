"""The house in order: imports go downwards, functions are short, the documents tell the truth."""

import ast
import re
import shlex
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from cli import options

ROOT = Path(__file__).resolve().parent.parent
# Packages and modules of the root, from the bottom up. One imports only what stands before it.
ORDER = (
    "options host kernels ranks layers model quant fast_layers weights text tiers checkpoint "
    "sampling decoding draft_length speculate finite compiled neurons offload tp pp load bench "
    "engine plan calibration evaluation cli generate eval quantize flash"
).split()
MAX_ROOT_MODULES = 20
MAX_IMPORTED = 25  # modules with code that `import generate` loads
HEAVY = "calibration evaluation tiers neurons plan compiled speculate tp pp offload".split()
MAX_PARAMETERS = 8
MAX_LINES = 50  # of a function, without its head and its docstring
MEDIAN_LINES, P90_LINES = 8, 20  # with its head
PARSERS = {
    "eval.py": options.parse_eval_args,
    "flash.py": options.parse_flash_args,
    "generate.py": options.parse_args,
    "quantize.py": options.parse_quantize_args,
}
PLACES = [
    [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").is_file() else (ROOT / name).rglob("*.py")
    for name in ORDER
]
HOUSE = sorted(file for place in PLACES for file in place)
TOOLS = sorted(f for d in ("scripts", "benchmarks", "tests") for f in (ROOT / d).glob("*.py"))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(file: Path) -> set[str]:
    """The modules and packages that a file imports, at its top or within a function, but not for
    types alone."""
    module = tree(file)
    blocks = [n for n in ast.walk(module) if isinstance(n, ast.If)]
    blocks = [n for n in blocks if "TYPE_CHECKING" in ast.unparse(n.test)]
    for_types = {id(inner) for block in blocks for inner in ast.walk(block)}
    found = set()
    for node in ast.walk(module):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if (ROOT / f"{name.replace('.', '/')}.py").is_file()}
            found |= modules if modules == inner else modules | {node.module}
    return found


def test_every_module_has_its_place_in_the_order():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    tops = {Path(name).parts[0].removesuffix(".py") for name in files.stdout.splitlines()}
    assert tops - {"scripts", "benchmarks", "tests"} == set(ORDER)
    modules = [name for name in ORDER if (ROOT / f"{name}.py").is_file()]
    assert len(modules) <= MAX_ROOT_MODULES
    assert not [name for name in modules if (ROOT / name / "__init__.py").exists()]


@pytest.mark.parametrize("file", HOUSE, ids=name_of)
def test_imports_go_downwards(file: Path):
    place = ORDER.index(file.relative_to(ROOT).parts[0].removesuffix(".py"))
    forbidden = {*ORDER[place + 1 :], "scripts", "benchmarks", "tests"}
    tops = {name.partition(".")[0] for name in imported(file)}
    assert not tops & forbidden


def test_no_modules_import_one_another():
    names = {name_of(f).removesuffix(".py").replace("/", "."): f for f in HOUSE}
    names = {name.removesuffix(".__init__"): file for name, file in names.items()}
    needs = {name: (imported(file) & names.keys()) - {name} for name, file in names.items()}
    # A package holds no code of its own that its modules could need, where it is all docstring.
    for found in needs.values():
        found -= {name for name in found if len(tree(names[name]).body) <= 1}
    settled: set[str] = set()
    while len(settled) < len(needs):
        ready = {name for name in needs.keys() - settled if needs[name] <= settled}
        assert ready, f"a circle: { {n: needs[n] - settled for n in needs.keys() - settled} }"
        settled |= ready


def loaded_by(program: str) -> set[str]:
    """The names of our modules with code that a program imports."""
    program += (
        "\nimport sys\nfor name, module in sys.modules.items():\n"
        "    if (getattr(module, '__file__', None) or '').startswith(sys.path[0] + '/'):\n"
        "        print(name, module.__file__)"
    )
    words = [sys.executable, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}\n{program}"]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [line.split(" ", 1) for line in lines if "site-packages" not in line]
    return {name for name, file in pairs if len(tree(Path(file)).body) > 1}


def test_a_plain_generation_imports_no_other_feature():
    """Neither GPTQ nor training, predictors, the planner or lm_eval; see load.py."""
    assert len(loaded_by("import generate")) <= MAX_IMPORTED
    compiler = "import generate, sys; assert not {'torch._dynamo', 'triton'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", compiler], cwd=ROOT, check=True)
    run = (
        "import generate\nlm = generate.load_model(device='cpu')\n"
        "generate.complete(lm, 'Once', generate.GenerationConfig(max_new_tokens=2))"
    )
    tops = {name.partition(".")[0] for name in loaded_by(run)}
    assert "engine" in tops
    assert not tops & {*HEAVY, "lm_eval"}


@pytest.mark.parametrize("file", [*HOUSE, *TOOLS], ids=name_of)
def test_habits(file: Path):
    module = tree(file)
    assert ast.get_docstring(module), "no docstring"
    for node in ast.walk(module):
        assert not isinstance(node, ast.Global), f"global in line {node.lineno}"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"bare except in line {node.lineno}"


def test_lines_of_cpp_are_short_and_files_say_what_they_are():
    """As ruff demands of Python."""
    files = [*ROOT.glob("kernels/cpu/*.h"), *ROOT.glob("kernels/cpu/*.cpp")]
    assert len(files) > 20
    for file in files:
        lines = file.read_text().splitlines()
        assert lines[0].startswith("// "), file
        assert max(map(len, lines)) <= 100, file


def defined(file: Path) -> set[str]:
    """The names that a module has at its top level. Those of comprehensions are among them."""
    found: set[str] = set()
    blocks = [tree(file).body]
    for block in blocks:  # the bodies of top-level statements are appended
        for node in block:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
                continue
            inner = ast.walk(node)
            found |= {n.id for n in inner if isinstance(n, ast.Name) and is_stored(n)}
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= {(a.asname or a.name).partition(".")[0] for a in node.names}
            blocks += [getattr(node, part, []) for part in ("body", "orelse", "handlers")]
    return found


def is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


@pytest.mark.parametrize("file", [*HOUSE, *TOOLS], ids=name_of)
def test_what_is_imported_exists(file: Path):
    """Also in benchmarks, most of which no test runs. Test files import one another by name."""
    for node in ast.walk(tree(file)):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        path = ROOT / node.module.replace(".", "/")
        if file.parent.name == "tests" and (file.parent / f"{node.module}.py").is_file():
            path = file.parent / node.module
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if source.is_file():
            for alias in node.names:
                module = (path / alias.name).with_suffix(".py").is_file()
                package = (path / alias.name).is_dir()
                exists = module or package or alias.name in defined(source)
                assert exists, f"{node.module} has no {alias.name}"


def functions(file: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef)]


def length(function: ast.FunctionDef) -> int:
    """Lines of a function, without those of its docstring."""
    first = function.body[0]
    documented = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) else 0
    return function.end_lineno - function.lineno + 1 - documented


def is_kernel(function: ast.FunctionDef) -> bool:
    """Triton's have a parameter for each pointer, stride and constant, one a line."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("file", [*HOUSE, *TOOLS], ids=name_of)
def test_functions_are_short_and_take_few_parameters(file: Path):
    for function in functions(file):
        body = function.body[bool(ast.get_docstring(function)) :]
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        assert lines <= MAX_LINES, f"{function.name} has {lines} lines"
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        given = [arg for arg in given if arg.arg not in ("self", "cls")]
        few = len(given) <= MAX_PARAMETERS or is_kernel(function)
        assert few, f"{function.name} takes {len(given)} parameters"


def test_most_functions_are_very_short():
    lengths = [length(function) for file in HOUSE for function in functions(file)]
    assert statistics.median(lengths) <= MEDIAN_LINES
    assert statistics.quantiles(lengths, n=10)[-1] <= P90_LINES


@pytest.mark.parametrize("file", HOUSE, ids=name_of)
def test_importing_changes_no_setting_of_torch(file: Path):
    for node in tree(file).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        calls = node.value if isinstance(node, ast.Expr) else None
        assert not any(ast.unparse(t).startswith("torch.") for t in targets)
        called = ast.unparse(calls.func) if isinstance(calls, ast.Call) else ""
        assert not re.match(r"torch\.(set_|manual_seed|use_)", called)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_in(document: Path) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^torchrun .*?(?=\w+\.py)", "torchrun ", line) for line in lines]
    lines = [line.partition("  #")[0] for line in lines]
    return [shlex.split(line) for line in lines if line.startswith(("python ", "torchrun "))]


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_the_commands_of_a_document_parse(document: Path, monkeypatch: pytest.MonkeyPatch):
    for starter, script, *args in commands_in(document):
        monkeypatch.setenv("WORLD_SIZE", "2" if starter == "torchrun" else "1")
        assert script.startswith("-") or (ROOT / script).is_file(), script
        if script in PARSERS:
            PARSERS[script](args)


def test_the_readme_is_short_and_names_every_part():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= 10_000
    assert len([c for c in commands_in(ROOT / "README.md") if c[1] == "generate.py"]) >= 3
    parts = [f"{name}.py" if (ROOT / f"{name}.py").is_file() else f"{name}/" for name in ORDER]
    assert [part for part in parts if f"`{part}`" not in readme] == []


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_the_links_of_a_document_lead_somewhere(document: Path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize(
    "script",
    [*ROOT.glob("scripts/*.sh"), *ROOT.glob("benchmarks/*.sh"), ROOT / ".ci" / "run"],
    ids=lambda script: script.name,
)
def test_shell_scripts_parse_and_can_be_run(script: Path):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o100
