"""What every test file shares: the repository on the path, and where the test data lies."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "1"  # see compiled.cpu_options
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker, and what it starts, has a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if TYPE_CHECKING:
    from hub_server import Hub

ROOT = Path(__file__).resolve().parent.parent
# The files that `./scripts/test.sh --fast` runs: unit tests that compile nothing, train nothing and
# start no process that imports torch. All other files are marked slow.
FAST = {
    f"test_{name}.py"
    for name in (
        "config damaged_weights layout links model_defaults neuron_products quantized_cache "
        "sampling weight_files"
    ).split()
}
# The files that take longest, in the order in which workers take them: one that begins last would
# keep one core busy and leave the others idle.
LONGEST = [
    f"test_{name}.py"
    for name in (
        "windows speculate families_modes flash tp offload on_pretended_cuda config_keys "
        "compaction instruction_sets harness generate prepare first_minutes ranks eval compiled"
    ).split()
]
sys.path.insert(0, str(ROOT))
# A shell lets what it starts in the background ignore Ctrl-C, and so would the programs tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


def is_slow(file: Path) -> bool:
    return file.name.startswith("test_") and file.name not in FAST


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With -m "not slow" slow files are not even imported, which would take ten seconds."""
    return True if config.option.markexpr == "not slow" and is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of files outside FAST as slow, and put those of LONGEST first."""
    order = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    path = Path(os.environ.get("GPT_FLEX_DATA", ROOT / ".." / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}: set GPT_FLEX_DATA")
    return path


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Of products, which are shared among threads, whatever else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def forgetful_compiler() -> Iterator[None]:
    """What one file compiles does not count towards another's limit of recompilations."""
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that saves the model of a variant of families.py, once, and returns its folder."""
    import families

    folder = tmp_path_factory.mktemp("families")

    def save(variant: str) -> Path:
        if not (folder / variant).exists():
            families.save(families.reference(variant), folder / variant)
        return folder / variant

    return save


@pytest.fixture(scope="session")
def hub_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from hub_server import repository_files

    return repository_files(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def hub(hub_files: dict[str, bytes]) -> "Iterator[Hub]":
    """A Hugging Face hub on this machine that serves one repository."""
    from hub_server import Hub

    with Hub() as server:
        server.files = dict(hub_files)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
