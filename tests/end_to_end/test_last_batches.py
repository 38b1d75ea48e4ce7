"""The last batch of an epoch, on real ranks: rows that the data axes do not divide, and ranks with unequally many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.errors import IndivisibleError
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.precision import Precision
from tests.launch import run_ranks

DOUBLE = Precision(param=torch.float64)


class Net(nn.Module):
    """x (n, 6), y (n): a mean loss over the labels that count, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.5), nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.down(torch.relu(self.norm(self.up(x)) if len(x) > 1 else self.up(x)))
        return {"loss": F.cross_entropy(logits, y), "logits": logits}


def batches(sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for rows in sizes:
        y = torch.randint(5, (rows,), generator=generator)
        y[0] = -100 if rows > 1 else y[0]
        found.append({"x": torch.randn(rows, 6, dtype=torch.float64, generator=generator), "y": y})
    return found


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def trained(sizes: tuple[int, ...]) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Losses, parameters and buffers of one device, and its logits of the first batch once it is trained."""
    model = net()
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9), []
    for batch in batches(sizes):
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        return losses, dict(model.state_dict()), model.eval()(**batches(sizes)[0])["logits"]


def steps_of_rank(mesh: Mesh, plan: Plan, sizes: tuple[int, ...], cuts: tuple[tuple[int, ...], ...]) -> Any:
    """As :func:`trained`, on this rank; ``cuts``: for each batch the rows of each rank, with ``inputs="local"``."""
    parallel = autopar.parallelize(net(), mesh, plan)
    optimizer, losses, given = torch.optim.SGD(parallel.parameters(), 0.5, momentum=0.9), [], batches(sizes)
    if cuts:
        rank = torch.distributed.get_rank()
        given = [{name: x.split(list(cut))[rank] for name, x in batch.items()} for batch, cut in zip(given, cuts)]
    for place, batch in enumerate(given):
        optimizer.zero_grad()
        if place % 2:
            loss = parallel.train_step(**batch)
        else:
            loss = parallel(**batch)["loss"]
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    parallel.eval()
    with torch.no_grad():
        logits = parallel(**given[0])["logits"]
    return losses, parallel.full_state_dict(), logits.full_tensor(), logits.to_local().clone()


def assert_same(found: Any, sizes: tuple[int, ...]) -> None:
    losses, state, logits, _ = found
    wanted = trained(sizes)
    assert torch.allclose(torch.stack(losses), torch.stack(wanted[0]), rtol=1e-12, atol=0)
    for name, tensor in wanted[1].items():
        assert (state[name] - tensor).abs().max() <= 1e-12, name
    assert (logits - wanted[2]).abs().max() <= 1e-12


@pytest.mark.parametrize("zero", [0, pytest.param(2, marks=pytest.mark.slow), 3])
def test_batches_that_do_not_divide(zero: int) -> None:
    sizes = (3, 4, 1, 3, 4)
    found = run_ranks(steps_of_rank, 2, Mesh(dp=2), Plan(zero=zero, precision=DOUBLE), sizes, ())
    for rank, result in enumerate(found):
        assert_same(result, sizes)
        assert len(result[3]) == (2, 1)[rank]  # of three rows


def test_ranks_with_unequally_many_rows() -> None:
    """Each rank knows its number of rows only: another one on one rank, on both, and as before."""
    sizes = (3, 4, 3, 4, 4, 3, 1, 4, 3)
    cuts = ((2, 1), (2, 2), (2, 1), (3, 1), (2, 2), (1, 2), (1, 0), (2, 2), (2, 1))
    plan = Plan(inputs="local", precision=DOUBLE)
    parallel = run_ranks(steps_of_rank, 2, Mesh(dp=2), plan, sizes, cuts)
    for rank, result in enumerate(parallel):
        assert_same(result, sizes)
        assert len(result[3]) == cuts[0][rank]


def refused_on_rank(rows: tuple[int, ...]) -> list[str]:
    """What a call says in which ranks pass these numbers of rows, and one with other widths."""
    said = []
    parallel = autopar.parallelize(net(), Mesh(dp=2), Plan(inputs="local", precision=DOUBLE))
    rank = torch.distributed.get_rank()
    (batch,) = batches((sum(rows),))
    own = {name: x.split(list(rows))[rank] for name, x in batch.items()}
    for given in (own, {**own, "x": own["x"].repeat(1, 1 + rank)}):
        with pytest.raises(IndivisibleError) as caught:
            parallel(**given)
        said.append(str(caught.value))
    return said


def test_rows_that_outputs_cannot_follow_are_refused_at_once() -> None:
    for rows, widths in run_ranks(refused_on_rank, 2, (3, 1)):
        assert "the ranks pass 3 1 rows" in rows and "parts of 2 2" in rows
        assert "Way out: train_step" in rows and 'Plan(inputs="global")' in rows
        assert "passes a part [3, 6] and position 1 one [1, 12]" in widths or "one [3, 6]" in widths
