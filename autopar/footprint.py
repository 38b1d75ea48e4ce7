"""What a rank of a program holds and sends, read off its graphs: nothing is run, so any mesh and size will do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from autopar import comm
from autopar.lockstep import Transfer, moved_bytes
from autopar.mesh import Mesh
from autopar.program import InputKind, Node, Program, Value, value


def bytes_of(kind: Value, mesh: Mesh | None = None) -> int:
    """Bytes of one tensor: of the whole, or of what a rank of ``mesh`` holds of it."""
    return math.prod(kind.shape if mesh is None else kind.layout.local_shape(mesh)) * kind.dtype.itemsize


@dataclass(frozen=True)
class Holdings:
    """Bytes of parameters: those of the model, those of one rank, and those that each axis splits (of the model's)."""

    whole: int
    rank: int
    split: Mapping[str, int]


def held(program: Program) -> Holdings:
    """The parameters of one rank; where a split is uneven, those of the rank that has most."""
    whole = rank = 0
    split = {axis: 0 for axis, size in program.mesh.axes if size > 1}
    for node, _ in program.placeholders(InputKind.PARAMETER):
        kind = value(node)
        whole += bytes_of(kind)
        rank += bytes_of(kind, program.mesh)
        for axis in kind.layout.axes:
            split[axis] = split.get(axis, 0) + bytes_of(kind)
    return Holdings(whole, rank, split)


def sent(program: Program, rank: int = 0) -> tuple[Transfer, ...]:
    """What ``rank`` sends in one step, by phase, axis and collective; before ``differentiate`` forward only."""
    if not program.roles:
        return _transfers(program.graph, program.mesh, "forward")
    role = program.role_of(rank)
    backward = () if role.backward is None else _transfers(role.backward, program.mesh, "backward")
    return (*_transfers(role.forward, program.mesh, "forward"), *backward)


def _transfers(graph: fx.Graph, mesh: Mesh, phase: str) -> tuple[Transfer, ...]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for node in graph.nodes:
        name = comm.moving(node.target)
        if name is None:
            continue
        source, axis = _operand(node)
        ways = mesh.size(axis)
        if ways == 1:
            continue
        operations, moved = found.get((axis, name), (0, 0))
        size = bytes_of(value(source), mesh)
        found[axis, name] = operations + 1, moved + moved_bytes(name, ways, size)
    return tuple(Transfer(phase, axis, name, *counts) for (axis, name), counts in found.items())


def _operand(node: Node) -> tuple[Node, str]:
    """The tensor and the axis of a collective, given by position or by name."""
    source = node.args[0] if node.args else node.kwargs["x"]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs["axis"]
    assert isinstance(source, Node) and isinstance(axis, str)
    return source, axis
