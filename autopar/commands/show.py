"""``autopar show``: the program of a model as text, or what one rank runs, with what a rank holds and sends."""

from __future__ import annotations

import textwrap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from autopar.commands.bundles import expanded
from autopar.commands.memory_tables import MemoryChoices
from autopar.commands.options import Json, MeshText, ModelChoices, OptionalModelName, read_mesh
from autopar.commands.plan_options import PlanChoices
from autopar.commands.stored import Shown, is_stored
from autopar.commands.tables import (
    WIDTH_OF_A_PIPE,
    held_json,
    held_table,
    print_json,
    stderr,
    stdout,
    traffic_json,
    traffic_table,
)
from autopar.mesh import Mesh
from autopar.plan import Plan

if TYPE_CHECKING:  # which import torch
    from autopar.ir.graph_pass import Phase
    from autopar.ir.program import AnyProgram
    from autopar.zoo.named import Example

Recorded = Annotated[
    Path | None, typer.Option(metavar="LOG", help="the loads of experts that this log of autopar train recorded")
]
Explained = Annotated[
    str | None, typer.Option(metavar="NAME", help="why this node or parameter lies as it does, and what else costs")
]
Picture = Annotated[
    Path | None,
    typer.Option("--timeline-svg", "--schedule-svg", metavar="FILE", help="write that picture to this file"),
]


@expanded
def show(
    model: OptionalModelName = None,
    mesh: MeshText = "dp=2,tp=2",
    passes: Annotated[bool, typer.Option("--passes", help="print the phases and passes of the compiler")] = False,
    after: Annotated[str | None, typer.Option(help="a pass, or trace; default: the last before differentiate")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="print what this rank runs, as Python")] = None,
    inference: Annotated[bool, typer.Option("--inference", help="with --rank: without a backward pass")] = False,
    full: Annotated[bool, typer.Option("--full", help="every line: repeated blocks are not folded")] = False,
    origins: Annotated[bool, typer.Option("--origins", help="end lines with the module and source line")] = False,
    explain: Explained = None,
    module: Annotated[str | None, typer.Option(metavar="PATH", help="lines of this module: model.layers.40")] = None,
    grep: Annotated[str | None, typer.Option(metavar="REGEX", help="lines that match, with their source line")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="only tables: parameters, collectives, stages")] = False,
    timeline: Annotated[bool, typer.Option("--timeline", help="draw what pipeline ranks do when")] = False,
    picture: Picture = None,
    expert_load: Recorded = None,
    *,
    plan: PlanChoices,
    choices: ModelChoices,
    memory: MemoryChoices,
    as_json: Json = False,
) -> None:
    """Print the program of MODEL on a mesh: the text form, or with --rank what that rank runs.

    Or of DIR, which autopar compile wrote: of a family of programs with expressions for sizes, and for which it is.
    Repeated blocks are printed once, with what differs; --full prints every line, as --json does. It needs no weights.
    """
    from autopar.commands.expert_loads import read_loads
    from autopar.commands.pipeline_tables import pipeline_of
    from autopar.ir.batch import data_ways

    if passes:
        _print_compiler(as_json)
        return
    chosen = partial(_chosen, full or as_json, origins, module, grep, rank, inference)
    if model is not None and is_stored(model):
        _refuse_after(after or explain, timeline or picture is not None)
        Shown.of(model).print(model, None if summary else chosen, rank or 0, as_json)
        return
    on, loads = read_mesh(mesh), read_loads(expert_load) if expert_load is not None else {}
    model = _given(model)
    _refuse(on, after, rank, timeline or picture is not None)
    example = choices.example(model, data_ways(on), shown=not as_json)
    with stderr().status(f"making the program of {model} on {on}"):
        split, whole = _programs(example, on, plan.plan(), after)
    rows = example.batch if after is None else None
    text = split.explain(explain) if explain and module is grep is None else chosen(split, whole)
    pipeline = pipeline_of(whole)
    pipeline.write(picture) if picture is not None and pipeline is not None else None
    if as_json:
        more = {**_experts_of(split, loads), **(pipeline.to_json() if pipeline else {})}
        print_json(_document(model, whole, text, rank) | more | memory.document(whole, rows))
        return
    print(text) if not summary else None
    if not (explain is module is grep is None):
        return
    stdout().print(end="" if summary else "\n")
    if pipeline is not None:
        pipeline.print(stdout(), timeline)
    _print_tables(split, loads, *_tables(whole, rank or 0), *memory.tables(whole, rows, rank or 0))


def _refuse_after(asked: str | None, schedule: bool) -> None:
    if asked or schedule:
        raise ValueError(
            "a directory has the finished program alone, without its decisions\n"
            "Way out: autopar show MODEL, for --after, --explain and --timeline."
        )


def _chosen(
    full: bool, origins: bool, module: str | None, grep: str | None, rank: int | None, inference: bool,
    split: AnyProgram, whole: AnyProgram,
) -> str:  # fmt: skip
    """What is printed of a program: lines of it, what a rank runs, or all of it as it was split."""
    from autopar.analysis.selected_text import selected

    if module is not None or grep is not None:
        return selected(whole, module, grep)
    return _text(split, full, origins) if rank is None else _code(whole, rank, inference)


def _given(model: str | None) -> str:
    if model is None:
        raise ValueError("of which MODEL?\nWay out: autopar show tiny:llama --mesh dp=2,tp=2, for example.")
    return model


def _experts_of(program: AnyProgram, loads: Any) -> dict[str, Any]:
    from autopar.commands.expert_loads import loads_json
    from autopar.commands.expert_tables import experts_json

    return {"experts": experts_json(program), **loads_json(loads)}


def _print_tables(program: AnyProgram, loads: Any, *tables: Group) -> None:
    from autopar.commands.expert_loads import loads_tables
    from autopar.commands.expert_tables import experts_tables

    stdout().print(*experts_tables(program), *loads_tables(loads), *tables, sep="\n")


def _text(program: AnyProgram, full: bool, origins: bool) -> str:
    from autopar.analysis.folded_text import folded
    from autopar.ir.program import format_program

    return (format_program if full else folded)(program, origins=origins)


def _programs(example: Example, mesh: Mesh, plan: Plan, after: str | None) -> tuple[AnyProgram, AnyProgram]:
    """The program before it has a backward pass, or as it is after the pass ``after``; and the finished one."""
    from autopar.compiler import finish_program, split_program
    from autopar.pipeline.microbatches import first_part

    split = split_program(example.model, mesh, plan, (), first_part(example.batch, mesh, plan), after=after)
    return split, split if after is not None else finish_program(split)


def _refuse(mesh: Mesh, after: str | None, rank: int | None, schedule: bool) -> None:
    """Refuse before the work what cannot be shown. Raises ValueError."""
    from autopar.ir.graph_pass import steps_of
    from autopar.passes import COMPILER

    if rank is not None:
        mesh.coordinates(rank)  # a rank off the mesh
    steps_of(COMPILER, until=after)  # an unknown pass
    if after is not None and rank is not None:
        raise ValueError(
            "--after goes not with --rank: a rank runs the finished program\nWay out: give either of them."
        )
    if schedule and not mesh.is_pipelined:
        raise ValueError(f"{mesh} has no pipeline to draw\nWay out: a mesh with an axis pp, e.g. --mesh pp=4,tp=2")
    if schedule and after is not None:
        raise ValueError("give either --after or a schedule: only the finished program has one")


def _print_compiler(as_json: bool) -> None:
    """The phases of the compiler in order, and what each pass does in a sentence."""
    from autopar.passes import COMPILER

    if as_json:
        phases = [
            {"phase": phase.name, "each_stage": phase.each_stage, "passes": _sentences(phase)} for phase in COMPILER
        ]
        print_json(phases)
        return
    for phase in COMPILER:
        print(phase.name + "  (on a pipeline, each stage by itself)" * phase.each_stage)
        for name, sentence in _sentences(phase).items():
            print(textwrap.fill(sentence, WIDTH_OF_A_PIPE, initial_indent=f"  {name:26}", subsequent_indent=" " * 28))


def _sentences(phase: Phase) -> dict[str, str]:
    return {step.name: step.summary for step in phase.passes}


def _code(whole: AnyProgram, rank: int, inference: bool) -> str:
    runs = whole.rank(rank)
    return runs.inference_code if inference else runs.code


def _tables(program: AnyProgram, rank: int) -> tuple[Group, Group]:
    from autopar.analysis.footprint import held, sent

    return held_table(held(program)), traffic_table(
        f"sent by rank {rank} of {program.mesh} in a step", sent(program, rank)
    )


def _document(model: str, program: AnyProgram, text: str, rank: int | None) -> dict[str, Any]:
    from autopar.analysis.footprint import held, sent

    return {
        "model": model,
        "mesh": dict(program.mesh.axes),
        "passes": list(program.passes),
        "rank": rank,
        "text": text,
        "parameters": held_json(held(program)),
        "traffic": traffic_json(sent(program, rank or 0)),
    }
