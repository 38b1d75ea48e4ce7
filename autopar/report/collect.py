"""Reads a finished program and says all that a page shows of it."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.analysis.compare import diff
from autopar.analysis.folded_text import folded
from autopar.analysis.footprint import held
from autopar.ir.program import AnyProgram
from autopar.memory.device import Device
from autopar.memory.table import memory_of
from autopar.report.blocks import blocks_of
from autopar.report.choices import axes_of_mesh, choices_of
from autopar.report.document import Document, Report
from autopar.report.held import fitted, memory_of_places
from autopar.report.modules import Tree
from autopar.report.reasons import reasons_of
from autopar.report.steps import pipeline_of, traffic_of


def report_of(
    model: str, program: AnyProgram, optimizer: str = "adamw", *, small: int = 1, device: Device | None = None
) -> Report:
    """What a page shows of a finished program.

    Args:
        model: its name, for people.
        optimizer: one of :data:`autopar.memory.optimizers.OPTIMIZERS`, whose states count as memory.
        small: of a pipeline whose last microbatches have fewer rows, how many these are.
        device: that the ranks have to fit; None: any.

    Raises ValueError for an unknown optimizer, InvariantError for a program that is not differentiated.
    """
    tree, parameters = Tree(program), held(program)
    memory = memory_of(program, optimizer, small=small, timeline=False)
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
        memory=memory_of_places(program, memory, small),
        optimizer=optimizer,
        device=None if device is None else fitted(memory.largest, program.mesh, program.plan, device),
        traffic=tuple(traffic_of(program)),
        pipeline=pipeline_of(program),
        passes=program.passes,
        text=folded(program),
    )


def document_of(reports: Sequence[Report], programs: Sequence[AnyProgram]) -> Document:
    """One report, or two with what differs between their programs."""
    return Document(tuple(reports), str(diff(*programs)) if len(reports) > 1 else "")
