"""Triton's kernels without a GPU: interpreted beside their oracles, and compiled for three GPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("gpu_kernels_worker.py")
MOST_REGISTERS = 255  # of a thread: more are kept in memory
MOST_STACK = 32  # bytes in memory: attention with 32 rows over an int8 cache has as many

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: pip install triton (the extra gpu-kernels)",
)


def work(*words: object, interpret: bool) -> str:
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, str(WORKER), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("seed", range(5))
def test_products_are_those_of_the_formula(seed: int):
    print(f"seed {seed}")
    assert "100 cases" in work("products", seed, 100, interpret=True)


def test_attention_is_that_of_the_formula():
    assert "60 cases" in work("attention", 0, 60, interpret=True)


def test_the_loops_of_gptq_are_those_in_pytorch():
    assert "20 cases" in work("loops", 0, 20, interpret=True)


def test_rotary_positions_are_those_of_the_formula():
    assert "40 cases" in work("rotate", 0, 40, interpret=True)


def test_new_tokens_in_one_kernel_are_those_of_the_formula():
    assert "60 cases" in work("new_tokens", 0, 60, interpret=True)


def test_a_model_with_kernels_computes_the_same():
    assert "6 cases" in work("model", 0, 6, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("what", "cases"),
    [
        ("products", 8),
        ("attention", 8),
        ("loops", 4),
        ("rotate", 8),
        ("new_tokens", 12),
        ("model", 6),
    ],
)
def test_kernels_on_a_gpu(what: str, cases: int):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert f"{cases} cases" in work(what, 0, cases, interpret=False)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_fit_the_registers_of_a_gpu(capability: int):
    lines = [json.loads(line) for line in work("compile", capability, interpret=False).splitlines()]
    assert len(lines) > 20
    large = [n for n in lines if n["stack"] > MOST_STACK or n["registers"] > MOST_REGISTERS]
    assert large == []
