"""Operators that shorten, lengthen or move a sequence, written so that every value has all positions again.

Parts of a sequence are equal, so a slice ``x[:, :-1]`` could only be taken of the whole. This rewrites a program on an
axis that splits positions:

    x[:, :-1], then element by element, then a loss   all positions; those beside the window have the ignored label
    ... then a sum or a mean                          all positions; zeros beside the window
    pad and slice, cat of a slice and other rows      ``roll``, with other rows at the seam
    convolution, padded as it likes                   ``padded_convolution``, one result for each position

Whatever else uses a window gets it as a slice of all positions, which is gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autopar import operators
from autopar.ir.builder import Builder
from autopar.ir.layout import Split
from autopar.ir.node import value
from autopar.ir.operator_facts import argument_names
from autopar.ir.program import Program
from autopar.ir.rewrite import remove_unused
from autopar.rules.factoring import Call, Factoring
from autopar.split.flow import Flow, key_of
from autopar.split.seam_convolutions import CONVOLUTIONS, Taps, taps_of, without
from autopar.split.window_ends import combined, with_operands
from autopar.split.windows import Place, Window, Writer, place_of, stretched

aten = torch.ops.aten

SLICES = (aten.slice.Tensor,)
PADS = (aten.pad.default, aten.constant_pad_nd.default)
SEAMS = frozenset((*SLICES, *PADS, *CONVOLUTIONS, aten.cat.default))
SIZED = (aten.reshape.default, aten.expand.default)  # the sizes of the result are their second argument


@dataclass(frozen=True)
class _Padded:
    """A value that is a window with ``before`` elements of ``fill`` in front of it, and as many as fit behind it."""

    window: Window
    before: int
    fill: float


def without_seams(program: Program, flow: Flow, split: Split) -> bool:
    """Rewrite ``program`` where ``split`` flows to an operator of ``SEAMS``; whether there was one.

    ``flow``: of this program, with the splits spread.
    """
    return _Walk(program, flow, split).run()


@dataclass
class _Walk:
    program: Program
    flow: Flow
    split: Split
    windows: dict[fx.Node, Window] = field(default_factory=dict)
    padded: dict[fx.Node, _Padded] = field(default_factory=dict)
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)  # node -> what takes its place
    rolled: dict[tuple[fx.Node, int, int], fx.Node] = field(default_factory=dict)
    whole: dict[fx.Node, int] = field(default_factory=dict)  # those of ``made`` that have all positions -> their dim

    def run(self) -> bool:
        for node in list(self.program.graph.nodes):
            if node.op == "call_function" and node.target in SEAMS and self._seam(node):
                continue
            if self.windows.keys() & node.all_input_nodes and node in self.flow.calls:
                self._follow(node, self._writer(node))
        for node, new in self.made.items():
            node.replace_all_uses_with(new)
        remove_unused(self.program.graph)
        if self.made:
            self._cut_the_rest()
        return bool(self.made)

    def _writer(self, node: fx.Node) -> Writer:
        return Writer(Builder(before=node), self.program.mesh, self.rolled)

    def _cut_the_rest(self) -> None:
        """Values that are computed as windows, and used in other ways too, are computed once."""
        there = set(self.program.graph.nodes)
        for node, window in self.windows.items():
            if node.target not in SEAMS and {node, window.node} <= there and node.users and window.node.users:
                short = self._writer(node).cut(window, node)
                if short is not None:
                    node.replace_all_uses_with(short)
        remove_unused(self.program.graph)

    def _sizes(self, node: fx.Node) -> tuple[int, ...]:
        return value(node).layout.local_shape(self.program.mesh)

    def _source(self, node: fx.Node, dim: int) -> Window | None:
        """``node`` as a window along ``dim``; one of all positions where the split flows to it."""
        if node in self.windows:
            window = self.windows[node]
            return window if (window.dim, window.outer, window.inner) == (dim, 1, 1) else None
        if self.whole.get(node) != dim and not self._is_split(node, dim):
            return None
        length = self._sizes(node)[dim]
        return Window(self.made.get(node, node), dim, length, 0, length)

    def _is_split(self, node: fx.Node, dim: int) -> bool:
        """Whether the split of positions flows to ``dim`` of a value."""
        return replace(self.split, dim=dim) in self.flow.splits.get(key_of(node), ())

    # ------------------------------------------------------------ where positions are left out, added or moved

    def _seam(self, node: fx.Node) -> bool:
        handler: Callable[[fx.Node], bool] = (
            self._slice if node.target in SLICES
            else self._pad if node.target in PADS
            else self._cat if node.target is aten.cat.default
            else self._convolution
        )  # fmt: skip
        return handler(node)

    def _take(self, node: fx.Node, window: Window) -> bool:
        """``node`` is ``window``."""
        if (window.offset, window.length) == (0, window.total):
            self.made[node], self.whole[node] = window.node, window.dim
        elif window.offset >= 0 and window.offset + window.length <= window.total:
            self.windows[node] = window
        else:
            return False
        return True

    def _slice(self, node: fx.Node) -> bool:
        source, dim, start, stop, *step = node.args
        assert isinstance(source, fx.Node) and isinstance(dim, int) and isinstance(start, int)
        length = self._sizes(node)[dim]
        if step not in ([], [1]) or length == 0:
            return False
        if source in self.padded:
            padded = self.padded[source]
            if padded.window.dim != dim or length > padded.window.total:
                return False
            return self._place(node, padded.window, padded.before - start, length, padded.fill)
        window = self._source(source, dim)
        if window is None or length == self._sizes(source)[dim]:
            return False
        return self._take(node, replace(window, offset=window.offset + start, length=length))

    def _place(self, node: fx.Node, window: Window, before: int, length: int, fill: float) -> bool:
        """``node`` has ``window`` behind ``before`` elements of ``fill``, and ``length`` elements in all."""
        writer = self._writer(node)
        moved = writer.moved(window, before)
        if moved is None:
            return False
        number = fill if value(window.node).dtype.is_floating_point else int(fill)
        found = writer.filled(moved.node, window.dim, max(0, before), min(window.total, before + window.length), number)
        return self._take(node, replace(moved, node=found, offset=0, length=length))

    def _pad(self, node: fx.Node) -> bool:
        source, amounts, *rest = node.args
        assert isinstance(source, fx.Node) and isinstance(amounts, (list, tuple))
        mode, fill = (rest or ["constant"])[0], rest[-1] if len(rest) > (node.target is aten.pad.default) else 0
        if node.target is aten.pad.default and (mode != "constant" or "mode" in node.kwargs):
            return False
        fill = node.kwargs.get("value", fill) or 0
        rank = len(value(source).shape)
        touched = {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
        if len(touched) != 1 or not isinstance(fill, (int, float)):
            return False
        (dim,) = touched
        window, before = self._source(source, dim), int(amounts[2 * (rank - 1 - dim)])  # type: ignore[arg-type]
        if window is None:
            return False
        length = self._sizes(node)[dim]
        if length == window.total:
            return self._place(node, window, before, length, fill)
        self.padded[node] = _Padded(window, before, fill)
        return True

    def _cat(self, node: fx.Node) -> bool:
        pieces, dim = operand_list(node), int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        dim %= len(value(node).shape)
        total = self._sizes(node)[dim]
        sources = [self._source(piece, dim) for piece in pieces]
        if not any(window and window.total == total and window.length < total for window in sources):
            return False
        if any(value(piece).dtype != value(node).dtype for piece in pieces):
            return False
        writer, found, start = self._writer(node), None, 0
        for piece, window in zip(pieces, sources):
            length = self._sizes(piece)[dim]
            if window and window.total == total:
                moved = writer.moved(window, start)
            else:
                moved = writer.widened(piece, Window(piece, dim, total, start, length))
            if moved is None:
                return False
            if found is None:
                found = moved.node
            else:
                here = writer.within(len(value(node).shape), dim, total, start, start + length)
                found = writer.op(aten.where.self, here, moved.node, found, like=node)
            start += length
        assert found is not None
        return self._take(node, Window(found, dim, total, 0, total))

    def _convolution(self, node: fx.Node) -> bool:
        """One result for each position, or stride of positions: those beside the ends are not used."""
        given = {**dict(zip(argument_names(node.target), node.args)), **node.kwargs}
        source, weight = given["input"], given["weight"]
        assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
        count, rank = len(value(weight).shape) - 2, len(value(source).shape)
        if rank != count + 2:
            return False
        for place, dim in enumerate(range(2, rank)):
            taps = taps_of(given, self._sizes(weight), count, place)
            before, window, length = taps.before, self._source(source, dim), self._sizes(source)[dim]
            if source in self.padded and self.padded[source].window.dim == dim and not self.padded[source].fill:
                before, window = before + self.padded[source].before, self.padded[source].window
            if window is None and self._is_split(node, dim) and taps.stride * self._sizes(node)[dim] == length:
                window = Window(self.made.get(source, source), dim, length, 0, length)
            if window is not None and (window.offset, window.length) == (0, window.total):
                return self._convolved(node, given, window, replace(taps, before=before))
        return False

    def _convolved(self, node: fx.Node, given: dict[str, Any], window: Window, taps: Taps) -> bool:
        total, dim, length = window.total, window.dim, self._sizes(node)[window.dim]
        strided = length * taps.stride == total
        if taps.stride > 1 and not strided:
            return False
        first = 0 if length <= total else self._first_used(node, dim)  # the result that belongs to position 0
        before, results = taps.before - first, total // taps.stride
        after = (results - 1) * taps.stride + taps.reach - before - total
        if before < 0 or after < 0 or before >= taps.reach:
            return False
        settings = ([*taps.strides], without(taps.paddings, dim - 2), [*taps.dilations], given.get("groups", 1))
        arguments = (window.node, given["weight"], given.get("bias"), dim, before, after, *settings)
        kind = value(node)
        if length != results:
            one = Window(node, dim, length, 0, length)
            found = stretched(kind, one, dim, length, results, self.program.mesh)
            if found is None:
                return False
            kind = found
        new = self._writer(node).op(operators.padded_convolution, *arguments, like=kind)
        if length == results:
            self.made[node], self.whole[node] = new, dim
            return True
        self.windows[node] = Window(new, dim, results, -first, length)
        return True

    def _first_used(self, node: fx.Node, dim: int) -> int:
        """The first result that a slice takes; 0 where not all users are slices."""
        starts = [int(user.args[2]) for user in node.users if user.target in SLICES and user.args[1] == dim]  # type: ignore[arg-type]
        return min(starts) if len(starts) == len(node.users) else 0

    # ------------------------------------------------------------ what is computed of a window

    def _follow(self, node: fx.Node, writer: Writer) -> None:
        call, factoring = self.flow.calls[node], self.flow.factorings[node]
        base, place = self._leading(call, factoring)
        if base is None or place is None or place.factor in factoring.whole:
            return
        found = self._operands(call, factoring, base, place, writer)
        if found is None:
            return
        places = [[d for d, names in enumerate(dims) if place.factor in names] for dims in factoring.outputs]
        if not any(places):
            new = combined(node, found, base, writer)
            if new is not None:
                self.made[node] = new
        elif len(places) == 1 and len(places[0]) == 1:
            dim = places[0][0]
            outer, inner = place.among(factoring.outputs[0][dim], factoring.sizes)
            self._carry(node, factoring, found, replace(base, node=node, dim=dim, outer=outer, inner=inner), writer)

    def _leading(self, call: Call, factoring: Factoring) -> tuple[Window | None, Place | None]:
        """The window that decides where all others begin, and where the operator has its positions."""
        order = sorted(
            (i for i, each in enumerate(call.operands) if each in self.windows), key=lambda i: not call.diff_inputs[i]
        )
        for position in order:
            window = self.windows[call.operands[position]]
            place = place_of(factoring.inputs[position][window.dim], factoring.sizes, window)
            if place:
                return window, place
        return None, None

    def _operands(
        self, call: Call, factoring: Factoring, base: Window, place: Place, writer: Writer
    ) -> list[Window | fx.Node] | None:
        """The operands with all positions, beginning where ``base`` does; None where that cannot be said."""
        found: list[Window | fx.Node] = []
        for each, dims in zip(call.operands, factoring.inputs):
            places = [d for d, names in enumerate(dims) if place.factor in names]
            if not places:
                found.append(each)
                continue
            outer, inner = place.among(dims[places[0]], factoring.sizes)
            here = Window(each, places[0], base.total, base.offset, base.length, outer, inner)
            known = self.windows.get(each)
            if known and replace(known, node=each, offset=base.offset) == here:
                moved = writer.moved(known, base.offset)
            else:
                moved = writer.widened(each, here)
            if moved is None or len(places) > 1:
                return None
            found.append(moved)
        return found

    def _carry(
        self, node: fx.Node, factoring: Factoring, found: list[Window | fx.Node], window: Window, writer: Writer
    ) -> None:
        """Compute ``node``, which is as ``window`` says, of all positions."""
        kind = stretched(value(node), window, window.dim, window.length, window.total, self.program.mesh)
        if kind is None or (factoring.localize and node.target not in SIZED):
            return
        args, kwargs = with_operands(node, found)
        if node.target in SIZED:
            args = (args[0], list(kind.layout.local_shape(self.program.mesh)))
        self.windows[node] = replace(window, node=writer.op(node.target, *args, like=kind, **kwargs))


def operand_list(node: fx.Node) -> list[fx.Node]:
    pieces = node.args[0]
    assert isinstance(pieces, (list, tuple))
    return [piece for piece in pieces if isinstance(piece, fx.Node)]
