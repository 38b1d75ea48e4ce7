"""What a notebook shows of a program: a piece of HTML that needs nothing else. All texts of it are escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from autopar.analysis.folded_text import folded
from autopar.analysis.footprint import held, sent
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.ir.traffic import size_text
from autopar.pipeline.links import links_of
from autopar.plan import Plan
from autopar.schedules.svg import svg
from autopar.schedules.timing import timeline

MOST_COMPUTES = 2000  # a picture of more is no picture
STYLE = "font-family: monospace; font-size: 12px"


def program_html(program: AnyProgram) -> str:
    """Mesh, plan, bytes held and sent by a rank, the schedule as a picture, and the folded text to be opened."""
    parts = [f"<b>{escape(str(program.mesh))}</b>", _plan(program), _held(program), _sent(program)]
    if isinstance(program, PipelinedProgram) and program.schedule is not None:
        schedule = program.schedule
        if sum(len(list(schedule.computes(rank))) for rank in range(len(schedule.ranks))) <= MOST_COMPUTES:
            parts.append(svg(timeline(schedule, links=links_of(program)), schedule.title))
    text = escape(folded(program))
    parts.append(f'<details><summary>the program</summary><pre style="{STYLE}">{text}</pre></details>')
    return f"<div>{''.join(parts)}</div>"


def module_html(model: str, mesh: str, program: AnyProgram | None) -> str:
    """Of a parallel module; ``program``: the latest, if there is one."""
    title = f"<b>ParallelModule</b> of {escape(model)}"
    if program is None:
        return f"<div>{title} on {escape(mesh)}; no program yet: it is made at the first call</div>"
    return f"<div>{title}{program_html(program)}</div>"


def _plan(program: AnyProgram) -> str:
    usual = Plan().to_json()
    chosen = {name: choice for name, choice in program.plan.to_json().items() if choice != usual[name]}
    return _table("plan", ("choice", "value"), [(name, str(choice)) for name, choice in chosen.items()])


def _held(program: AnyProgram) -> str:
    found = held(program)
    rows = [("whole model", size_text(found.whole)), ("one rank", size_text(found.rank))]
    rows += [(f"split over {axis}", size_text(size)) for axis, size in found.split.items()]
    return _table("parameters", ("", "bytes"), rows)


def _sent(program: AnyProgram) -> str:
    rows = [(one.phase, one.axis, one.name, str(one.operations), size_text(one.bytes)) for one in sent(program)]
    return _table("sent by rank 0 in a step", ("phase", "group", "collective", "times", "bytes"), rows)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(_row("td", row) for row in rows)
    if not body:
        return ""
    return f'<table style="{STYLE}"><caption>{escape(title)}</caption>{_row("th", columns)}{body}</table>'


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
