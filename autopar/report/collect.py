"""Reads a finished program and says all that a page shows of it."""

from __future__ import annotations

from autopar.analysis.compare import diff
from autopar.analysis.folded_text import folded
from autopar.analysis.footprint import held
from autopar.ir.program import AnyProgram
from autopar.report.blocks import blocks_of
from autopar.report.choices import axes_of_mesh, choices_of
from autopar.report.document import Document, Report
from autopar.report.held import memory_of_places
from autopar.report.modules import Tree
from autopar.report.reasons import reasons_of
from autopar.report.steps import pipeline_of, traffic_of


def report_of(model: str, program: AnyProgram, optimizer: str = "adamw") -> Report:
    """``model``: its name, for people. Raises ValueError for an unknown optimizer."""
    tree, parameters = Tree(program), held(program)
    return Report(
        model=model,
        mesh=str(program.mesh),
        ranks=program.mesh.world_size,
        axes=axes_of_mesh(program.mesh),
        choices=tuple(choices_of(program.plan)),
        reasons=tuple(reasons_of(program)),
        parameter_bytes=parameters.whole,
        rank_parameter_bytes=parameters.rank,
        modules=tree.root,
        drawings=tree.drawings,
        blocks=blocks_of(program),
        memory=memory_of_places(program, optimizer),
        optimizer=optimizer,
        traffic=tuple(traffic_of(program)),
        pipeline=pipeline_of(program),
        passes=program.passes,
        text=folded(program),
    )


def document_of(model: str, program: AnyProgram, other: AnyProgram | None = None, optimizer: str = "adamw") -> Document:
    """The report of a program, or of two with what differs between them."""
    one = report_of(model, program, optimizer)
    if other is None:
        return Document((one,))
    return Document((one, report_of(model, other, optimizer)), str(diff(program, other)))
