"""Which output is the loss: one rule, in a program, in what a model returns, and in the check."""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.check import TOLERANCE, check
from autopar.errors import InvariantError
from autopar.ir.loss import leaf_paths, loss_of, loss_position

LOSS, LOGITS = torch.tensor(1.0, requires_grad=True), torch.ones(2, requires_grad=True)
OTHER = torch.tensor(2.0, requires_grad=True)


class LogitsFirst(NamedTuple):
    logits: Any
    loss: Any


@pytest.mark.parametrize(
    "output",
    [
        LOSS,
        {"loss": LOSS},
        (LOSS, LOGITS),
        [LOGITS, LOSS],
        LogitsFirst(LOGITS, LOSS),
        LogitsFirst(OTHER, LOSS),
        {"aux": OTHER, "loss": LOSS},
        (LOSS, OTHER),
        {"logits": LOGITS, "objective": LOSS, "step": torch.tensor(3), "entropy": OTHER.detach()},
    ],
    ids=str,
)
def test_the_loss_in_what_a_model_returns(output: object) -> None:
    assert loss_of(output) is LOSS


def test_in_evaluation_it_is_the_same() -> None:
    for output in ({"loss": LOSS.detach()}, LogitsFirst(LOGITS.detach(), LOSS.detach())):
        assert not loss_of(output).requires_grad and float(loss_of(output)) == 1.0


@pytest.mark.parametrize("output", [LOGITS, {"a": LOSS, "b": OTHER}, (), make_dataclass("Odd", ["x"])(1)], ids=str)
def test_no_telling(output: object) -> None:
    with pytest.raises(InvariantError, match="Way out: pass labels"):
        loss_of(output)


def test_several_scalars_are_counted() -> None:
    with pytest.raises(InvariantError, match="2 scalars of which none is called 'loss'"):
        loss_of({"a": LOSS, "b": OTHER})


def test_positions() -> None:
    assert loss_position(["logits", "loss"], [False, True]) == 1
    assert loss_position(["a", "b"], [True, True]) is None
    assert loss_position(["0", "1"], [True, True]) == 0
    assert loss_position(["1", "aux", "loss"], [True, True, True]) == 2
    assert loss_position([], []) is None


def test_paths() -> None:
    spec = torch.utils._pytree.tree_structure({"a": [1, 2], "b": LogitsFirst(1, (2,))})
    assert leaf_paths(spec) == ["a.0", "a.1", "b.logits", "b.loss.0"]
    assert leaf_paths(torch.utils._pytree.tree_structure(1)) == ["0"]


class Net(nn.Module):
    """Its auxiliary loss comes from an early layer, so that on a pipeline another stage makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.up(x).tanh()
        y = self.down(self.mid(hidden).tanh())
        return y, y.square().mean(), hidden.square().mean()


class ReturnsNamedTuple(Net):
    def forward(self, x: Tensor) -> Any:
        y, loss, _ = self.parts(x)
        return LogitsFirst(y, loss)


class ReturnsLossAndAuxiliary(Net):
    def forward(self, x: Tensor) -> Any:
        _, loss, aux = self.parts(x)
        return loss, aux


class ReturnsAuxiliaryByName(Net):
    def forward(self, x: Tensor) -> Any:
        _, loss, aux = self.parts(x)
        return {"aux": aux, "loss": loss}


class ReturnsObjective(Net):
    def forward(self, x: Tensor) -> Any:
        y, loss, _ = self.parts(x)
        return {"y": y, "objective": loss}


@pytest.mark.parametrize("mesh", ["dp=2", "pp=2", "pp=2,dp=2", "dp=1"])
@pytest.mark.parametrize("kind", [ReturnsNamedTuple, ReturnsLossAndAuxiliary, ReturnsAuxiliaryByName, ReturnsObjective])
def test_every_reader_finds_the_same_loss(kind: type[nn.Module], mesh: str) -> None:
    named = Mesh.parse(mesh)
    report = check(kind(), {"x": torch.randn(8, 8)}, named, Plan(microbatches=2 if named.size("pp") > 1 else 1))
    assert max(report.loss, *report.grads.values()) <= TOLERANCE, report
    assert named.size("pp") > 1 or report.passed  # of microbatches, other outputs are each one's own


def test_training_a_model_without_a_telling_loss_is_refused_in_words() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            _, loss, aux = self.parts(x)
            return {"a": loss, "b": aux}

    assert check(Two(), {"x": torch.randn(4, 8)}, Mesh(dp=2)).loss is None
    parallel = autopar.parallelize(Two(), Mesh(dp=1))
    with pytest.raises(InvariantError, match="none is called 'loss'"):
        parallel.train_step(x=torch.randn(4, 8))
