"""Programs of one family ask a model once what it read, as long as no code of users' has run between."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.cache import assumptions
from autopar.cache.assumptions import Assumption, assumptions_of, met
from autopar.cache.reasons import NotMet
from autopar.compiler import compile_program
from autopar.ir.model_runs import known_since_run, model_runs, no_other_runs
from autopar.observation.observation import guards_of_traces
from autopar.observation.trace_record import records_of_traces


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale = nn.Linear(4, 4), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return (self.up(x) * self.scale).square().mean()


def asked_of(model: nn.Module) -> tuple[Assumption, ...]:
    with records_of_traces() as records, guards_of_traces() as guards:
        compile_program(model, Mesh(), Plan(), (), {"x": torch.ones(2, 3, 4)})
    return assumptions_of(records, guards, model, None)


def counted(*calls: Any) -> int:
    """How often the model was asked in ``calls``."""
    with mock.patch.object(assumptions, "quickly_answered", wraps=assumptions.quickly_answered) as asked:
        for call in calls:
            call()
    return asked.call_count


def test_a_model_is_asked_once_until_it_runs() -> None:
    model, other = Net(), Net()
    asked, of_other = asked_of(model), asked_of(other)

    def again() -> None:
        met(asked, model)

    assert counted(again, again) == 2, "code of users' may run between two calls"
    with no_other_runs():
        assert counted(again, again, again) == 1
        assert counted(lambda: met(of_other, other)) == 1
        assert counted(model_runs, again, again) == 1
    assert known_since_run() is None and counted(again) == 1


def test_what_changes_in_a_run_is_seen() -> None:
    model = Net()
    asked = asked_of(model)
    with no_other_runs():
        met(asked, model)
        model.scale = 3.0
        model_runs()
        with pytest.raises(NotMet, match="scale"):
            met(asked, model)
    model.scale = 2.0
    with no_other_runs():
        met(asked, model)
    model.scale = 3.0
    with no_other_runs(), pytest.raises(NotMet, match="scale"):
        met(asked, model)


def test_each_has_guards_of_its_own() -> None:
    model = Net()
    asked = asked_of(model)
    with no_other_runs():
        first, second = (met(asked, model)[0] for _ in range(2))
        first.values.append(cast(Any, "what that program has looked at"))
        second.readings.clear()
        third = met(asked, model)[0]
    labels = [one.label for one in first.readings]
    assert "scale" in labels and labels == [one.label for one in third.readings]
    assert third.hold() and not third.values
    model.scale = 3.0
    assert not third.hold()


@pytest.mark.parametrize("shared", [True, False])
def test_a_family_of_a_later_launch_asks_once(shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE", str(tmp_path))

    def launch() -> int:
        module: Any = autopar.parallelize(Net(), Mesh(dp=1))
        module(x=torch.ones(2, 3, 4))
        context: Any = nullcontext() if shared else mock.patch.object(assumptions, "known_since_run", return_value=None)
        with context:
            count = counted(lambda: module(x=torch.ones(2, 5, 4)))
        assert len(module.families) == 1
        return count

    launch()
    assert launch() == (2 if shared else 4)  # for the run on symbols, and for the programs of three more lengths
