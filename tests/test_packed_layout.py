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

template <Format F>
void print(long row_bytes, long block) {
  const int64_t strip = strip_bytes<F>(row_bytes, block);
  const int64_t sizes[] = {header_bytes<F>(block), span_bytes<F>(block), strip,
                           strip_bytes_of(F, row_bytes, block), inputs_of_strip<F>(strip, block)};
  for (int64_t n : sizes) std::printf(" %ld", long(n));
}

int main(int, char** arguments) {
  auto number = [&](int i) { return std::atol(arguments[i]); };
  const int64_t constants[] = {kStrip, kChunk, kInt8Block, kInt8, kInt4, kInt4Half};
  for (int64_t n : constants) std::printf(" %ld", long(n));
  if (number(1) == kInt8) print<kInt8>(number(2), number(3));
  if (number(1) == kInt4) print<kInt4>(number(2), number(3));
  if (number(1) == kInt4Half) print<kInt4Half>(number(2), number(3));
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
@pytest.mark.parametrize("inputs", [32, 256, 300, 1152, 2048, 4128, 5632])
def test_the_header_gives_the_sizes_of_the_layout(program: Path, name: str, inputs: int):
    """16 float scales, then for each 256 inputs a header of whole cache lines and the weights. The
    last span has only the blocks, and units of 128 inputs, that it needs."""
    format, bits, scale_bytes = FORMATS[name]
    for block in GROUP_SIZES if bits == 4 else [128]:
        row_bytes = rounded_up(inputs, block) // 2 if bits == 4 else inputs
        printed = subprocess.check_output([program, str(format), str(row_bytes), str(block)])
        *constants, header, span, strip, same_strip, K = map(int, printed.split())
        blocks = 256 // block
        assert Layout(*constants) == Layout(16, 32, 128, 80, 41, 42)
        assert header == (rounded_up(blocks * (16 * scale_bytes + 8), 64) if bits == 4 else 0)
        assert span == header + 16 * 256 * bits // 8
        assert rounded_up(inputs, max(128, block)) == K
        headers = rounded_up(inputs, 256) // 256 * header
        assert strip == same_strip == 64 + headers + 16 * K * bits // 8
