"""Ratios of unequal segments, as the sizes of these segments: a ratio itself is in lowest terms, and says no size.

A part of 28 of 1024 positions is in the ratio 7 to 249, one of 40 in 5 to 123; the segments are 28 and 996, 40 and 984.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.node import values
from autopar.ir.sizes import is_expression
from autopar.mesh import Mesh

Numbers = Sequence[Any]
ENDS = {"source": 3, "target": 4}  # positions of the two splits, each (dim, outer, *ratio)


def segments(ratio: Numbers, length: Any) -> tuple[Any, ...]:
    """The sizes of the segments of a block of ``length`` elements. A ratio with expressions has them already."""
    if len(ratio) == 1 or any(map(is_expression, ratio)):
        return tuple(ratio)
    unit = length // sum(ratio)
    return tuple(part * unit for part in ratio)


def ratio_of(sizes: Numbers) -> tuple[Any, ...]:
    """The inverse of :func:`segments`; expressions stay."""
    if len(sizes) == 1 or any(map(is_expression, sizes)):
        return tuple(sizes)
    common = math.gcd(*sizes)
    return tuple(size // common for size in sizes)


def has_ratio(node: fx.Node) -> bool:
    """Whether ``node`` is a collective that joins or cuts unequal segments."""
    name = comm.TARGETS.get(node.target)
    if name is None or name in ("wait", "axis_index"):
        return False
    form = comm.row_of(name).form
    if form is comm.PART:
        return len(node.args[5]) > 1  # type: ignore[arg-type]
    return form.schema == comm.ENDS.schema and any(len(node.args[place]) > 3 for place in ENDS.values())  # type: ignore


def with_segments(node: fx.Node, mesh: Mesh | None) -> tuple[Any, ...]:
    """The arguments of a collective, with the sizes of segments in place of ratios. Without ``mesh``: as they are."""
    args: list[Any] = list(node.args)
    if mesh is None:
        return node.args
    if len(args) > 5:
        args[5] = list(segments(args[5], _block(args[6], args[4])))
        return tuple(args)
    before, after = args[0], node
    for place, whole in ((ENDS["source"], after), (ENDS["target"], before)):  # where the dim is not split
        dim, outer, *ratio = args[place]
        length = values(whole)[0].layout.local_shape(mesh)[dim]
        if args[ENDS["source"]][0] == args[ENDS["target"]][0]:
            length = length * args[2]
        args[place] = [dim, outer, *segments(ratio, _block(length, outer))]
    return tuple(args)


def _block(length: Any, outer: Any) -> Any:
    """The elements of each of ``outer`` blocks (negative: mirrored)."""
    if not is_expression(length) and not is_expression(outer):
        return length // abs(outer)
    block = length / abs(outer)
    return int(block) if block.is_Integer else block


def with_ratios(args: Sequence[Any]) -> tuple[Any, ...]:
    """The inverse of :func:`with_segments`."""
    found = list(args)
    if len(found) > 5:
        found[5] = list(ratio_of(found[5]))
        return tuple(found)
    for place in ENDS.values():
        dim, outer, *sizes = found[place]
        found[place] = [dim, outer, *ratio_of(sizes)]
    return tuple(found)
