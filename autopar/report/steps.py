"""What ranks do in a step: the bytes that they send, by axis, and what the pipeline computes when."""

from __future__ import annotations

from collections.abc import Iterator

from autopar.analysis.footprint import sent
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.mesh import PIPELINE
from autopar.pipeline.links import links_of
from autopar.report.document import Pipeline, Sent, Span
from autopar.schedules.draw import WORDS
from autopar.schedules.timing import timeline

MOST_SPANS = 6000


def traffic_of(program: AnyProgram) -> Iterator[Sent]:
    """By pipeline rank, phase, axis and collective; ranks of one place send the same."""
    for place, rank in enumerate(program.mesh.group(0, PIPELINE) if program.mesh.is_pipelined else (0,)):
        for one in sent(program, rank):
            yield Sent(place, one.phase, one.axis, one.name, one.operations, one.bytes)


def pipeline_of(program: AnyProgram) -> Pipeline | None:
    """None for a program that is not pipelined, or not finished."""
    if not isinstance(program, PipelinedProgram) or program.schedule is None:
        return None
    schedule = program.schedule
    drawn = timeline(schedule, links=links_of(program))
    events = sorted((event for own in drawn.ranks for event in own), key=lambda event: event.start_s)
    spans = tuple(
        Span(one.rank, str(one.kind), one.stage, one.microbatch, one.start_s, one.end_s) for one in events[:MOST_SPANS]
    )
    words = {str(kind): WORDS[kind] for kind in dict.fromkeys(event.kind for event in events)}
    stages, left_out = len(schedule.placement), max(0, len(events) - MOST_SPANS)
    return Pipeline(schedule.name, stages, schedule.microbatches, drawn.bubble, words, spans, left_out)
