"""The script that trains the demo models: a step of each family, in few neurons or in all."""

import argparse

import pytest
import torch

from scripts import train_demo
from scripts.train_demo import CONFIGS, train

CONTEXT = 64  # tokens of a window; the script's 512 would take eight times as long


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("name", ["demo-draft", "demo-opt"])
def test_training_lowers_the_loss(
    name: str, sparsity: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"intermediate_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 32}
    monkeypatch.setitem(CONFIGS, name, CONFIGS[name] | small)
    monkeypatch.setattr(train_demo, "CONTEXT", CONTEXT)
    torch.manual_seed(0)
    stream = torch.arange(128 * (CONTEXT + 1)) % 7
    options = {"lr": 1e-2, "steps": 12, "batch": 2, "log_every": 11, "device": "cpu", "seed": 0}
    said: list[str] = []
    train(name, stream, stream, argparse.Namespace(**options, sparsity=sparsity), said.append)
    losses = [float(line.split()[3]) for line in said if line.startswith("step")]
    assert losses[-1] < losses[0] - 1
    assert any("active" in line for line in said) == bool(sparsity)
