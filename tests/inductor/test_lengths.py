"""Which lengths are compiled for, of a module whose lengths vary. Inductor itself is left out here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.inductor import compiled_region, sized_region
from autopar.inductor.symbolic_sizes import ForSizes, order_of, value_at
from autopar.mesh import Mesh
from autopar.plan import Plan


class Curved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.scale).sin() * 3 + x).sum()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled: for one length, or for all."""
    found: list[str] = []

    def of_one(graph: Any, given: Any) -> Any:
        found.append("one")
        return lambda operands: graph(*operands)

    def of_all(
        function: Any, operands: Sequence[Tensor], _: Any, sizes: Sequence[Any], values: Mapping[Any, int], __: Any
    ) -> ForSizes:
        def pure(given: list[Any]) -> tuple[Tensor, ...]:
            at = dict(zip(values, given))
            return tuple(function(given[len(values) :], tuple(value_at(size, at) for size in sizes)))

        found.append("all")
        return ForSizes(pure, tuple(order for each in operands if (order := order_of(each)) is not None), "")

    monkeypatch.setattr(compiled_region, "compiled", of_one)
    monkeypatch.setattr(sized_region, "compiled_for_sizes", of_all)
    return found


def test_a_length_by_which_a_family_grows_takes_the_regions_that_there_are(made: list[str]) -> None:
    """40 is no multiple of 32, as the first two are: it costs a compile of ours, and none of Inductor's."""
    counts, scale = [], torch.ones(4, dtype=torch.float64)
    parallel = autopar.parallelize(Curved(), Mesh(), Plan(compile="inductor", check_numerics=False))
    with torch.no_grad():
        for length in (32, 64, 40):
            x = torch.randn(4, length, 4, dtype=torch.float64)
            assert (parallel(x) - ((x * scale).sin() * 3 + x).sum()).abs() <= 1e-10
            counts.append(len(made))
    assert len(parallel.families) == 1 and {"one", "all"} == set(made)
    assert counts[0] < counts[1] == counts[-1], "nothing for one length after the first"
