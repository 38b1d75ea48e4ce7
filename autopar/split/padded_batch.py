"""A batch with copies of rows behind it, so that the ranks of the data axes get equally many.

Ranks run one program, on parts of one size. Where they do not divide the rows of a batch, the last ones of a part are
copies of its last row. A copy is computed as every row is, so whatever holds of rows (no division by zero, no id out of
range) holds of it. It only must not count: where rows are summed, copies are replaced by what adds nothing
(:mod:`autopar.split.row_fillers`), and so no gradient comes to them either. What mixes rows in another way (a sort, a
median) gets the rows without the copies.

The rules say where a value has its rows: a program of n rows is looked at as if n ranks had one each.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from autopar.ir.batch import PADDED_ROWS, REAL_ROWS, data_axes, input_rows
from autopar.ir.builder import Builder
from autopar.ir.layout import Factor, Layout, Placement, Split
from autopar.ir.node import Node, Value, origin, output_node, set_values, value, values
from autopar.ir.program import Program
from autopar.ir.reach import descendants
from autopar.ir.rewrite import add_constants
from autopar.mesh import Mesh
from autopar.operators import random
from autopar.rules.factoring import Strategy
from autopar.split.flow import Flow, Key, flow_of, key_of
from autopar.split.row_fillers import Fillers, fillers_of

aten = torch.ops.aten
AXIS = "dp"


@dataclass(frozen=True)
class Places:
    """Where the rows of a batch are once it is padded.

    Attributes:
        rows: in the batch.
        source: (padded rows) the row that each is, or is a copy of.
        real: (padded rows) whether it is a row of the batch.
    """

    rows: int
    source: Tensor
    real: Tensor

    @property
    def padded(self) -> int:
        return len(self.source)

    @property
    def growth(self) -> Fraction:
        return Fraction(self.padded, self.rows)


def places_of(rows: int, mesh: Mesh) -> Places:
    """The places of ``rows`` rows, dealt out as an uneven split is: over one data axis after the other."""
    axes = data_axes(mesh)
    layout = Layout(((Factor(rows, axes),),))
    (part,) = layout.local_shape(mesh)
    source, real = [], []
    for positions in itertools.product(*(range(mesh.size(axis)) for axis in axes)):
        owned = layout.indices(0, dict(zip(axes, positions)), mesh)
        assert owned is not None, "there is a data axis"
        last = owned[-1:] if len(owned) else torch.tensor([rows - 1])
        source.append(torch.cat([owned, last.expand(part - len(owned))]))
        real.append(torch.arange(part) < len(owned))
    return Places(rows, torch.cat(source), torch.cat(real))


@dataclass(frozen=True)
class Along:
    """The rows along a dim: ``outer`` blocks of rows, each row ``unit`` elements."""

    dim: int
    outer: int
    unit: int

    def indices(self, rows: Tensor, of: int) -> Tensor:
        """Positions along the dim of these ``rows`` of each block, where a block has ``of`` rows."""
        blocks = torch.arange(self.outer)[:, None, None] * (of * self.unit)
        return (blocks + rows[None, :, None] * self.unit + torch.arange(self.unit)).flatten()


@dataclass
class PaddedBatch:
    """Writes copies of rows into the graph of ``program``, which no axis splits yet."""

    program: Program
    places: Places
    flow: Flow = field(init=False)
    padded: dict[Key, Split] = field(default_factory=dict)  # the values that have copies, and where their rows are
    made: dict[tuple[Key, Split | None], Node] = field(default_factory=dict)  # values with and without copies
    constants: dict[tuple[str, Any], Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen = replace(self.program, mesh=Mesh(**{AXIS: self.places.rows}))
        self.flow = flow_of(seen, AXIS)
        rows = input_rows(self.program)
        self.flow.spread(((node, 0), Split(dim)) for node, dim in rows.items())
        self.batch = {*rows, *descendants(rows)}

    def run(self) -> Program:
        for node in list(self.flow.calls):
            strategy, fillers = self._strategy(node)
            if strategy is None:
                node.args, node.kwargs = self._with_operands(node, node.args, node.kwargs, itertools.repeat(None))
            else:
                self._rewrite(node, strategy, fillers)
        returned = output_node(self.program.graph)
        results = tuple(self._in_form(node, None, returned) for node in self.program.returned)
        returned.args = (results,)
        self.program.graph.eliminate_dead_code()
        return self.program

    def _strategy(self, node: Node) -> tuple[Strategy | None, Fillers | None]:
        """How a call keeps the copies of most of its operands, and what copies are replaced by in it."""
        operands = self.flow.calls[node].operands
        draws = (
            getattr(node.target, "__module__", "") == random.__name__
        )  # of a position it draws what it draws of others
        again = set(operands) if draws else self.batch
        best: tuple[int, int, Strategy | None, Fillers | None] = (0, 0, None, None)
        for strategy in self.flow.parts.get(node, {}).values():
            if not all(map(self._is_plain, (*strategy.inputs, *strategy.outputs))):
                continue
            fillers = fillers_of(self.flow.calls[node], self.flow.factorings[node], strategy)
            if fillers is None:
                continue
            kept = sum(self.padded.get(key_of(x)) == wanted for x, wanted in zip(operands, strategy.inputs))
            if not kept and not fillers.reduces:  # what had to do without copies may have them again
                kept = any(isinstance(p, Split) and x in again for x, p in zip(operands, strategy.inputs))
            outermost = -min((p.dim for p in strategy.outputs if isinstance(p, Split)), default=0)
            if kept > best[0] or (kept == best[0] > 0 and outermost > best[1]):
                best = kept, outermost, strategy, fillers
        return best[2:]

    def _is_plain(self, placement: Placement) -> bool:
        return not isinstance(placement, Split) or (placement.ratio == (1,) and not placement.mirrored)

    def _rewrite(self, node: Node, strategy: Strategy, fillers: Fillers | None) -> None:
        assert fillers is not None
        call, factoring = self.flow.calls[node], self.flow.factorings[node]
        types = tuple(map(self._grown, values(node), strategy.outputs))
        args, kwargs = node.args, dict(node.kwargs)
        if factoring.localize:
            shapes = tuple(kind.shape for kind in types)
            args, kwargs = factoring.localize(call, strategy, shapes, 1 / self.places.growth)
        node.args, node.kwargs = self._with_operands(node, args, kwargs, iter(strategy.inputs), fillers)
        set_values(node, *types)
        for user in node.users:
            if user.target is operator.getitem:
                set_values(user, types[int(user.args[1])])  # type: ignore[arg-type]
        for index, placement in enumerate(strategy.outputs):
            if isinstance(placement, Split):
                self.padded[node, index] = placement
        fillers.finish(node, self.places.growth)

    def _with_operands(
        self,
        node: Node,
        args: Any,
        kwargs: Any,
        wanted: Iterator[Placement | None],
        fillers: Fillers | None = None,
    ) -> Any:
        """The arguments of a call with its operands as ``wanted``: a Split has copies."""
        number = itertools.count()

        def operand(x: fx.Node) -> fx.Node:
            placement, place = next(wanted), next(number)
            split = placement if isinstance(placement, Split) else None
            found = self._in_form(x, split, node)
            filler = fillers.values.get(place) if fillers is not None and split is not None else None
            return found if filler is None or split is None else self._filled(found, x, split, filler, node)

        return fx.map_arg((args, kwargs), operand)

    def _in_form(self, x: fx.Node, split: Split | None, user: fx.Node) -> fx.Node:
        """``x`` with copies where ``split`` says, or without."""
        key = key_of(x)
        now = self.padded.get(key)
        if now == split:
            return x
        if (key, split) not in self.made:
            plain = x if now is None else self._picked(x, now, user, with_copies=False)
            self.made[key, split] = plain if split is None else self._picked(plain, split, user, with_copies=True)
        return self.made[key, split]

    def _picked(self, x: fx.Node, split: Split, user: fx.Node, with_copies: bool) -> fx.Node:
        places, along = self.places, self._along(x, split, padded=not with_copies)
        if with_copies:
            index = self._constant(PADDED_ROWS, along, along.indices(places.source, places.rows))
        else:
            index = self._constant(REAL_ROWS, along, along.indices(places.real.nonzero().flatten(), places.padded))
        return Builder(before=user)(aten.index_select.default, x, split.dim, index)

    def _filled(self, x: fx.Node, before: fx.Node, split: Split, filler: Any, user: fx.Node) -> fx.Node:
        """``x`` with ``filler`` in place of copies."""
        along = self._along(x, split, padded=True)
        real = self.places.real[None, :, None].expand(along.outer, -1, along.unit).flatten()
        shape = [-1] + [1] * (len(value(x).shape) - split.dim - 1)
        mask = self._constant("is_row", (along, len(shape)), real.reshape(shape))
        return Builder(before=user)(aten.where.ScalarOther, mask, x, filler)

    def _along(self, x: fx.Node, split: Split, padded: bool) -> Along:
        rows = self.places.padded if padded else self.places.rows
        return Along(split.dim, split.outer, value(x).shape[split.dim] // split.outer // rows)

    def _constant(self, name: str, form: Any, tensor: Tensor) -> Node:
        if (name, form) not in self.constants:
            number = sum(known == name for known, _ in self.constants)
            named = name if not number else f"{name}_{number}"
            where = origin(output_node(self.program.graph))
            self.program, nodes = add_constants(self.program, {named: (tensor, where)})
            self.constants[name, form] = nodes[named]
        return self.constants[name, form]

    def _grown(self, before: Value, placement: Placement) -> Value:
        if not isinstance(placement, Split):
            return before
        shape = list(before.shape)
        shape[placement.dim] = int(shape[placement.dim] * self.places.growth)
        return replace(before, layout=Layout.whole(shape))
