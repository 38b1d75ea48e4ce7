"""``autopar show`` of models with experts: the table, the JSON, and what is said of a layer that was left."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from autopar.__main__ import main

LEFT = """
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.up = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        scores, ids = self.router(x).topk(2)
        weights = torch.zeros(len(x), 4).scatter(1, ids, scores)
        return (torch.einsum("nc,ecf->nef", x, self.up) * weights[..., None]).mean(1).square().mean()

def build(batch=4):
    return Mean(), {"x": torch.randn(batch, 8)}
"""


def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["autopar", "show", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    return printed.out


def test_recognised_layers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = show(monkeypatch, capsys, "moe", "--mesh", "dp=2", "--summary")
    assert "blocks.*.moe.experts" in out and "every expert for every token" in out and "since" not in out
    document = json.loads(show(monkeypatch, capsys, "moe", "--mesh", "dp=2", "--json"))["experts"]
    assert [region["module"] for region in document["recognised"]] == ["blocks.0.moe.experts", "blocks.1.moe.experts"]
    assert {(region["experts"], region["for_each_token"]) for region in document["recognised"]} == {(12, 2)}
    assert not document["left"]


def test_a_layer_that_was_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "averaged_experts.py").write_text(LEFT, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    out = show(monkeypatch, capsys, "averaged_experts:build", "--mesh", "dp=2", "--summary")
    assert "every expert runs for every token, since it takes the mean of the experts" in out
    assert "averaged_experts.py:" in out and ".mean(1)" in out and "nothing" not in out


def test_a_model_without_experts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "experts" not in show(monkeypatch, capsys, "mlp", "--mesh", "dp=2", "--summary")
