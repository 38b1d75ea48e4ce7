"""Operators that give a list, where that has one tensor in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.check import Reference

LISTS: dict[str, Callable[[Tensor], Tensor]] = {
    "unbind": lambda h: torch.stack(h.unbind(1), 1),
    "unbind, added to": lambda h: sum(h.unbind(1), torch.zeros(())).unsqueeze(1),
    "split": lambda h: torch.cat(h.split(8, -1), -1),
    "chunk": lambda h: h.chunk(1, -1)[0],
    "split by sizes": lambda h: h.split([8], -1)[0] * 2,
    "tensor_split": lambda h: h.tensor_split(1, -1)[0],
    "rows": lambda h: h.split(4, 0)[0],
    "rows of one": lambda h: h.unsqueeze(0).unbind(0)[0],
}


class Listed(nn.Module):
    def __init__(self, through: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.through = nn.Linear(8, 8), nn.Linear(8, 8), through

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.through(self.first(x)))).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_one(name: str) -> None:
    torch.manual_seed(0)
    reference = Reference(Listed(LISTS[name]).double(), {"x": torch.randn(4, 1, 8, dtype=torch.float64)})
    for mesh in ("dp=2", "tp=2", "dp=2,tp=2"):
        assert reference.check(Mesh.parse(mesh), Plan(check_numerics=False)).worst < 1e-12, mesh
