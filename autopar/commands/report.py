"""``autopar report``: a program as a page to look at."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopar.commands.bundles import expanded
from autopar.commands.diff import ToMesh, ToPlan
from autopar.commands.memory_tables import MemoryChoices
from autopar.commands.options import Json, MeshText, ModelChoices, read_mesh
from autopar.commands.plan_options import PlanChoices, read_plan_texts
from autopar.commands.tables import print_json, stderr
from autopar.mesh import ALIASES, AXIS_ORDER, Mesh
from autopar.report.page import page_of

if TYPE_CHECKING:  # which imports torch
    from autopar.ir.program import AnyProgram

    Counted = tuple[AnyProgram, int]  # a program, and of its pipeline how many last microbatches have fewer rows

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="the page  [default: report.html, if there is no --json]"),
]
Compared = Annotated[
    list[str] | None,
    typer.Option(
        "--compare", metavar="AXES|KEY=VALUE|DIR", help="beside it: another mesh, plan or program; may be repeated"
    ),
]


@expanded
def report_command(
    model: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="what autopar compile wrote, or a model's name")],
    output: Output = None,
    mesh: MeshText = "dp=2,tp=2",
    compare: Compared = None,
    to_mesh: ToMesh = None,
    to_plan: ToPlan = None,
    *,
    plan: PlanChoices,
    choices: ModelChoices,
    memory: MemoryChoices,
    as_json: Json = False,
) -> None:
    """Write a page that shows how MODEL is split: ranks, parameters, a block, memory, traffic, pipeline, program.

    The page is one file that loads nothing from the network. --compare puts a second program beside the first:
    another mesh (--compare dp=4), another plan (--compare zero=3), or what autopar compile wrote (--compare DIR);
    --to-mesh and --to-plan say the same as in autopar diff.
    """
    from autopar.ir.traffic import size_text
    from autopar.report.collect import document_of, report_of

    beside = [*(compare or []), *([to_mesh] if to_mesh else []), *(to_plan or [])]
    found = _programs(model, mesh, beside, plan, choices, shown=not as_json)
    with stderr().status(f"looking at the program of {model}"):
        reports = [
            report_of(model, program, memory.optimizer, small=small, device=memory.device) for program, small in found
        ]
        document = document_of(reports, [program for program, _ in found])
        page = page_of(document)
    if output is not None or not as_json:
        path = output or Path("report.html")
        _write(path, page)
        if not as_json:
            print(f"{path}  {size_text(path.stat().st_size)}: open it in a browser")
    if as_json:
        print_json(document.to_json())


def _programs(
    model: str, mesh: str, compare: list[str], plan: PlanChoices, choices: ModelChoices, *, shown: bool
) -> list[Counted]:
    """The program, and the one beside it, if there is one. Raises ValueError."""
    from autopar.ir.batch import data_ways
    from autopar.program_files.directory import MANIFEST
    from autopar.program_files.program_file import load

    stored = [text for text in compare if Path(text).is_dir()]
    if (Path(model) / MANIFEST).is_file():
        if len(compare) != len(stored) or len(stored) > 1:
            raise ValueError(
                f"{model} is a program, and has a mesh and a plan\nWay out: --compare DIR, another program"
            )
        return [(load(directory), 1) for directory in (model, *stored)]
    first = read_mesh(mesh)
    axes = [text for text in compare if _is_mesh(text)]
    second = read_mesh(",".join(axes)) if axes else first
    rest = [text for text in compare if text not in axes and text not in stored]
    ways = math.lcm(data_ways(first), data_ways(second))
    if stored and (axes or rest or len(stored) > 1):
        raise ValueError("--compare takes either one DIR, or a mesh and choices of a plan")
    changed = PlanChoices({**plan.given, **read_plan_texts(rest)})
    changed.plan()  # a mistake is told before any work
    one = _compiled(model, first, plan, choices, ways, shown=shown)
    if stored:
        return [one, (load(stored[0]), 1)]
    return [one, _compiled(model, second, changed, choices, ways)] if compare else [one]


def _is_mesh(text: str) -> bool:
    """Whether ``dp=4,tp=2`` says the sizes of axes, of which one may be misspelt."""
    names = [part.partition("=")[0].strip() for part in text.split(",")]
    return any(name in AXIS_ORDER or name in ALIASES for name in names)


def _compiled(
    model: str, mesh: Mesh, plan: PlanChoices, choices: ModelChoices, ways: int, *, shown: bool = False
) -> Counted:
    from autopar.compiler import compile_program
    from autopar.pipeline.microbatches import first_part, smaller

    example = choices.example(model, ways, shown=shown)
    with stderr().status(f"making the program of {model} on {mesh}"):
        program = compile_program(example.model, mesh, plan.plan(), (), first_part(example.batch, mesh, plan.plan()))
    return program, smaller(example.batch, mesh, program.plan)


def _write(path: Path, page: str) -> None:
    """The page at ``path``, whole or not at all. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(page, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
