"""Over which axes the experts of a region are dealt out: ``ep`` alone, or with ``sp`` or ``tp`` (folded).

A rank of ``ep x tp`` ranks can have a part of each of ``E / ep`` experts, or ``E / (ep x tp)`` whole ones. The second
sends fewer rows, since the ranks of ``tp`` share the tokens out between them, and no sum over ``tp`` follows. With
``sp`` the ranks have other tokens anyway: folded, the gradients of the experts need no sum over ``sp``, but rows go
further.
(Liu et al. 2025, MoE Parallel Folding, arXiv:2504.14960.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import fx

from autopar.errors import IndivisibleError
from autopar.ir.node import origin, value
from autopar.ir.program import Program
from autopar.ir.traffic import bytes_of, moved_bytes
from autopar.mesh import EXPERTS, SEQUENCE
from autopar.routing.regions import Region, regions_of

TENSOR = "tp"
EXCHANGES = 4  # of rows, in forward and backward
AUTO = "auto"


def is_asked_for(program: Program) -> bool:
    """Whether experts are to be dealt out at all."""
    return program.mesh.size(asked_group(program)) > 1


def asked_group(program: Program) -> str:
    """The axes over which the plan wants experts at least."""
    axes = program.plan.expert_axes
    return program.mesh.merged([EXPERTS] if axes == AUTO else axes.split("+"))


def kept_off_tensor_axis(program: Program) -> frozenset[fx.Node]:
    """The weights of experts that ``tp`` leaves whole, since it deals out whole experts.

    Raises IndivisibleError where the plan asks for that and it is not possible.
    """
    if program.mesh.size(TENSOR) == 1 or not is_asked_for(program):
        return frozenset()
    regions, _ = regions_of(program)
    return frozenset(weight for region in regions if TENSOR in _axes(program, region) for weight in region.weights)


def group_of(program: Program, region: Region) -> str:
    """The axes, merged, over which the experts of ``region`` are dealt out, once all axes are split.

    An axis of one rank where they are not.
    """
    if not is_asked_for(program):
        return EXPERTS
    split = {axis for weight in region.weights for axis in value(weight).layout.axes}
    axes = [axis for axis in _axes(program, region) if axis not in split]
    return program.mesh.merged(axes or [EXPERTS])


def _axes(program: Program, region: Region) -> list[str]:
    mesh, asked = program.mesh, program.plan.expert_axes
    if asked != AUTO:
        axes = [axis for axis in asked.split("+") if mesh.size(axis) > 1]
        if TENSOR in axes and not _shares_out(program, region):
            raise IndivisibleError(_uneven_tokens(program, region))
        return axes
    axes = [EXPERTS]
    if mesh.size(TENSOR) > 1 and _divides(program, region, [*axes, TENSOR]) and _shares_out(program, region):
        axes.append(TENSOR)
    if mesh.size(SEQUENCE) > 1 and _divides(program, region, [*axes, SEQUENCE]) and _is_cheaper_folded(program, region):
        axes.append(SEQUENCE)
    return axes


def _divides(program: Program, region: Region, axes: Iterable[str]) -> bool:
    return region.experts % math.prod(map(program.mesh.size, axes)) == 0


def _tokens(program: Program, region: Region) -> int:
    """The fewest rows that a value of the region has on a rank: one for each token."""
    sources = (*region.taken, region.ids)
    return min(value(node).layout.local_shape(program.mesh)[0] for node in sources)


def _shares_out(program: Program, region: Region) -> bool:
    """Whether the ranks of ``tp`` have other tokens already, or each can have an equal part of them."""
    there = TENSOR in value(region.ids).layout.axes
    return there or _tokens(program, region) % program.mesh.size(TENSOR) == 0


def _is_cheaper_folded(program: Program, region: Region) -> bool:
    """Whether the sum of gradients over ``sp`` sends more than what rows send further."""
    mesh = program.mesh
    ways, more = mesh.size(EXPERTS), mesh.size(EXPERTS) * mesh.size(SEQUENCE)
    weights = sum(bytes_of(value(weight), mesh) for weight in region.weights) // ways
    rows = value(region.ids).layout.local_shape(mesh)[0]
    sent = sum(rows * _width(program, source) for source in region.taken)
    further = moved_bytes("dispatch_rows", more, sent) - moved_bytes("dispatch_rows", ways, sent)
    return moved_bytes("all_reduce", mesh.size(SEQUENCE), weights) > EXCHANGES * further


def _width(program: Program, source: fx.Node) -> int:
    """Bytes of one row."""
    kind = value(source)
    return math.prod(kind.layout.local_shape(program.mesh)[1:]) * kind.dtype.itemsize


def _uneven_tokens(program: Program, region: Region) -> str:
    where, ways = origin(region.products[0]).module, program.mesh.size(TENSOR)
    return (
        f"Plan(expert_axes={program.plan.expert_axes!r}) shares the tokens of {where or region.products[0].name} out "
        f"over {TENSOR}={ways}, which does not divide the {_tokens(program, region)} of a rank\n"
        f'Way out: a batch or a length that makes them a multiple of {ways}, or Plan(expert_axes="ep").'
    )
