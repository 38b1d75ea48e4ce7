"""A region of a family's program: Inductor compiles it once, with symbols in place of the sizes of a batch.

Sizes for which that does not hold (one of them is 1) are compiled for once more, a few times; after that such a region
runs as the Python that it was written in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from autopar.codegen.python import RankFunction
from autopar.codegen.regions import Region
from autopar.inductor.compiled_region import CompiledRegion, refuse_calls
from autopar.inductor.symbolic_sizes import SIZES, ForSizes, compiled_for_sizes, order_of
from autopar.inductor.torch_inductor import Pure
from autopar.ir.node import value
from autopar.mesh import Mesh

MOST = 2  # functions that are compiled of one region
KEPT = 256  # sizes whose operands are told at a glance


class SizedRegion:
    """The function of a region: ``(comm, operands, sizes) -> results``, where the list of operands is emptied.

    ``python``: the same function as it is written. ``sizes``: the expressions whose values it takes, first those of
    ``region.symbols`` themselves. ``mesh``: of the program, for the sizes of parts.
    """

    def __init__(self, region: Region, python: RankFunction, sizes: Sequence[Any], mesh: Mesh) -> None:
        self.region, self.python = region, python
        self._all = _ForAll(region, python, sizes, mesh)
        self._members: dict[tuple[Any, ...], _Member] = {}

    def __call__(self, comm: Any, operands: list[Tensor], sizes: tuple[Any, ...]) -> Sequence[Tensor]:
        member = self._members.get(sizes)
        if member is None:
            if len(self._members) >= KEPT:
                self._members.pop(next(iter(self._members)))
            member = self._members[sizes] = _Member(self._all, sizes)
        return member(comm, operands)


class _Member(CompiledRegion):
    """The region for one batch."""

    def __init__(self, whole: _ForAll, sizes: tuple[Any, ...]) -> None:
        python: Any = whole.python
        super().__init__(whole.region, partial(python, sizes=sizes))
        self._whole, self._sizes = whole, sizes

    def made(self, comm: Any, operands: Sequence[Tensor]) -> Pure:
        return self._whole.at(comm, operands, self._sizes)


class _ForAll:
    """What was compiled of a region, for all sizes that it holds for."""

    def __init__(self, region: Region, python: RankFunction, sizes: Sequence[Any], mesh: Mesh) -> None:
        self.region, self.python, self._sizes = region, python, sizes
        nodes = [node for node in region.graph.nodes if node.op == "placeholder"]
        self._shapes = [value(node).layout.local_shape(mesh) for node in nodes]
        self._made: list[ForSizes] = []
        self._problem: Exception | None = None  # that Inductor had, which it would have again at the next length

    def at(self, comm: Any, operands: Sequence[Tensor], sizes: tuple[Any, ...]) -> Pure:
        """The function of ``operands`` that have these ``sizes``. Raises what :func:`compiled_for_sizes` raises."""
        values = sizes[: len(self.region.symbols)]
        orders = tuple([order for tensor in operands if (order := order_of(tensor)) is not None])
        for made in self._made:
            if made.fits(orders, values):
                return made.at(values)
        if self._problem is not None:
            raise self._problem
        if len(self._made) >= MOST:
            raise ValueError(f"it was compiled for {MOST} kinds of lengths, and this is another")
        if comm.device.type == "cuda":  # a new thread is on the first
            torch.cuda.set_device(comm.device)
        function: Any = partial(self.python, comm)
        symbols = dict(zip(self.region.symbols, values))
        try:
            made = compiled_for_sizes(function, operands, self._shapes, self._sizes, symbols, _check)
        except (OSError, MemoryError):  # of the machine
            raise
        except Exception as problem:
            self._problem = problem
            raise
        self._made.append(made)
        return made.at(values)


def _check(graph: fx.GraphModule) -> None:
    refuse_calls(graph, SIZES)


_REGIONS: WeakValueDictionary[str, SizedRegion] = WeakValueDictionary()


def sized_region(region: Region, python: RankFunction, sizes: Sequence[Any], mesh: Mesh) -> SizedRegion:
    """The one of this process: programs share regions that do the same."""
    found = _REGIONS.get(region.key)
    if found is None:
        found = _REGIONS[region.key] = SizedRegion(region, python, sizes, mesh)
    return found
