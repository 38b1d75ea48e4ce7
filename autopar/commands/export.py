"""``autopar export``: a program, or that of a model, in the formats of other tools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar.commands.bundles import expanded
from autopar.commands.known_names import DIALECTS, FORMATS, WEIGHTS
from autopar.commands.options import Json, MeshText, ModelChoices, read_mesh
from autopar.commands.plan_options import PlanChoices
from autopar.commands.stored import is_stored, load_either, mesh_of
from autopar.commands.tables import print_json, stderr

if TYPE_CHECKING:  # which import torch
    from autopar.families.family import Family
    from autopar.ir.program import AnyProgram


@expanded
def export_command(
    source: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="what autopar compile wrote, or a model's name")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="a new directory, or an export's")],
    format: Annotated[str, typer.Option(metavar="NAMES", help=f"one or several of {', '.join(FORMATS)}")] = "pt2",
    rank: Annotated[int | None, typer.Option(min=0, help="of this rank only")] = None,
    weights: Annotated[str | None, typer.Option(help=" | ".join(WEIGHTS))] = None,
    weights_from: Annotated[Path | None, typer.Option(help="safetensors file, or a folder of them")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="run all ranks as one, against the model")] = False,
    training: Annotated[bool, typer.Option("--training", help="a training step, where the format can hold it")] = False,
    opset: Annotated[int | None, typer.Option(help="version of ONNX's operators")] = None,
    ir: Annotated[int | None, typer.Option(help="version of ONNX's files")] = None,
    onnx_dialect: Annotated[str, typer.Option(help=f"of collectives: {' | '.join(DIALECTS)}")] = "autopar",
    mesh: MeshText = "dp=2,tp=2",
    *,
    plan: PlanChoices,
    choices: ModelChoices,
    as_json: Json = False,
) -> None:
    """Write a program for other tools: a file for each rank, and manifest.json, which says what they are.

    DIR is a program on disk, or a family of programs, whose files take batches of all its sizes; of a MODEL
    the program on --mesh is made, and its weights are written.
    """
    from autopar.compiler import compile_program
    from autopar.exporters.export import export
    from autopar.ir.batch import data_ways
    from autopar.ir.traffic import size_text
    from autopar.proof.verify import prove

    given: Any = weights_from
    if is_stored(source):
        program: AnyProgram | Family = load_either(source)
    else:
        on = read_mesh(mesh)
        if choices.loss == "auto" and not training:
            choices = replace(choices, loss="none")  # what is exported for inference returns what the model returns
        example = choices.example(source, data_ways(on), shown=not as_json)
        with stderr().status(f"making the program of {source} on {on}"):
            program = compile_program(example.model, on, plan.plan(), (), example.batch)
            if program.plan.verify:
                prove(example.model, program, (), example.batch)
        given = [weights_from, example.model] if weights_from else None if weights == "none" else example.model
    export(
        program, output, format, rank=rank, weights=weights, weights_from=given, verify=verify, training=training,
        opset=opset, ir=ir, onnx_dialect=onnx_dialect,
    )  # fmt: skip
    files = {path.relative_to(output).as_posix(): path.stat().st_size for path in output.rglob("*") if path.is_file()}
    if as_json:
        print_json({"directory": str(output), "mesh": dict(mesh_of(program).axes), "files": files})
        return
    for name, size in sorted(files.items()):
        print(f"{output / name}  {size_text(size)}")
