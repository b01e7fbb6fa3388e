"""What host/torch_private.py uses of PyTorch: a failure here names what a new version changed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from host import torch_private

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = "torch._dynamo", "torch._inductor", "torch._C", "torch._subclasses"


def add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.register_buffer("kept", torch.zeros(4))


def test_a_shallow_copy_shares_tensors_and_no_dictionary():
    module = Holder()
    copied = torch_private.shallow_copy(module)
    assert copied.inner is not module.inner
    assert copied.inner.weight is module.inner.weight and copied.kept is module.kept
    copied.inner.weight = copied.inner.bias = copied.kept = None
    assert module.inner.weight is not None and module.kept is not None


def test_a_copy_has_other_buffers():
    module, other = Holder(), torch.ones(2)
    copied = torch_private.copy_with_buffers(module, {"kept": other})
    assert copied.kept is other and module.kept is not other
    assert list(copied.state_dict())[:1] == ["kept"]


def test_own_buffers_are_those_that_the_module_has_now():
    module = Holder()
    assert list(torch_private.own_buffers(module)) == ["kept"]
    module.kept = torch.ones(1)
    assert torch_private.own_buffers(module)["kept"] is module.kept


def test_a_marked_dimension_is_compiled_once_and_others_for_each_size():
    torch.compiler.reset()
    compiled = torch.compile(add_one, backend="eager", dynamic=False, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        torch_private.allow_recompiles(64)
        before = torch_private.compiled_graphs()
        for size in (3, 5, 9):
            x = torch.zeros(size)
            torch_private.mark_dynamic(x, 0)
            assert torch.equal(compiled(x), torch.ones(size))
        assert torch_private.compiled_graphs() == before + 1
        for rows in range(2, 14):  # more than torch's own limit of 8, where fullgraph is an error
            compiled(torch.zeros(rows, 2))
        assert torch_private.compiled_graphs() == before + 13


def test_inductor_compiles_a_traced_graph():
    torch_private.import_dynamo()
    torch_private.import_inductor()
    torch.compiler.reset()
    graphs = []

    def backend(traced, examples):
        graphs.append(torch_private.compile_with_inductor(traced, examples, {"cpp.simdlen": 1}))
        return graphs[0]

    x = torch.arange(4.0)
    with torch.no_grad():
        assert torch.equal(torch.compile(add_one, backend=backend)(x), x + 1)
    assert torch.equal(graphs[0](x + 1)[0], x + 2)  # as compiled.py calls it past Dynamo


def test_triton_options():
    assert torch_private.has_triton_option("unique_kernel_names")
    assert not torch_private.has_triton_option("no_such_option")


@pytest.mark.parametrize("M, N, K", [(1, 1, 32), (3, 17, 64), (8, 100, 2048)])
def test_int8_product(M: int, N: int, K: int):
    torch.manual_seed(11)
    x, weight = torch.randn(M, K).bfloat16(), torch.randint(-128, 128, (N, K), dtype=torch.int8)
    wanted = (x.double() @ weight.double().t()).float()
    bound = x.double().abs() @ weight.double().abs().t()
    error = (torch_private.int8_product(x, weight).float() - wanted).abs()
    assert (error <= 2**-8 * wanted.abs() + 2**-18 * bound).all()


def test_fake_tensors_are_saved_as_holes_and_found_in_the_file(tmp_path: Path):
    file = tmp_path / "hole.pth"
    with torch_private.fake_tensors():
        hole = torch.empty(3, dtype=torch.float32, device="cpu")
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"x": hole}, file)
    loaded = torch.load(file, map_location="meta", weights_only=True)["x"]
    offset = torch_private.offset_in_file(loaded.untyped_storage())
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes())
    assert torch.load(file, weights_only=True)["x"].tolist() == [1, 2, 3]
    torch.save({"x": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    old = torch.load(file, map_location="meta", weights_only=True)["x"]
    assert torch_private.offset_in_file(old.untyped_storage()) is None


def test_ranks_share_a_number(tmp_path: Path):
    """In a process of its own: a process group cannot be made twice."""
    script = f"""
import torch.distributed as dist
from host.torch_private import add_in_store
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
print([add_in_store("line", 1), add_in_store("line", 1), add_in_store("other", 1)])
dist.destroy_process_group()
"""
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "[1, 2, 1]\n"


def test_symmetric_memory_has_what_is_called():
    """The sum itself needs two GPUs; this finds a name that has gone."""
    symmetric_memory = pytest.importorskip("torch.distributed._symmetric_memory")
    for name in ("enable_symm_mem_for_group", "empty", "rendezvous"):
        assert callable(getattr(symmetric_memory, name))
    assert torch.ops.symm_mem.one_shot_all_reduce


def test_no_other_module_uses_what_is_private():
    """Except tests and benchmarks, of which some look at the compiler's work."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if parts[0] in ("tests", "benchmarks", ".venv") or path.name == "torch_private.py":
            continue
        text = path.read_text()
        if path.name == "tp.py":  # see host/torch_private.py
            text = text.replace("torch.distributed._functional_collectives", "")
        private = (
            *PRIVATE,
            "torch.distributed._",
            "_symmetric_memory",
            "_get_default_store",
            "._buffers",
            "._modules",
        )
        found += [f"{path}: {name}" for name in private if name in text]
    assert not found


def test_the_compiler_is_not_imported_before_it_is_needed():
    script = "import sys, host.torch_private; print('torch._inductor' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"
