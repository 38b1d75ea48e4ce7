"""Frames that are made once are those that torch makes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils import _traceback

from autopar.frontend import exported, stack_frames
from autopar.frontend.trace import trace
from autopar.ir.node import origin
from autopar.plan import Plan


def test_torch_has_the_place() -> None:
    assert callable(getattr(_traceback, stack_frames.NAME)), "this torch makes frames elsewhere: nothing is saved"


def test_frames_are_equal() -> None:
    found = [{"filename": __file__, "line": line, "name": "f"} for line in (1, 5, 1, 7)]
    plain = getattr(_traceback, stack_frames.NAME)(found, 1)
    with stack_frames.frames_made_once():
        shared = getattr(_traceback, stack_frames.NAME)(found, 1)
    assert shared.format() == plain.format() and len(shared) == 3
    assert "Frames that are made once" in shared.format()[1]


def test_lines_of_the_model_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0)

    def lines() -> list[str]:
        program = trace(layer, (torch.randn(2, 3, 8),), plan=Plan(check_numerics=False))
        return [origin(node).source for node in program.graph.nodes if node.op == "call_function"]

    with_shared = lines()
    monkeypatch.setattr(exported, "frames_made_once", nullcontext)
    assert with_shared == lines() and all(with_shared)
