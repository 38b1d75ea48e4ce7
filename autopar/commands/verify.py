"""``autopar verify``: a proof, before anything runs on devices, that the programs of all ranks compute MODEL's step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopar.commands.bundles import expanded
from autopar.commands.options import Json, ModelChoices, ModelName, read_mesh
from autopar.commands.plan_options import PlanChoices
from autopar.commands.tables import print_json, stderr

if TYPE_CHECKING:  # which import torch
    from autopar.ir.program import AnyProgram

NAMES = ("structure", "relations", "field", "float64")

ProgramFolder = Annotated[
    Path | None,
    typer.Option("--program", metavar="DIR", help="a program that autopar compile has written, in place of a new one"),
]


@expanded
def verify_command(
    model: ModelName,
    mesh: Annotated[
        list[str] | None, typer.Option("--mesh", metavar="AXES", help="e.g. dp=2,tp=2; may be given several times")
    ] = None,
    program: ProgramFolder = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="NAME", help=f"{', '.join(NAMES)}; may be given several times; default: all"),
    ] = None,
    reduced: Annotated[
        bool | None,
        typer.Option(
            "--reduced/--whole",
            help="execute the same model with smaller sizes; default: where MODEL is too large to be executed here",
        ),
    ] = None,
    *,
    plan: PlanChoices,
    choices: ModelChoices,
    as_json: Json = False,
) -> None:
    """Prove that all ranks compute MODEL's loss and gradients and cannot hang: nothing runs on a device.

    Exit code 0 where all of it is proved, 1 where something is refused, or could not be proved.
    """
    from autopar.ir.batch import data_ways
    from autopar.proof.verify import verify

    given = _stored(program)
    meshes = [given.mesh] if given is not None else [read_mesh(text) for text in mesh or ["dp=2,tp=2"]]
    if given is not None and mesh:
        raise ValueError(f"--program has its own mesh, {given.mesh}\nWay out: leave out --mesh.")
    if given is not None and plan.plan(given.plan) != given.plan:
        raise ValueError("--program has its own plan, which is another one\nWay out: leave out the choices of a plan.")
    if given is not None and reduced:
        raise ValueError("--program is proved at its own sizes\nWay out: leave out --reduced.")
    example = choices.example(model, math.lcm(*map(data_ways, meshes)), shown=not as_json)
    found = []
    for on in meshes:
        asked = plan.plan(given.plan if given is not None else None)
        with stderr().status(f"proving {model} on {on}"):
            found.append(
                verify(
                    example.model, on, asked,
                    example_inputs=example.batch, program=given, layers=layer or NAMES, reduced=reduced,
                )
            )  # fmt: skip
    if as_json:
        print_json({"model": model, "proofs": [one.document() for one in found]})
    else:
        print("\n\n".join(map(str, found)))
    if not all(one.proved for one in found):
        raise typer.Exit(1)


def _stored(folder: Path | None) -> AnyProgram | None:
    if folder is None:
        return None
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise ValueError(f"--program {folder}: it is {kind}\nWay out: the folder of autopar compile MODEL -o DIR.")
    from autopar.ir.program import Program

    return Program.load(folder)
