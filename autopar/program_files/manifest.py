"""The manifest of a program on disk: all that another tool needs to place tensors and start ranks.

A split dim is described by ``{"axes": ["dp", "tp"], "pieces": [...]}``: ``pieces`` has one entry for each combination
of positions on ``axes`` (row-major, the last axis varies fastest). Each entry lists the ``[start, stop)`` ranges of the
dim that such a rank holds, in the order of its memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from autopar.ir import collectives as comm
from autopar.ir import text
from autopar.ir.layout import Factor, Layout, runs
from autopar.ir.node import Node, values
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.ir.tables import InputKind
from autopar.mesh import PIPELINE, Mesh, axes_of
from autopar.program_files.structures import structure_to_json

FORMAT, VERSION = "autopar program", 1


def describe(program: AnyProgram) -> dict[str, Any]:
    """The manifest without its files and checksum. Raises ValueError where a structure cannot be written."""
    mesh = program.mesh
    return {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__,
        "fingerprint": None if program.fingerprint is None else program.fingerprint.to_json(),
        "mesh": dict(mesh.axes),
        "plan": program.plan.to_json(),
        "passes": list(program.passes),
        "structures": {
            "inputs": structure_to_json(program.in_spec),
            "outputs": structure_to_json(program.out_spec),
        },
        "joins": dict(program.joins),
        "static_inputs": [[position, text.argument_text(value)] for position, value in program.static_inputs],
        "static_outputs": [[position, text.argument_text(value)] for position, value in program.static_outputs],
        "inputs": list(_tensors(program, InputKind.INPUT, InputKind.SEED)),
        "outputs": [
            {"kind": entry.kind.value, "name": entry.target, **_type(node, mesh)}
            for node, entry in zip(program.returned, program.outputs)
        ],
        "parameters": list(_tensors(program, InputKind.PARAMETER)),
        "buffers": list(_tensors(program, InputKind.BUFFER)),
        "groups": {axis: [list(group) for group in mesh.groups(axis)] for axis in _axes(program)},
        "ranks": list(_ranks(program)),
    }


def _axes(program: AnyProgram) -> list[str]:
    """The axes of the mesh, and those that the program has merged, or parts of one."""
    graphs = (graph for part in program.parts for graph in part.graphs.values())
    return list(dict.fromkeys((*program.mesh.names, *comm.axes_used(graphs))))


def _ranks(program: AnyProgram) -> Iterator[dict[str, Any]]:
    """``role``: the position on the pipeline, whose ranks run the same graphs; with it the stages there."""
    for rank in range(program.mesh.world_size):
        here = program.mesh.coordinates(rank)
        role = here.get(PIPELINE, 0)
        stages = {"stages": [*program.stages_on(role)]} if isinstance(program, PipelinedProgram) else {}
        yield {"rank": rank, "role": role, "coordinates": here, **stages}


def _tensors(program: AnyProgram, *kinds: InputKind) -> Iterator[dict[str, Any]]:
    for node, entry in program.placeholders(*kinds):
        row: dict[str, Any] = {"name": entry.target}
        if entry.aliases:
            row["tied"] = list(entry.aliases)
        yield {**row, "node": node.name, **_type(node, program.mesh)}


def _type(node: Node, mesh: Mesh) -> dict[str, Any]:
    """Global shape, dtype, layout and split of the one tensor that ``node`` returns; empty before they are known."""
    for value in values(node):
        return {
            "shape": list(value.shape),
            "dtype": text.DTYPE_NAMES[value.dtype],
            "layout": str(value.layout),
            "requires_grad": value.requires_grad,
            "split": split_of(value.layout, mesh),
        }
    return {}


def split_of(layout: Layout, mesh: Mesh) -> dict[str, Any]:
    """Dim (as text) -> ``axes`` and ``pieces``, for the dims that are split."""
    groups = [(group for factor in dim for group in factor.axes) for dim in layout.dims]
    axes = [tuple(dict.fromkeys(axis for group in dim for axis in axes_of(group))) for dim in groups]
    return {
        str(dim): {"axes": list(names), "pieces": _pieces(layout.dims[dim], names, mesh)}
        for dim, names in enumerate(axes)
        if names
    }


@lru_cache(maxsize=1024)
def _pieces(factors: tuple[Factor, ...], axes: tuple[str, ...], mesh: Mesh) -> list[list[list[int]]]:
    layout = Layout((factors,))
    found = []
    for positions in itertools.product(*(range(mesh.size(axis)) for axis in axes)):
        owned = layout.indices(0, dict(zip(axes, positions)), mesh)
        assert owned is not None
        found.append([[first, first + length] for first, length in runs(owned)])
    return found
