"""Rows that a condition selects (``torch.where(chosen == 3)``, ``x[mask]``), in a graph whose sizes are all fixed.

How many rows a condition selects is known at run time only. Where each row is treated alone, and the results are added
to, or put in the place of, the rows from which they come, the graph can compute all rows and leave out those that were
not selected as it puts them back: the same numbers, and no size that depends on values. So it takes loops over experts
as people write them; a pass (``stack_experts``) then lets each expert compute its own rows only.

So it is with sums, means and losses of the selected rows (:mod:`autopar.selections.row_reductions`).

Rows are counted in the order of the *grid* of the condition's elements, whose first dim is the one to which results
are added. The rule of an operator (:mod:`autopar.rules`) says whether it treats rows alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autopar.ir.builder import Builder
from autopar.ir.node import set_origin, traced_origin, value
from autopar.ir.operator_facts import is_random
from autopar.ir.rewrite import operand
from autopar.rules.choices import choice_of, is_choice
from autopar.rules.hits import NotImplied, without_hits
from autopar.rules.row_by_row import MixesRows, row_dims
from autopar.selections import grids
from autopar.selections.grids import Grid, Selected
from autopar.selections.ragged import (
    column_added_to,
    dim_argument,
    formula,
    is_number,
    name_of,
    ragged_dim,
    ragged_sizes,
    refusal,
    traced_type,
    whole_number,
)
from autopar.selections.row_counts import count_of, type_of
from autopar.selections.row_reductions import AllRows, reduced
from autopar.selections.safe_rows import SAFE

aten = torch.ops.aten

POSITIONS = {aten.where.default, aten.nonzero.default, aten.nonzero_numpy.default}
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
FILLS = {aten.full.default, aten.zeros.default, aten.ones.default}
ADDITIONS = {aten.index_add.default, aten.index_put.default}
LEVELS_COMPARED = 6  # how deep a condition is compared with one that is written a second time


@dataclass
class SelectedRows:
    """Copies the nodes of a traced graph that depend on how many rows were selected.

    ``copies``: traced node -> node of the new graph, to which this adds; ``values_of`` says what a node is.
    """

    graph: fx.Graph
    copies: dict[fx.Node, fx.Node]
    found: dict[fx.Node, Selected] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)  # formula of a condition -> its grid
    sizes: dict[str, Grid] = field(default_factory=dict)  # the number of selected rows, by torch's name for it
    gathered: dict[Any, fx.Node] = field(default_factory=dict)
    safe: dict[fx.Node, int] = field(
        default_factory=dict
    )  # operands without what was not selected -> their dim of rows

    def takes(self, node: fx.Node) -> bool:
        """Whether ``node`` depends on how many rows were selected, so that :meth:`copy` must copy it."""
        ragged = node.target in POSITIONS or bool(ragged_sizes(traced_type(node)))
        return ragged or any(map(self._depends, node.all_input_nodes))

    def _depends(self, source: fx.Node) -> bool:
        return source in self.found or isinstance(traced_type(source), (torch.SymInt, torch.SymBool))

    def copy(self, node: fx.Node) -> None:
        """Add what stands for ``node``. Raises TraceError, with the user's line, where it does not treat rows alone."""
        last = next(iter(reversed(self.graph.nodes)))
        self._copy(node)
        while (last := last.next).op != "root":
            set_origin(last, traced_origin(node))

    def _copy(self, node: fx.Node) -> None:
        if node.target in POSITIONS:
            self._select(node)
        elif is_number(traced_type(node)):
            return  # a size, or an assertion about one: read where it is used
        elif (copier := self._copier(node)) is not None:
            copier(node)
        else:
            self._copy_rows(node)

    def _copier(self, node: fx.Node) -> Callable[[fx.Node], None] | None:
        source = self.found.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if source is not None and source.kind == "positions":
            return self._take_column
        if node.target is aten.index.Tensor and self._pairs(node) is not None:
            return self._gather
        if node.target in ADDITIONS and not ragged_sizes(traced_type(node)) and self._puts_back(node):
            return self._put_back
        return None if ragged_sizes(traced_type(node)) else self._reduce

    def returned(self, node: fx.Node) -> fx.Node:
        """The copy of a node that the model returns. Raises TraceError for rows that were selected."""
        if node in self.found:
            raise refusal(node, "the model returns them")
        return self.copies[node]

    # ------------------------------------------------------------ positions

    def _select(self, node: fx.Node) -> None:
        condition = operand(node)
        if condition in self.found:
            raise refusal(node, "selects among rows that were selected")
        shape = tuple(traced_type(condition).shape)
        first = next((column for column in map(column_added_to, node.users) if column is not None), 0)
        grid = self._grid_of(condition, (first, *(dim for dim in range(len(shape)) if dim != first)))
        if node.target is aten.nonzero.default:
            self.found[node] = Selected(grid, "positions", 1)
            self.sizes[str(traced_type(node).shape[0])] = grid
        else:
            self.found[node] = Selected(grid, "positions", -1)
            self.sizes[str(traced_type(node)[0].shape[0])] = grid

    def _grid_of(self, condition: fx.Node, order: Sequence[int] = ()) -> Grid:
        try:
            copy = without_hits(self.copies[condition])
        except NotImplied:
            raise refusal(condition, "they are selected after 'if', which asks for other ones") from None
        written = formula(copy, LEVELS_COMPARED)
        if written not in self.grids:
            self.grids[written] = Grid(copy, tuple(order) or tuple(range(len(value(copy).shape))))
        return self.grids[written]

    def _take_column(self, node: fx.Node) -> None:
        """One column of a table of positions, by ``unbind``, ``select``, or as an item of a tuple."""
        table = self.found[node.all_input_nodes[0]]
        rank = len(table.grid.sizes)
        if node.target is operator.getitem:
            self.found[node] = Selected(table.grid, "column", column=whole_number(node.args[1]))
        elif node.target is aten.unbind.int and dim_argument(node, 1, 0, 2) == table.dim:
            self.found[node] = Selected(table.grid, "positions", -1)
        elif node.target is aten.select.int and dim_argument(node, 1, 0, 2) == table.dim:
            self.found[node] = Selected(table.grid, "column", column=whole_number(node.args[2]) % rank)
        elif node.target in (aten.t.default, aten.transpose.int) and table.dim >= 0:
            self.found[node] = Selected(table.grid, "positions", 1 - table.dim)
        elif rank == 1 and len(traced_type(node).shape) == 1:
            self.found[node] = Selected(table.grid, "column")
        else:
            raise refusal(node, f"reads positions by {name_of(node)}")

    # ------------------------------------------------------------ rows out of tensors, and back

    def _pairs(self, node: fx.Node) -> tuple[Grid, list[tuple[int, int]]] | None:
        """The grid by which ``x[...]`` or ``x[...] = y`` indexes, and (dim of x, column) pairs; None for other indices.

        A condition is an index along as many dims as it has.
        """
        grid, pairs, dim = None, [], 0
        slots = node.args[1]
        assert isinstance(slots, (list, tuple))
        for slot in slots:
            if not isinstance(slot, fx.Node):
                dim += 1
                continue
            known = self.found.get(slot)
            if known is not None and known.kind == "column":
                own, columns = known.grid, [known.column]
            elif known is None and traced_type(slot).dtype is torch.bool:
                own = self._grid_of(slot)
                columns = list(range(len(own.sizes)))
            else:
                return None
            if grid not in (None, own):
                return None
            grid = own
            pairs += [(dim + i, column) for i, column in enumerate(columns)]
            dim += len(columns)
        return None if grid is None else (grid, pairs)

    def _gather(self, node: fx.Node) -> None:
        pairs = self._pairs(node)
        assert pairs is not None
        grid, places = pairs
        if operand(node) in self.found:
            raise refusal(node, "selects among rows that were selected")
        dim = ragged_dim(node, traced_type(node))
        self.sizes.setdefault(str(traced_type(node).shape[dim]), grid)
        source = self.copies[operand(node)]
        chosen = is_choice(grid.condition)  # then other experts compute the others, so that they are finite
        key = (source, tuple(places), (grid.sizes, grid.order) if chosen else grid, dim)
        if key not in self.gathered:
            if not grid.spans(value(source).shape, places):
                shapes = f"{list(value(source).shape)} by positions in one of shape {list(grid.shape)}"
                raise refusal(node, f"rows are taken of a tensor of shape {shapes}")
            op = self._builder(node)
            rows = grids.gather(op, grid, source, places, dim)
            self.gathered[key] = rows if chosen else grids.filled(op, grid, rows, dim, 0)
        self._enter(node, self.gathered[key], grid, dim)

    def _puts_back(self, node: fx.Node) -> bool:
        """Whether rows are added or put at positions of a condition; not, say, at ids that were selected."""
        if node.target is aten.index_add.default:
            known = self.found.get(operand(node, 2))
            return known is not None and known.kind == "column"
        return True

    def _put_back(self, node: fx.Node) -> None:
        """``out.index_add(dim, column, rows)``, ``out[columns] = rows``, ``out[columns] += rows``."""
        target = self.copies.get(operand(node))
        if target is None or operand(node) in self.found:
            raise refusal(node, f"{name_of(node)} into rows that were selected")
        op = self._builder(node)
        if node.target is aten.index_add.default:
            self.copies[node] = self._added(node, op, target)
        else:
            self.copies[node] = self._put(node, op, target)

    def _added(self, node: fx.Node, op: Builder, target: fx.Node) -> fx.Node:
        dim, index, rows = dim_argument(node, 1, 0, len(value(target).shape)), operand(node, 2), operand(node, 3)
        known, added = self.found.get(index), self.found.get(rows)
        if known is None or known.kind != "column" or added is None or (added.grid, added.dim) != (known.grid, dim):
            raise refusal(node, "adds rows at positions that are not those of the rows")
        if not known.grid.spans(value(target).shape, [(dim, known.column)]):
            raise refusal(node, f"adds rows to a tensor of {value(target).shape[dim]} rows")
        total = grids.sums(op, known.grid, self._rows(node, rows), dim, (known.column,))
        alpha = node.kwargs.get("alpha", node.args[4] if len(node.args) > 4 else 1)
        if alpha != 1:
            total = op(aten.mul.Tensor, total, alpha)
        return op(aten.add.Tensor, target, total)

    def _put(self, node: fx.Node, op: Builder, target: fx.Node) -> fx.Node:
        pairs = self._pairs(node)
        if pairs is None or [dim for dim, _ in pairs[1]] != list(range(len(pairs[1]))):
            raise refusal(node, "puts rows at positions that are not those of the rows")
        grid, places = pairs
        columns = tuple(column for _, column in places)
        if not grid.spans(value(target).shape, places):
            raise refusal(node, f"puts rows into a tensor of shape {list(value(target).shape)}")
        accumulates = len(node.args) > 3 and bool(node.args[3])
        if not accumulates and not self._is_one_for_each(grid, columns):
            raise refusal(
                node, "may put several rows at one place, and only the last one stays", "index_add instead of = or +="
            )
        given = node.args[2]
        assert isinstance(given, fx.Node)
        summand = None if accumulates else self._summand(node, given)
        if accumulates or summand is not None:
            rows = self._rows_of(node, op, grid, given if summand is None else summand)
            return op(aten.add.Tensor, target, grids.sums(op, grid, rows, 0, columns))
        rows = self._rows_of(node, op, grid, given)
        return grids.replaced(op, grid, rows, columns, target)

    def _summand(self, node: fx.Node, given: fx.Node) -> fx.Node | None:
        """y, where ``given`` is ``x[i] + y`` and ``node`` is ``x[i] = given``."""
        if given.target is not aten.add.Tensor or given.kwargs.get("alpha", 1) != 1:
            return None
        for own, other in (given.args[:2], given.args[1::-1]):
            if not isinstance(own, fx.Node) or not isinstance(other, fx.Node) or other not in self.found:
                continue
            taken = own.target is aten.index.Tensor and own.args[0] is node.args[0]
            if taken and self._pairs(own) == self._pairs(node):
                return other
        return None

    def _is_one_for_each(self, grid: Grid, columns: Sequence[int]) -> bool:
        """Whether at most one element of the condition is true for each index of ``columns``."""
        missing = [dim for dim in range(len(grid.sizes)) if dim not in columns and grid.shape[dim] != 1]
        choice = choice_of(grid.condition) if missing else None
        return not missing or (choice is not None and choice.is_exclusive and missing == [choice.dims[-1]])

    def _rows_of(self, node: fx.Node, op: Builder, grid: Grid, given: fx.Node) -> fx.Node:
        """``given`` as rows of ``grid`` along dim 0; what is the same for all rows is repeated."""
        target = value(self.copies[operand(node)]).shape
        inner = target[len(self._pairs(node)[1]) :]  # type: ignore[index]
        source = self.found.get(given)
        if source is not None and (source.grid, source.dim) != (grid, 0) and source.kind == "rows":
            raise refusal(node, "puts rows at positions that are not those of the rows")
        rows = self._rows(node, given)
        shape = (grid.rows, *inner)
        return rows if value(rows).shape == shape else op(aten.expand.default, rows, list(shape))

    # ------------------------------------------------------------ what rows are reduced to

    def _reduce(self, node: fx.Node) -> None:
        """An operator whose result has no rows: it reduces them, or computes with their number."""
        sources = [source for source in node.all_input_nodes if source in self.found]
        known = {self.found[source].grid for source in sources}
        if is_random(node.target) or len(known) > 1 or isinstance(traced_type(node), (list, tuple)):
            raise refusal(node, f"{name_of(node)} needs to know how many there are")
        copy = self._on_all_rows(node)
        if not sources:
            self.copies[node] = copy
            return
        dims = self.safe | {self._rows(node, source): self.found[source].dim for source in sources}
        own = {source: dims[source] for source in copy.all_input_nodes if source in dims}
        op = self._builder(node)
        result = reduced(AllRows(op, copy, known.pop(), own))
        if result is None:
            raise refusal(node, f"{name_of(node)} is made of all of them, and nothing says how to leave out others")
        self.graph.erase_node(copy)
        self.copies[node] = op.cast(result, traced_type(node).dtype)

    # ------------------------------------------------------------ operators on rows

    def _copy_rows(self, node: fx.Node) -> None:
        """The same operator on all rows."""
        sources = [source for source in node.all_input_nodes if source in self.found]
        known = {self.found[source].grid for source in sources}
        known |= {self._size(node, size) for size in ragged_sizes(traced_type(node))}
        if len(known) != 1 or (not sources and node.target not in FILLS) or is_random(node.target):
            raise refusal(node, f"{name_of(node)} needs to know how many there are")
        (grid,) = known
        if node.target is operator.getitem:
            copy = self._builder(node)(operator.getitem, self.copies[operand(node)], node.args[1])
        elif node.target in VIEWS:
            shape = [s if isinstance(s, int) else self._size(node, s).rows for s in traced_type(node).shape]
            source = self._rows(node, operand(node))
            copy = self._builder(node).reshape(source, *shape)
        else:
            copy = self._on_all_rows(node)
        if node.target is not operator.getitem:
            self._check_alone(node, copy, sources)
        if isinstance(traced_type(node), Tensor):
            self._enter(node, copy, grid, ragged_dim(node, traced_type(node)))
        else:
            dims = [ragged_dim(node, part) for part in traced_type(node)]
            if len(set(dims)) != 1:
                raise refusal(node, f"{name_of(node)} gives some results that do not depend on the rows")
            self._enter(node, copy, grid, dims[0])

    def _check_alone(self, node: fx.Node, copy: fx.Node, sources: Sequence[fx.Node]) -> None:
        """Raise TraceError unless, by the rule of the operator, each row of the result is made of one row."""
        if not sources or self.found[sources[0]].grid.rows == 1:
            return  # a constant; of one row, whatever keeps it is made of it
        known = self.safe | {self._rows(node, source): self.found[source].dim for source in sources}
        operands: list[fx.Node] = []
        fx.map_arg((copy.args, copy.kwargs), operands.append)
        results = traced_type(node) if isinstance(traced_type(node), (list, tuple)) else [traced_type(node)]
        for index, fake in enumerate(results):
            try:
                dims = row_dims(copy, index, ragged_dim(node, fake))
            except MixesRows as problem:
                raise refusal(node, str(problem)) from None
            if dims != [known.get(source) for source in operands]:
                raise refusal(node, f"{name_of(node)} mixes them")

    def _on_all_rows(self, node: fx.Node) -> fx.Node:
        """The same operator, where it neither fails nor has an infinite derivative for rows that were not selected."""
        args = [self._argument(node, argument, place) for place, argument in enumerate(node.args)]
        kwargs = {name: self._argument(node, argument, name) for name, argument in node.kwargs.items()}
        op = self._builder(node)
        for place, fill in SAFE.get(node.target, {}).items():
            source = node.args[place] if place < len(node.args) else None
            if isinstance(source, fx.Node) and (known := self.found.get(source)) is not None:
                args[place] = grids.filled(op, known.grid, args[place], known.dim, fill)
                self.safe[args[place]] = known.dim
        return op(node.target, *args, **kwargs)

    def _argument(self, node: fx.Node, argument: Any, place: int | str) -> Any:
        if isinstance(argument, fx.Node) and is_number(traced_type(argument)):
            kind = type_of(node.target, place)
            if "number" in kind or kind == "Tensor":
                op = self._builder(node)
                count = count_of(op, argument, lambda size: grids.count(op, self._size(node, size)))
                if count is None or kind != "Tensor":
                    raise refusal(node, f"{name_of(node)} computes with their number")
                return count
        return fx.map_arg(argument, lambda source: self._rows(node, source))

    def _rows(self, node: fx.Node, source: fx.Node) -> Any:
        """What stands for ``source`` in the arguments of ``node``: a node, or the number of all rows."""
        known = self.found.get(source)
        if known is not None and known.kind == "column" and source not in self.copies:
            self.copies[source] = grids.positions(self._builder(node), known.grid, known.column)
        if is_number(traced_type(source)):
            return self._size(node, traced_type(source)).rows
        if known is not None and known.kind == "positions":
            raise refusal(node, f"{name_of(node)} of positions")
        return self.copies[source]

    def _size(self, node: fx.Node, size: Any) -> Grid:
        if str(size) not in self.sizes:
            raise refusal(node, f"{name_of(node)} has a size of {size}")
        return self.sizes[str(size)]

    def _enter(self, node: fx.Node, copy: fx.Node, grid: Grid, dim: int) -> None:
        self.copies[node] = copy
        self.found[node] = Selected(grid, "rows", dim)

    def _builder(self, node: fx.Node) -> Builder:
        return Builder(after=next(iter(reversed(self.graph.nodes))))
