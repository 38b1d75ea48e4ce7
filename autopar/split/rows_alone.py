"""Outputs without the copies that stand behind a padded batch (:mod:`autopar.split.padded_batch`), in parts.

Leaving out copies takes all rows, since it is a selection among them. But the ranks' parts of the padded batch are
those of an uneven split of its rows, with padding behind them: a layout says that, and nothing has to be gathered.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.batch import REAL_ROWS, common_rows, data_axes
from autopar.ir.builder import Builder
from autopar.ir.layout import Factor
from autopar.ir.node import output_node, value
from autopar.ir.program import Program
from autopar.ir.rewrite import drop_unused_constants, remove_unused
from autopar.ir.tables import InputKind, OutputKind

aten = torch.ops.aten


def outputs_in_parts(program: Program) -> Program:
    """``program``, split over all data axes, with outputs in parts that were gathered only to leave out copies."""
    if program.gathers_outputs:
        return program
    constants = program.placeholders(InputKind.CONSTANT)
    indices = {node for node, entry in constants if entry.target.startswith(REAL_ROWS)}
    last = output_node(program.graph)
    results = list(program.returned)
    for position, (entry, node) in enumerate(zip(program.outputs, program.returned)):
        if entry.kind is OutputKind.USER and node.target is aten.index_select.default and node.args[2] in indices:
            results[position] = _in_parts(program, node, last) or node
    last.args = (tuple(results),)
    remove_unused(program.graph)
    return drop_unused_constants(program)


def _in_parts(program: Program, selection: fx.Node, last: fx.Node) -> fx.Node | None:
    """The ranks' parts of what is selected; None where the ranks do not have parts of it."""
    source, dim, _ = selection.args
    assert isinstance(source, fx.Node) and isinstance(dim, int)
    while source.target in comm.GATHERS and comm.split_of(tuple(comm.arguments_of(source).values())[1:]).dim == dim:
        source = source.all_input_nodes[0]
    kind, rows = value(source), common_rows(program)
    factors = kind.layout.dims[dim]
    if len(factors) > 1 or factors[0].axes != data_axes(program.mesh) or value(selection).shape[dim] != rows:
        return None
    dims = (*kind.layout.dims[:dim], (Factor(rows, factors[0].axes),), *kind.layout.dims[dim + 1 :])
    same = list(kind.layout.local_shape(program.mesh))
    return Builder(before=last)(
        aten.reshape.default, source, same, like=replace(kind, layout=replace(kind.layout, dims=dims))
    )
