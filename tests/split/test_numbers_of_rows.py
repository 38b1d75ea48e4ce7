"""A number that the model makes of how many rows there are: right, or refused, where a microbatch has fewer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.errors import InvariantError
from tests.against_one_process import difference

Loss = Callable[[Tensor, Tensor], Tensor]


def error(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square()


RIGHT: dict[str, Loss] = {
    "a number": lambda x, y: error(x, y).sum() / len(x),
    "a constant": lambda x, y: error(x, y).sum() / torch.tensor(float(x.shape[0])),
    "a filled one": lambda x, y: error(x, y).sum() / torch.full((), 2.0 * x.shape[0], dtype=x.dtype),
    "ones that are added up": lambda x, y: error(x, y).sum() / torch.ones(x.shape[0], dtype=x.dtype).sum(),
    "numbers of other things": lambda x, y: error((x * 0.25 + 8).clamp(max=9) ** 2, y / 4).mean() * 0.5,
    "pairs of rows": lambda x, y: error(x, y).unflatten(0, (-1, 2)).sum(1).mul(0.5).mean(),
}
REFUSED: dict[str, Loss] = {
    "a divisor before the mean": lambda x, y: error(x / x.shape[0], y).mean(),
    "a power": lambda x, y: error(x * x.shape[0] ** -0.5, y).mean(),
    "something that is added": lambda x, y: error(torch.tanh(x + 0.1 * x.shape[0]), y).mean(),
    "a constant before the mean": lambda x, y: error(x / torch.tensor(float(x.shape[0])), y).mean(),
    "a limit": lambda x, y: error(x.clamp(max=x.shape[0] * 0.02), y).mean(),
    "an argument of a loss": lambda x, y: F.huber_loss(x, y, delta=0.1 * x.shape[0]),
}


class Net(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.up, self.down, self.loss = nn.Linear(6, 8), nn.Linear(8, 6), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.down(torch.tanh(self.up(x))), y)


def step(loss: Loss, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """The loss of a batch of eight rows in four microbatches, and of the unmodified model."""
    torch.manual_seed(0)
    model, x, y = Net(loss).double(), torch.randn(8, 6).double(), torch.randn(8, 6).double()
    expected = model(x=x, y=y)
    parallel = autopar.parallelize(model, mesh, Plan(microbatches=4, check_numerics=False))
    found = parallel.simulate(x=x, y=y).loss
    assert found is not None
    return found, expected


@pytest.mark.parametrize("loss", RIGHT.values(), ids=RIGHT)
def test_right(loss: Loss) -> None:
    assert difference(*step(loss, Mesh(pp=2))) < 1e-12


@pytest.mark.parametrize("loss", REFUSED.values(), ids=REFUSED)
def test_refused(loss: Loss) -> None:
    with pytest.raises(InvariantError, match="a number that depends on the batch, so that a microbatch is not a part"):
        step(loss, Mesh(pp=2))


def limited(loss: Loss, *rows: int) -> Loss:
    """``loss`` of a model that takes no other batches."""

    def checked(x: Tensor, y: Tensor) -> Tensor:
        assert len(x) in rows, "tables are as large as the largest batch"
        return loss(x, y)

    return checked


def test_a_model_that_takes_no_more_rows_is_told_by_fewer() -> None:
    assert difference(*step(limited(RIGHT["a number"], 4, 8), Mesh())) < 1e-12
    assert difference(*step(limited(RIGHT["numbers of other things"], 4, 8), Mesh())) < 1e-12
    with pytest.raises(InvariantError, match="for 4 rows and with .* for 8: a number that depends on the batch"):
        step(limited(REFUSED["a power"], 4, 8), Mesh())


def test_a_model_of_one_number_of_rows() -> None:
    with pytest.raises(InvariantError, match="takes a batch of 8 rows, and none of 16 or 4, so that what a microbatch"):
        step(limited(RIGHT["a number"], 8), Mesh())
    assert difference(*step(limited(lambda x, y: error(x, y).mean(), 8), Mesh())) < 1e-12


def first_rows(x: Tensor, y: Tensor) -> Tensor:
    """As many as a microbatch has, which does not show that some are left out."""
    return error(x, y)[:3].square().mean()


@pytest.mark.parametrize("mesh", ["dp=1", "pp=2"])
def test_the_first_rows_are_not_those_of_each_microbatch(mesh: str) -> None:
    with pytest.raises(InvariantError, match="computes otherwise for a batch of 6 rows than for one of 3"):
        batch_loss(Mesh.parse(mesh), 6, 2, first_rows)


def pairs(x: Tensor, y: Tensor) -> Tensor:
    """Of a row and the next one; of one row alone there is no number, and a mean of none is nan."""
    errors = error(x, y).sum(1)
    return F.softplus(errors[::2] - errors[1::2]).mean()


def batch_loss(mesh: Mesh, rows: int, count: int, loss: Loss = pairs) -> tuple[Tensor, Tensor]:
    """The loss over a batch in ``count`` microbatches, and of the unmodified model."""
    torch.manual_seed(0)
    model, x, y = Net(loss).double(), torch.randn(rows, 6).double(), torch.randn(rows, 6).double()
    expected = model(x=x, y=y)
    parallel = autopar.parallelize(model, mesh, Plan(microbatches=count, check_numerics=False))
    if not mesh.is_pipelined:
        return parallel.train_step(x=x, y=y), expected
    found = parallel.simulate(x=x, y=y).loss
    assert found is not None
    return found, expected


@pytest.mark.parametrize("mesh", ["dp=1", "pp=2"])
def test_a_microbatch_takes_whole_pairs(mesh: str) -> None:
    """Also where only the smaller ones do not: six rows in four microbatches are 2, 2, 1 and 1."""
    assert difference(*batch_loss(Mesh.parse(mesh), 6, 3)) < 1e-12
    for rows, count in ((6, 4), (4, 4)):
        with pytest.raises(InvariantError, match="the loss is not made of sums and means over the rows"):
            batch_loss(Mesh.parse(mesh), rows, count)
