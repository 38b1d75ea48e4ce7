"""``autopar diff``: what differs between two programs, or between a model on two meshes or with two plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopar.commands.bundles import expanded
from autopar.commands.options import Json, MeshText, ModelChoices, read_mesh
from autopar.commands.plan_options import PlanChoices, read_plan_texts
from autopar.commands.tables import print_json, stderr
from autopar.mesh import Mesh

if TYPE_CHECKING:  # which import torch
    from autopar.ir.program import AnyProgram

ToMesh = Annotated[str | None, typer.Option(metavar="AXES", help="the mesh of the second program  [default: --mesh]")]
ToPlan = Annotated[list[str] | None, typer.Option(metavar="FILE|KEY=VALUE", help="of the second program, after --plan")]


@expanded
def diff_command(
    before: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="what autopar compile wrote, or a model's name")],
    after: Annotated[str | None, typer.Argument(metavar="DIR", help="the other program, if both are on disk")] = None,
    mesh: MeshText = "dp=2,tp=2",
    to_mesh: ToMesh = None,
    to_plan: ToPlan = None,
    *,
    plan: PlanChoices,
    choices: ModelChoices,
    as_json: Json = False,
) -> None:
    """Print what differs: layouts, collectives, the bytes that a rank sends and holds; repeated blocks are one line.

    Of two programs on disk: autopar diff A B. Of a model: autopar diff MODEL --mesh dp=4 --to-mesh dp=2,tp=2, or
    with another plan, --to-plan zero=3. Nothing is launched.
    """
    from autopar.analysis.compare import diff
    from autopar.ir.batch import data_ways

    if after is not None:
        found = diff(_loaded(before), _loaded(after))
    else:
        if to_mesh is None and not to_plan:
            raise ValueError(
                "compared with what?\nWay out: a second DIR; or of a MODEL --to-mesh AXES, --to-plan KEY=VALUE."
            )
        other = PlanChoices({**plan.given, **read_plan_texts(to_plan)})
        first, second = read_mesh(mesh), read_mesh(to_mesh or mesh)
        ways = max(data_ways(first), data_ways(second))
        one = _compiled(before, first, plan, choices, ways, shown=not as_json)
        found = diff(one, _compiled(before, second, other, choices, ways))
    print_json(found.to_json()) if as_json else print(found)


def _loaded(directory: str) -> AnyProgram:
    from autopar.program_files.program_file import load

    if not Path(directory).is_dir():
        raise ValueError(f"there is no directory {directory}\nWay out: autopar compile MODEL -o {directory}")
    return load(directory)


def _compiled(
    model: str, mesh: Mesh, plan: PlanChoices, choices: ModelChoices, ways: int, *, shown: bool = False
) -> AnyProgram:
    from autopar.compiler import compile_program
    from autopar.pipeline.microbatches import first_part

    example = choices.example(model, ways, shown=shown)
    with stderr().status(f"making the program of {model} on {mesh}"):
        return compile_program(example.model, mesh, plan.plan(), (), first_part(example.batch, mesh, plan.plan()))
