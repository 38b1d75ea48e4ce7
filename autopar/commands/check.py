"""``autopar check``: all ranks of the parallel program in this process, in float64, against the unmodified model."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar.commands.bundles import expanded
from autopar.commands.options import Json, ModelChoices, ModelName, read_mesh
from autopar.commands.plan_options import PlanChoices
from autopar.commands.tables import (
    held_json,
    held_table,
    print_json,
    stderr,
    stdout,
    table,
    traffic_json,
    traffic_table,
)
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.precision import Precision

if TYPE_CHECKING:  # which import torch
    from autopar.check import Reference, Report

WORST_SHOWN = 3
PHASES = ("forward", "backward")


@expanded
def check_command(
    model: ModelName,
    mesh: Annotated[
        list[str] | None, typer.Option("--mesh", metavar="AXES", help="e.g. dp=2,tp=2; may be given several times")
    ] = None,
    *,
    plan: PlanChoices,
    choices: ModelChoices,
    as_json: Json = False,
) -> None:
    """Compare the parallel MODEL with the unmodified one: loss, outputs and every gradient, in float64.

    All ranks run in this process, one after the other. Exit code 1 if any error is above 1e-10.
    """
    from autopar.check import TOLERANCE, Reference
    from autopar.ir.batch import data_ways

    meshes = [read_mesh(text) for text in mesh or ["dp=2,tp=2"]]
    asked = plan.plan()
    ways = math.lcm(*map(data_ways, meshes))
    example = choices.example(model, ways, shown=not as_json)
    if not example.has_weights:
        raise ValueError(f"{model} is too large to be run here\nWay out: a smaller one, e.g. --config layers=2")
    with stderr().status(f"tracing {model}"):
        reference = Reference(example.model, example.batch)
    found = [_checked(reference, model, on, asked) for on in meshes]
    if as_json:
        print_json({"model": model, "tolerance": TOLERANCE, "meshes": [_document(*entry) for entry in found]})
    elif len(found) == 1:
        _print_one(model, *found[0])
    else:
        _print_several(model, found)
    if asked.precision != Precision() and not as_json:
        print("--precision is not checked: these numbers are float64, which shows whether the program is right")
    if not all(report.passed for report, _ in found):
        raise typer.Exit(1)


def _checked(reference: Reference, name: str, mesh: Mesh, plan: Plan) -> tuple[Report, float]:
    """The report, and the seconds it took without tracing."""
    start = time.perf_counter()
    with stderr().status(f"checking {name} on {mesh}"):
        report = reference.check(mesh, plan)
    return report, time.perf_counter() - start


def _worst(report: Report) -> list[tuple[str, float]]:
    """Gradients by falling error."""
    return sorted(report.grads.items(), key=lambda entry: -entry[1] if entry[1] == entry[1] else -float("inf"))


def _verdict(error: float) -> str:
    from autopar.check import TOLERANCE

    return f"[green]{error:.1e}[/green]" if error <= TOLERANCE else f"[bold red]{error:.1e}[/bold red]"


def _print_one(model: str, report: Report, seconds: float) -> None:
    from autopar.analysis.footprint import held
    from autopar.check import TOLERANCE

    worst = _worst(report)
    rows = [("loss", _verdict(report.loss))] if report.loss is not None else []
    rows += [(f"output {path}", _verdict(error)) for path, error in report.outputs.items()]
    rows += [(f"gradient of {name}", _verdict(error)) for name, error in worst[:WORST_SHOWN]]
    written = report.buffers.values()
    rows += [(f"{len(written)} written buffers, at most", _verdict(max(written)))] if written else []
    rest = worst[WORST_SHOWN:]
    rows += [(f"{len(rest)} more gradients, at most", _verdict(rest[0][1]))] if rest else []
    console = stdout()
    console.print(table(f"{model} on {report.program.mesh} against the unmodified model", ("", "error"), rows))
    console.print(held_table(held(report.program)))
    console.print(traffic_table("the most that any rank sends in a step (float64)", report.step.traffic))
    verdict = "[green]the same[/green]" if report.passed else "[bold red]not the same[/bold red]"
    console.print(f"{verdict} (tolerance {TOLERANCE:g}), {seconds:.1f} s")


def _print_several(model: str, found: list[tuple[Report, float]]) -> None:
    from autopar.check import TOLERANCE
    from autopar.ir.traffic import size_text

    rows = []
    for report, seconds in found:
        operations = {phase: sum(t.operations for t in report.step.traffic if t.phase == phase) for phase in PHASES}
        rows.append(
            (
                str(report.program.mesh),
                _verdict(report.loss) if report.loss is not None else "none",
                _verdict(max(report.outputs.values(), default=0.0)),
                _verdict(max(report.grads.values(), default=0.0)),
                " + ".join(str(operations[phase]) for phase in PHASES),
                size_text(sum(entry.bytes for entry in report.step.traffic)),
                f"{seconds:.1f}",
            )
        )
    columns = ("mesh", "loss", "outputs", "gradients", "collectives", "sent", "seconds")
    console = stdout()
    console.print(table(f"{model} against the unmodified model, float64", columns, rows))
    failed = sum(not report.passed for report, _ in found)
    verdict = f"[bold red]{failed} of {len(found)} meshes differ[/bold red]" if failed else "[green]the same[/green]"
    console.print(f"{verdict} (tolerance {TOLERANCE:g}); collectives: forward + backward, of any rank")


def _document(report: Report, seconds: float) -> dict[str, Any]:
    from autopar.analysis.footprint import held

    return {
        "mesh": dict(report.program.mesh.axes),
        "passed": report.passed,
        "loss_error": report.loss,
        "output_errors": dict(report.outputs),
        "gradient_errors": dict(report.grads),
        "parameters": held_json(held(report.program)),
        "traffic": traffic_json(report.step.traffic),
        "seconds": round(seconds, 2),
    }
