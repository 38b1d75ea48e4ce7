"""Steps that are measured: the records of a script's own loop, their lines, and where they go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar import Mesh, Plan, StepRecord, Watch
from autopar.ir.load import ExpertLoad
from autopar.training.sinks import Lines, TensorBoard, Wandb
from tests.launch import run_ranks


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()


def record(step: int, **more: Any) -> StepRecord:
    known: dict[str, Any] = {"loss": 2.5, "grad_norm": 0.1234, "seconds": 0.5, "tokens_per_second": 2048.0}
    return StepRecord(step, **{**known, "peak_memory_bytes": 3_000_000, **more})


def watched_steps(plan: Plan, steps: int) -> list[StepRecord]:
    torch.manual_seed(0)
    found: list[StepRecord] = []
    model, x = autopar.parallelize(Mlp(), Mesh(dp=2), plan), torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Watch(model, [found.append], peak_tflops=1.0)
    for _ in range(steps):
        with watch.step(tokens=32) as step:
            optimizer.zero_grad()
            step.loss = model.train_step(x=x)
            step.grad_norm = model.clip_grad_norm_(1.0)
            optimizer.step()
    return found


def test_a_loop_of_ones_own_on_two_ranks() -> None:
    records, none = run_ranks(watched_steps, 2, Plan(microbatches=2), 3)
    assert none == [], "only rank 0 has records"
    assert [entry.step for entry in records] == [0, 1, 2]
    torch.manual_seed(0)
    alone, x = Mlp(), torch.randn(4, 8)
    loss = alone(x)
    loss.backward()
    first = records[0]
    assert first.loss == pytest.approx(loss.item(), abs=1e-6)
    assert first.grad_norm == pytest.approx(float(nn.utils.get_total_norm([p.grad for p in alone.parameters()])), 1e-5)
    for entry in records:
        assert entry.tokens_per_second == pytest.approx(32 / entry.seconds)
        assert 0 < entry.communication_share < 1 and entry.peak_memory_bytes > 50e6
        # gradients of 512 float32 elements: a ring sends half twice; the loss, and the norm of the gradients
        assert 2048 <= entry.sent_bytes["dp"] <= 2048 + 64
        products = 2 * 4 * (8 * 32 + 32 * 8)
        assert products <= entry.mfu * entry.seconds * 2e12 / 3 < products + 4 * 64, "three times those of forward"


def test_a_model_that_is_not_parallel() -> None:
    found: list[StepRecord] = []
    watch = Watch(Mlp(), found.append, start=5)
    with watch.step():
        pass
    with pytest.raises(KeyError), watch.step():
        raise KeyError("a step that fails has no record")
    (only,) = found
    assert only.step == 5 and only.loss is only.tokens_per_second is only.mfu is None
    assert "loss" not in only.to_json() and only.sent_bytes == {}


def test_lines() -> None:
    lines: list[str] = []
    write = Lines(4, lines.append, steps=10)
    for step in range(3, 10):  # of a run that was resumed
        write(record(step, mfu=0.415, communication_share=0.28))
    assert [line.split("  ")[0] for line in lines] == ["step 4/10", "step 8/10", "step 10/10"]
    assert lines[0].split("  ")[1:] == [
        "loss 2.5000", "grad norm 0.123", "2,048 tokens/s", "3 MB", "28% in collectives", "mfu 41.5%",
    ]  # fmt: skip
    lines.clear()
    Lines(1, lines.append, as_json=True)(record(0, sent_bytes={"dp": 7}))
    assert json.loads(lines[0])["sent_bytes"] == {"dp": 7}


def test_what_is_not_known_is_left_out() -> None:
    load = ExpertLoad((1, 3), (1, 3), 2)
    bare = StepRecord(0, None, None, 0.5, None, 1000)
    assert bare.line() == "step 1  1 kB  0% in collectives"
    assert bare.to_json() == {
        "step": 0, "seconds": 0.5, "peak_memory_bytes": 1000, "communication_share": 0.0, "sent_bytes": {},
    }  # fmt: skip
    assert record(0, expert_load={"moe": load}).to_json()["expert_load"] == {"moe": load.to_json()}


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path) as board:
        for step in range(2):
            board(record(step, loss=3.0 - step, sent_bytes={"tp": 9}))
    written = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in written.Scalars("loss")] == [(0, 3.0), (1, 2.0)]
    assert written.Scalars("sent_bytes/tp")[0].value == 9 and "step" not in written.Tags()["scalars"]


class Service(ModuleType):
    """What a run of wandb does, noted."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.noted: list[Any] = []

    def init(self, config: dict[str, Any]) -> Service:
        self.noted.append(config)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.noted.append((step, numbers["loss"]))

    def finish(self, exit_code: int) -> None:
        self.noted.append(exit_code)


def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    with Wandb({"lr": 0.1}) as run:
        run(record(4))
    assert service.noted == [{"lr": 0.1}, (4, 2.5), 0]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"--{name} needs the package '{name}'[^\n]*\nWay out: pip install {name}"):
        TensorBoard(tmp_path / "curves") if name == "tensorboard" else Wandb({})
    assert not (tmp_path / "curves").exists()
