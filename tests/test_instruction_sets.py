"""The CPU kernels give the same bits for every instruction set, on random shapes.

cpu_kernels.cpp runs the kernels without torch and prints checksums. It is compiled for the plain
form, which is the reference, for each instruction set that this CPU has, for ARM, which
qemu-aarch64 emulates, and for AVX-512, which functions of SIMDe emulate.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.cpu.build import FLAGS, FOLDER, INSTRUCTION_SETS, compiler, supported_sets

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
SEED = int(os.environ.get("GPT_FLEX_FUZZ_SEED", "1"))
CASES = 12
EMULATED_CASES = 6  # the first of them: an emulated program runs fifty times as long
# 11 products and attentions are printed twice; 3 norms, 3 GELUs, 3 SiLUs, 3 rotations, 4 sums of
# neurons and 3 packed matrices once.
LINES_PER_CASE = 2 * 11 + 4 * 3 + 4 + 3
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Return a function that compiles the program with a compiler and flags, and its path."""

    def compiled_as(name: str, cxx: str, *flags: str) -> Path:
        if not shutil.which(cxx):
            pytest.skip(f"{cxx} is not installed")
        program = tmp_path_factory.mktemp(name) / name
        command = [
            cxx,
            *FLAGS,
            "-std=c++17",
            *flags,
            f"-I{FOLDER}",
            str(SOURCE),
            "-o",
            str(program),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return program

    return compiled_as


def lines(*command: str | Path, cases: int = CASES) -> list[str]:
    done = subprocess.run(
        [*command, str(SEED), str(cases)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def expected(compiled: Compile) -> list[str]:
    """Return the lines of the plain form. With -O3 it would take 40 seconds to compile."""
    return lines(compiled("scalar", compiler(), *INSTRUCTION_SETS["scalar"].flags, "-Og"))


def assert_same(found: list[str], expected: list[str], cases: int = CASES) -> None:
    assert len(expected) == LINES_PER_CASE * CASES
    expected = expected[: LINES_PER_CASE * cases]
    assert len(found) == len(expected)
    different = [pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1]]
    assert not different, f"seed {SEED}: {different[:5]}"


@pytest.mark.parametrize("name", [name for name in INSTRUCTION_SETS if name != "scalar"])
def test_bits_are_those_of_the_plain_form(name: str, compiled: Compile, expected: list[str]):
    if name not in supported_sets():
        pytest.skip(f"this CPU lacks {name}")
    found = lines(compiled(name, compiler(), *INSTRUCTION_SETS[name].flags))
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["neon", "neon_dot"])
def test_arm_gives_the_same_bits_under_emulation(name: str, compiled: Compile, expected: list[str]):
    if not shutil.which(ARM_EMULATOR):
        pytest.skip(f"{ARM_EMULATOR} is not installed (Debian: qemu-user)")
    # -Og compiles in a quarter of the time of -O3, which the instruction sets of this CPU have.
    program = compiled(name, ARM_COMPILER, "-static", *INSTRUCTION_SETS[name].flags, "-Og")
    found = lines(ARM_EMULATOR, program, cases=EMULATED_CASES)
    assert_same(found, expected, EMULATED_CASES)


@pytest.mark.parametrize("name, flags", [("avx512", ()), ("avx512_vnni", ("-DEMULATED_VNNI",))])
def test_avx512_gives_the_same_bits_under_emulation(
    name: str, flags: tuple[str, ...], compiled: Compile, expected: list[str], tmp_path: Path
):
    if "avx2" not in supported_sets() or not Path("/usr/include/simde").is_dir():
        pytest.skip("needs AVX2 and SIMDe (Debian: libsimde-dev)")
    folder = tmp_path / "cpu"
    shutil.copytree(FOLDER, folder)
    vectors = folder / "vector_avx512.h"
    # Without -mavx512f, GCC takes an operand of 512 bits in memory ("+m"), not in a register.
    text = vectors.read_text()
    assert text.count('"+v"') == 1
    vectors.write_text(text.replace('"+v"', '"+m"'))
    emulation = "-include", str(SOURCE.with_name("emulated_avx512.h")), f"-I{folder}"
    avx2 = INSTRUCTION_SETS["avx2"].flags
    # -O0 compiles soonest; GCC warns that vectors of 512 bits are passed in memory.
    program = compiled(name, "g++", *avx2, "-O0", "-Wno-psabi", *emulation, *flags)
    assert_same(lines(program, cases=EMULATED_CASES), expected, EMULATED_CASES)


def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(expected: list[str]):
    """The program prints products and attention twice: of all rows, and row by row."""
    pairs = [line for line in expected if line.startswith(("int", "dense", "attention"))]
    assert len(pairs) == 2 * 11 * CASES
    assert pairs[::2] == pairs[1::2]


def test_the_chosen_set_is_the_best_or_the_one_of_the_variable(monkeypatch: pytest.MonkeyPatch):
    has = dict.fromkeys(("avx2", "fma3", "f16c", "bmi2"), True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("GPT_FLEX_ISA", raising=False)
    assert supported_sets() == ["avx2", "scalar"]
    has |= dict.fromkeys(("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"), True)
    has |= dict.fromkeys(("avx512_vnni", "avx_vnni"), True)
    assert supported_sets() == ["avx512_vnni", "avx512", "avx_vnni", "avx2", "scalar"]
    monkeypatch.setenv("GPT_FLEX_ISA", "avx2")
    assert supported_sets() == ["avx2", "scalar"]
    monkeypatch.setenv("GPT_FLEX_ISA", "amx")
    with pytest.raises(ValueError, match="GPT_FLEX_ISA=amx: this CPU can be held to avx512_vnni"):
        supported_sets()
    monkeypatch.delenv("GPT_FLEX_ISA")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert supported_sets() == ["neon", "scalar"]
    has["dot"] = True
    assert supported_sets() == ["neon_dot", "neon", "scalar"]
