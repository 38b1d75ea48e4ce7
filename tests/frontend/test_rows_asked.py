"""A model that asks how many rows a batch has, over microbatches: refused with its line where that changes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.compiler import compile_program
from autopar.errors import InvariantError
from autopar.mesh import Mesh
from autopar.plan import Plan

Act = Callable[[Tensor, int], Tensor]


class Net(nn.Module):
    def __init__(self, act: Act) -> None:
        super().__init__()
        self.first, self.last, self.act = nn.Linear(4, 4), nn.Linear(4, 4), act

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.last(self.act(self.first(x), x.shape[0])).square().mean()}


def compiled(act: Act, mesh: str, rows: int, **choices: Any) -> None:
    """``rows`` of the whole batch, in microbatches of 3 rows: on a pipeline the call is the whole, else a part."""
    here = Mesh.parse(mesh)
    batch = {"x": torch.ones(rows if here.is_pipelined else 3, 4)}
    compile_program(Net(act), here, Plan(microbatches=rows // 3, **choices), (), batch)


CHANGES: dict[str, Act] = {
    "larger": lambda x, n: x * 2 if n > 4 else x,
    "between": lambda x, n: x * 2 if 4 < n < 8 else x,
    "equal": lambda x, n: x.relu() if n == 6 else x,
    "a number": lambda x, n: x * 2 if int(n) > 4 else x,
    "a multiple": lambda x, n: x.relu() if n % 2 else x,
    "another part": lambda x, n: x * (x[:, :2].sum(1) if n > 4 else x[:, 2:4].sum(1))[:, None],
}
SAME: dict[str, Act] = {
    "harmless": lambda x, n: x.relu() if n > 4 else torch.relu(x),
    "a size": lambda x, n: x.reshape(n, 2, 2).flatten(1),
    "more than one": lambda x, n: x.relu() if n > 1 else x,
    "a number": lambda x, n: x + torch.zeros(int(n), 1),
}


@pytest.mark.parametrize("mesh", ["dp=1", "pp=2"])
@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_is_refused(kind: str, mesh: str) -> None:
    with pytest.raises(
        InvariantError, match=r"microbatch of 3 rows than for the batch of 6(.|\n)*test_rows_asked.py.* n"
    ):
        compiled(CHANGES[kind], mesh, 6)
    compiled(CHANGES[kind], mesh, 6, microbatch_weights="rows")  # as by hand


@pytest.mark.parametrize("mesh", ["dp=1", "pp=2"])
@pytest.mark.parametrize("kind", SAME)
def test_what_changes_nothing_is_taken(kind: str, mesh: str) -> None:
    compiled(SAME[kind], mesh, 6)


@pytest.mark.parametrize("kind", ["more than one", "twice, of more than one", "larger"])
def test_microbatches_of_one_row(kind: str) -> None:
    """One row has another graph than several, with fewer views."""
    act = {**SAME, **CHANGES, "twice, of more than one": lambda x, n: x * 2 if n > 1 else x}[kind]
    with pytest.raises(InvariantError, match=r"microbatch of 1 rows|otherwise for a batch|depends on the batch"):
        compile_program(Net(act), Mesh(pp=2), Plan(microbatches=8), (), {"x": torch.ones(8, 4)})
    compile_program(Net(SAME["a size"]), Mesh(pp=2), Plan(microbatches=8), (), {"x": torch.ones(8, 4)})
