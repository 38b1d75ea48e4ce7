"""Rules for a dim of positions that an axis splits, in place of those by which it stays whole.

Only an axis that splits a sequence uses them (:mod:`autopar.split.sequence_policy`): an image or a row of features is
cheaper whole. Each splits the dim in one way, plain or in zig-zag order, and writes code of its own for it:

    convolution           the positions beside a part come from the ranks beside it (:mod:`autopar.rules.halo`)
    roll                  as a halo of a ring
    cumsum, cumprod, ...  scans of the parts; the totals of all parts are gathered, one row of each
    select, gather, ...   the rank that has a row gives it, the others zeros: a pending sum
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from autopar import operators
from autopar.ir.layout import Split
from autopar.ir.node import Node, value
from autopar.rules import indexing, reductions, segments, spatial, views
from autopar.rules.factoring import Call, Dims, Emit, Factoring, Part
from autopar.rules.halo import RING, Chunks, fits, with_halo
from autopar.rules.picks import picked, row_of
from autopar.rules.scans import SCANS, scanned

aten = torch.ops.aten
POSITIONS = "positions"
Make = Callable[[Chunks, Node], Node]  # code for the local call of a node
Along = Callable[[Call, Split], Factoring]  # as a split divides the positions


@dataclass(frozen=True)
class AlongPositions(Factoring):
    """A factoring of which ``POSITIONS`` is split in one way only: as ``split`` is, whatever its dim.

    ``longest``: of the halos that the code for it exchanges.
    """

    split: Split = Split(0)
    longest: int = 0

    def allows(self, part: Part, ways: int) -> bool:
        if part.factor != POSITIONS:
            return super().allows(part, ways)
        same = (part.outer, part.ratio, part.mirrored) == (self.split.outer, self.split.ratio, self.split.mirrored)
        size = self.sizes[POSITIONS]
        return same and self.split.divides(size, ways) and fits(size, ways, self.split.mirrored, self.longest)


def _along(found: Factoring, split: Split, dim: int, make: Make, size: int, longest: int = 0) -> Factoring:
    """``found`` where the factor of ``dim`` of the first operand may be split; ``make`` writes the code for it."""
    if not found.inputs[0] or not found.inputs[0][dim]:
        return found
    name = found.inputs[0][dim][0]

    def renamed(tensor: Dims) -> Dims:
        return tuple(tuple(POSITIONS if factor == name else factor for factor in factors) for factors in tensor)

    def rewrite(emit: Emit, node: Node, axis: str, ways: int) -> Node:
        return make(Chunks(emit, axis, ways, dim, split.mirrored), node)

    settings: dict[str, Any] = {field: getattr(found, field) for field in Factoring.__dataclass_fields__}
    settings |= {
        "inputs": tuple(map(renamed, found.inputs)),
        "outputs": tuple(map(renamed, found.outputs)),
        "sizes": {factor: size for factor, size in found.sizes.items() if factor != name} | {POSITIONS: size},
        "whole": found.whole - {name},
        "uneven": found.uneven - {name},
        "rewrites": {**found.rewrites, POSITIONS: rewrite},
    }
    return AlongPositions(**settings, split=split, longest=longest)


def _tensor(node: Node, position: int = 0) -> Node:
    found = node.args[position]
    assert isinstance(found, Node), node.format_node()
    return found


def _dim(call: Call, position: int, name: str, default: Any = None) -> int:
    return int(call.argument(position, name, default)) % max(1, len(call.inputs[0]))


# ---------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class _Taps:
    """What a convolution reads along one dim for each stride: ``reach`` positions, from ``before`` in front of it."""

    before: int
    reach: int
    stride: int

    @property
    def after(self) -> int:
        """The positions behind a part that its last window reads."""
        return max(0, self.reach - self.before - self.stride)


def convolution(call: Call, split: Split) -> Factoring:
    _, _, _, dim, before, after, strides, _, dilation, _ = call.args
    known, length, produced = spatial.padded_convolution(call), call.inputs[0][dim], call.outputs[0][dim]
    place = dim - 2
    taps = _Taps(before, (call.inputs[1][2 + place] - 1) * dilation[place] + 1, strides[place])
    if produced * taps.stride != length or before >= taps.reach:
        return known
    name = known.inputs[0][dim]
    inputs = [list(tensor) for tensor in known.inputs]
    inputs[0][dim] = (*name, "stride") if taps.stride > 1 else name
    output = list(known.outputs[0])
    output[dim] = name
    shared = replace(
        known,
        inputs=tuple(map(tuple, inputs)),
        outputs=(tuple(output),),
        sizes={**known.sizes, "stride": taps.stride},
        whole=known.whole | {"stride"},
        work=math.prod(known.sizes.values()),
    )
    longest = -(-max(taps.before, taps.after) // taps.stride)
    return _along(shared, split, dim, partial(_convolved, taps, place), produced, longest)


def _convolved(taps: _Taps, place: int, chunks: Chunks, node: Node) -> Node:
    """The windows of each chunk with its halo."""
    x, weight, bias, _, _, _, *settings = node.args
    assert isinstance(x, Node)
    target = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[len(value(x).shape) - 3]
    pieces = []
    for chunk in with_halo(chunks, x, taps.before, taps.after, 0.0):
        made = (chunks.length(chunk) - taps.reach) // taps.stride + 1
        pieces.append(chunks.emit(target, (chunk, weight, bias, *settings), chunks.kind(value(node), made)))
    return chunks.joined(pieces, value(node))


# ---------------------------------------------------------------- the others


def roll(call: Call, split: Split) -> Factoring:
    """Along one dim; the shorter way around."""
    known = views.RULES[aten.roll.default](call)
    by, dims = (_listed(call.argument(position, name, ())) for position, name in ((1, "shifts"), (2, "dims")))
    if len(dims) != 1 or len(by) != 1 or not call.inputs[0]:
        return known  # type: ignore[no-any-return]
    dim = dims[0] % len(call.inputs[0])
    length = call.inputs[0][dim]
    steps = by[0] % length if length else 0
    steps = steps - length if steps > length // 2 else steps
    return _along(known, split, dim, partial(_rolled, steps), length, abs(steps))


def _listed(given: Any) -> list[int]:
    return [int(number) for number in given] if isinstance(given, (list, tuple)) else [int(given)]


def _rolled(steps: int, chunks: Chunks, node: Node) -> Node:
    before, after = max(0, steps), max(0, -steps)
    pieces = []
    for chunk in with_halo(chunks, _tensor(node), before, after, RING):
        length = chunks.length(chunk)
        pieces.append(chunks.rows(chunk, after, length - before))
    return chunks.joined(pieces, value(node))


def scan(call: Call, split: Split) -> Factoring:
    dim = _dim(call, 1, "dim")
    known = (views.RULES if call.target in views.RULES else reductions.RULES)[call.target](call)
    return _along(known, split, dim, scanned, _size(call, dim))


def select(call: Call, split: Split) -> Factoring:
    dim = _dim(call, 1, "dim")
    length = call.inputs[0][dim]
    place = int(call.argument(2, "index")) % length
    return _along(segments.RULES[aten.select.int](call), split, dim, partial(row_of, place), length)


def pick(call: Call, split: Split) -> Factoring:
    """``gather`` and ``index_select``: the index counts positions of the whole."""
    dim = _dim(call, 1, "dim")
    return _along(indexing.RULES[call.target](call), split, dim, picked, _size(call, dim))


def _size(call: Call, dim: int) -> int:
    return call.inputs[0][dim] if call.inputs[0] else 1


PICKS = (aten.select.int, aten.gather.default, aten.index_select.default)
RULES: dict[Any, Along] = {
    operators.padded_convolution: convolution,
    aten.roll.default: roll,
    **dict.fromkeys(SCANS, scan),
    aten.select.int: select,
    **dict.fromkeys(PICKS[1:], pick),
}


def rules_along(split: Split) -> dict[Any, Callable[[Call], Factoring]]:
    """The rules for positions that are divided as ``split`` says, whatever its dim."""

    def bound(rule: Along) -> Callable[[Call], Factoring]:
        return lambda call: rule(call, split)

    return {target: bound(rule) for target, rule in RULES.items()}
