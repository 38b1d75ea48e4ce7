"""Profiles of ranks: what the program runs has the names of the model's modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar import Mesh, Plan
from autopar.errors import LaunchError
from autopar.ir.program import Program
from tests.launch import run_ranks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def profiled(directory: str, plan: Plan) -> tuple[float, float, list[str]]:
    """The losses of the same step without and with the profiler, and the labels in the order of their start."""
    torch.manual_seed(0)
    mesh = Mesh(pp=2) if plan.microbatches > 1 else Mesh(tp=2)
    model, x = autopar.parallelize(Model(), mesh, plan), torch.randn(4, 16)
    before = float(model.train_step(x=x))
    model.zero_grad()
    with autopar.profile(model, directory):
        again = float(model.train_step(x=x))
    rank = torch.distributed.get_rank()
    found: list[Any] = json.loads(Path(directory, f"rank{rank}.json").read_text())["traceEvents"]
    ranges = [event for event in found if event.get("cat") == "user_annotation"]
    return before, again, [event["name"] for event in sorted(ranges, key=lambda event: event["ts"])]


def test_the_modules_and_the_collectives_of_a_step(tmp_path: Path) -> None:
    (before, again, labels), (_, _, others) = run_ranks(profiled, 2, str(tmp_path), Plan())
    assert before == again, "the same program"
    own = [label for label in labels if "blocks" in label]
    assert own == [label for label in others if "blocks" in label] and sorted(map(str, tmp_path.iterdir()))
    assert own[:4] == [
        "forward blocks.0.up", "forward blocks.0", "forward blocks.0.down",
        "all_reduce over tp: blocks.0.down (forward)",
    ]  # fmt: skip
    assert "all_reduce over tp: blocks.1.down (forward)" in own and "backward blocks.0.up" in own
    assert "all_reduce over tp: blocks.1.up (backward)" in own


@pytest.mark.slow
def test_the_stages_of_a_pipeline(tmp_path: Path) -> None:
    (*_, labels), (*_, others) = run_ranks(profiled, 2, str(tmp_path), Plan(microbatches=2))
    assert sum("forward blocks.0.up" in label for label in labels) == 2, "once a microbatch"
    assert not any("blocks.1.up" in label for label in labels) and any("blocks.1.up" in label for label in others)


def test_a_model_that_is_not_parallel(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="Way out: autopar.parallelize"), autopar.profile(Model(), tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()


def test_collectives_belong_to_the_module_whose_sum_they_finish() -> None:
    program = autopar.compile_program(Model(), Mesh(tp=2), Plan(), (torch.randn(4, 16),))
    assert isinstance(program, Program)
    code = program.rank(0).code.splitlines()
    places = [next(line for line in reversed(code[:n]) if "#  " in line or "  # " in line[:6])
              for n, line in enumerate(code) if "comm.all_reduce(linear" in line]  # fmt: skip
    assert [place.split()[1] for place in places] == ["blocks.0.down", "blocks.1.down"]
