"""``autopar fit``: the meshes and plans on which a model fits a number of devices, and why it does not on others."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from autopar.commands.bundles import expanded
from autopar.commands.memory_tables import MemoryChoices
from autopar.commands.options import Json, ModelChoices, ModelName
from autopar.commands.plan_options import PlanChoices
from autopar.commands.tables import print_json, stderr, stdout, table
from autopar.fitting.estimate import BETWEEN_NODES, Estimate
from autopar.fitting.fit import Refused, Wanted, compiled, fits, in_words
from autopar.fitting.prices import ROWS, Prices, rows_of
from autopar.ir.traffic import size_text
from autopar.memory.device import Device, read_size

VARIED = ("zero", "recompute", "sequence")
ABOUT = (
    "sorted by the estimated time of a step: a roofline of the operators of a block, the pipeline's bubble, and bytes "
    f"over links ({BETWEEN_NODES / 1e9:.0f} GB/s where an axis leaves its node), none of it hidden; only ratios matter"
)


@expanded
def fit_command(
    model: ModelName,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="how many devices there are")],
    per_node: Annotated[int, typer.Option("--per-node", min=1, help="how many of them have fast links")] = 8,
    shown: Annotated[int, typer.Option("--shown", min=1, help="meshes whose programs are compiled and shown")] = 8,
    *,
    plan: PlanChoices,
    choices: ModelChoices,
    memory: MemoryChoices,
    as_json: Json = False,
) -> None:
    """List the meshes and plans on which MODEL fits: memory, bytes sent by axis, bubble; and why others do not fit.

    --batch is that of a step on all devices, --length the tokens of a row. Candidates are priced by blocks, in closed
    forms; those that are shown are compiled. zero, recompute and sequence are varied unless you choose them.
    """
    start = time.perf_counter()
    device = memory.device or Device(read_size("80GB"))
    example = replace(choices, batch=ROWS).example(model)
    prices = Prices(example.model, lambda rows: rows_of(example.batch, rows), plan.plan())
    fixed = frozenset(name for name in VARIED if name in plan.given)
    wanted = Wanted(gpus, per_node, choices.batch or gpus, memory.optimizer, device, plan.plan(), fixed)
    with stderr().status(f"pricing the blocks of {model}"):
        found, refused = fits(prices, wanted)
    priced = time.perf_counter() - start
    checked: list[Estimate] = []
    for number, one in enumerate(found[:shown]):
        with stderr().status(f"compiling {one.mesh} ({number + 1} of {min(shown, len(found))})"):
            real = compiled(one, prices, wanted)
        if isinstance(real, Refused):
            refused.append(real)
        else:
            checked.append(real)
    listed = sorted([*checked, *(one.best for one in found[shown:])], key=lambda one: one.seconds)
    seconds = {"priced": priced, "all": time.perf_counter() - start}
    if as_json:
        print_json(_document(model, wanted, listed, refused, seconds))
        return
    _print(model, wanted, listed, refused, seconds)


def _print(
    model: str, wanted: Wanted, found: Sequence[Estimate], refused: Sequence[Refused], seconds: Mapping[str, float]
) -> None:
    console = stdout(150)
    columns = ("mesh", "plan", "memory", "free", "sent in a step", "bubble", "time")
    fastest = found[0].seconds if found else 1.0
    rows = [
        (
            _axes(one),
            in_words(one),
            size_text(one.memory) + ("" if one.compiled else " ?"),
            size_text(-wanted.device.over(one.memory)),
            ", ".join(f"{axis} {size_text(size)}" for axis, size in one.sent.items()) or "0",
            f"{one.bubble:.1%}",
            f"{one.seconds / fastest:.2f}",
        )
        for one in found
    ]
    title = f"{model} on {wanted.devices} devices of {size_text(wanted.device.bytes)}, {wanted.rows} rows a step, "
    console.print(table(f"{title}{wanted.optimizer}", columns, rows))
    console.print("memory: of tensors on the largest rank; ? is estimated, the others are compiled", soft_wrap=True)
    console.print(ABOUT, soft_wrap=True)
    console.print()
    console.print(table("these do not", ("mesh", "why"), [(_axes(one), one.why) for one in refused]))
    print(f"priced in {seconds['priced']:.0f} s, compiled in {seconds['all']:.0f} s", file=sys.stderr)


def _axes(one: Estimate | Refused) -> str:
    return ",".join(f"{axis}={size}" for axis, size in one.mesh.axes)


def _document(
    model: str, wanted: Wanted, found: Sequence[Estimate], refused: Sequence[Refused], seconds: Mapping[str, float]
) -> dict[str, Any]:
    fitting = [
        {
            "mesh": dict(one.mesh.axes),
            "plan": {name: getattr(one.plan, name) for name in (*VARIED, "microbatches", "schedule")},
            "rows": one.rows,
            "memory_bytes": one.memory,
            "free_bytes": -wanted.device.over(one.memory),
            "compiled": one.compiled,
            "sent_bytes": dict(one.sent),
            "bubble": one.bubble,
            "seconds": one.seconds,
        }
        for one in found
    ]
    return {
        "model": model,
        "devices": wanted.devices,
        "device_bytes": wanted.device.bytes,
        "optimizer": wanted.optimizer,
        "batch": wanted.rows,
        "fits": fitting,
        "refused": [{"mesh": dict(one.mesh.axes), "why": one.why} for one in refused],
        "took_seconds": dict(seconds),
    }
