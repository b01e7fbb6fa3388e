"""The packed layout of kernels/cpu/layout.h, which is plain C++, on any CPU that has a compiler."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kernels.cpu.build import FOLDER, Layout
from quant.linear import GROUP_SIZES

COMPILER = os.environ.get("CXX", "g++")
FORMATS = {"int8": (80, 8, 0), "int4": (41, 4, 1), "int4_half": (42, 4, 2)}  # bits, scale bytes
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "layout.h"

int main(int, char** arguments) {
  auto number = [&](int i) { return std::atoll(arguments[i]); };
  const auto format = static_cast<Format>(number(1));
  const int64_t row_bytes = number(2), block = number(3);
  std::printf("%ld %ld %ld %ld %ld %ld ", long(kStrip), long(kChunk), long(kInt8Block), long(kInt8),
              long(kInt4), long(kInt4Half));
  std::printf("%ld %ld %ld", long(header_bytes(format, block)), long(span_bytes(format, block)),
              long(strip_bytes(format, row_bytes, block)));
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which(COMPILER):
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("layout")
    (folder / "main.cpp").write_text(PROGRAM)
    command = [COMPILER, "-std=c++17", "-Wall", "-Werror", "-Wno-unused-function"]
    subprocess.run(
        [*command, f"-I{FOLDER}", "main.cpp", "-o", "main"], cwd=folder, check=True, timeout=120
    )
    return folder / "main"


def rounded_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("inputs", [32, 256, 300, 2048, 4128, 5632])
def test_the_header_gives_the_sizes_of_the_layout(program: Path, name: str, inputs: int):
    """16 float scales, then for each 256 inputs a header of whole cache lines and the weights."""
    format, bits, scale_bytes = FORMATS[name]
    for block in GROUP_SIZES if bits == 4 else [128]:
        row_bytes = rounded_up(inputs, block) // 2 if bits == 4 else inputs
        printed = subprocess.check_output([program, str(format), str(row_bytes), str(block)])
        *constants, header, span, strip = map(int, printed.split())
        blocks = 256 // block
        assert Layout(*constants) == Layout(16, 32, 128, 80, 41, 42)
        assert header == (rounded_up(blocks * (16 * scale_bytes + 8), 64) if bits == 4 else 0)
        assert span == header + 16 * 256 * bits // 8
        assert strip == 64 + rounded_up(inputs, 256) // 256 * span
