"""The final report of ``autopar train``: one JSON document, or tables and curves."""

from __future__ import annotations

from typing import Any

from torch import nn

from autopar.commands.curves import sparkline
from autopar.commands.expert_loads import loads_json, loads_tables
from autopar.commands.tables import stdout, table, traffic_json, traffic_table
from autopar.data.batch_source import Source
from autopar.data.token_stream import TokenStream
from autopar.training.loop import Curve, Run, Settings

TOLERANCES = {None: 1e-4, "float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # of the loss, any step


def tolerance_of(settings: Settings) -> float:
    """The allowed difference of the losses: the parallel model computes in the plan's dtypes, the other in its own."""
    precision = settings.plan.precision
    return max(TOLERANCES[dtype] for dtype in (precision.param, precision.reduce, precision.output, settings.dtype))


def document_of(model: str, run: Run, settings: Settings, source: Source, seconds: float) -> dict[str, Any]:
    reference, plan = run.reference, settings.plan
    rows, tokens = (None if count is None else count / max(1, len(run.parallel.losses)) for count in run.counts)
    text = source if isinstance(source, TokenStream) else None
    return {
        "model": model,
        "mesh": dict(settings.mesh.axes),
        "zero": plan.zero,
        "precision": plan.precision.param,
        "recompute": plan.recompute,
        "microbatches": plan.microbatches,
        "schedule": plan.schedule if settings.mesh.is_pipelined else None,
        "device": settings.device.type,
        "batch": text.batch if text is not None else _plain((rows or 0) / settings.accumulate),
        "length": text.length if text is not None else None,
        "unit": text.tokens.unit if text is not None else "rows" if tokens is None else "tokens",
        "accumulate": settings.accumulate,
        "steps": settings.steps,
        "first_step": run.start.step,
        "stopped": run.stopped,
        "checkpoint": str(run.saved) if run.saved else None,
        "losses": run.parallel.losses,
        "grad_norms": run.parallel.norms,
        "reference_losses": reference.losses if reference else None,
        "largest_difference": run.difference,
        "tolerance": tolerance_of(settings),
        "evaluation_losses": {str(step): loss for step, loss in run.evaluations.items()} or None,
        **_rates(rows, tokens, run),
        "first_step_seconds": round(run.parallel.seconds[0], 2) if run.parallel.seconds else None,
        "seconds": round(seconds, 2),
        "traffic_per_step": traffic_json(run.traffic, run.counted),
        **loads_json(run.loads),
    }


def _rates(rows: float | None, tokens: float | None, run: Run) -> dict[str, float | None]:
    """Tokens in a second, or rows where nothing says what a token is, of both models."""
    count, unit = (rows, "rows") if tokens is None else (tokens, "tokens")
    curves = {"": run.parallel, "reference_": run.reference}
    return {f"{whose}{unit}_per_second": _rate(count or 0, curve) for whose, curve in curves.items()}


def _rate(count: float, curve: Curve | None) -> float | None:
    return round(count / curve.step_seconds, 1) if curve is not None and curve.step_seconds else None


def _plain(number: float) -> float | int:
    """A whole number as one: batches may have unequally many rows."""
    return int(number) if number == int(number) else round(number, 1)


def end_of(run: Run, settings: Settings) -> str:
    """One line on how a run ended."""
    saved = f"saved {run.saved}" if run.saved else "nothing is saved, without --checkpoint"
    how = f"stopped by SIGTERM after {run.done} of {settings.steps} steps" if run.stopped else f"{run.done} steps done"
    return f"{how}; {saved}"


def print_report(model: nn.Module, run: Run, settings: Settings, document: dict[str, Any]) -> None:
    console = stdout()
    if not run.parallel.losses:
        text = f"nothing to do: {run.start.path} has {run.start.step} steps already, of {settings.steps}"
        console.print(text, soft_wrap=True, markup=False)
        return
    batches = f"{settings.accumulate} x " if settings.accumulate > 1 else ""
    length = f" x {document['length']}" if document["length"] is not None else ""
    batches += f"{document['batch']}{length} {document['unit'] if length else 'rows'}"
    console.print(
        f"{type(model).__name__}, {document['parameters']:,} parameters, on {settings.mesh}: "
        f"{settings.mesh.world_size} {settings.device.type} processes, batches of {batches}"
    )
    console.print(traffic_table("sent by rank 0 in a step", run.traffic, run.counted))
    for loads in loads_tables(run.loads):
        console.print(loads)
    title = f"loss of {len(run.parallel.losses)} steps" + (f" from {run.start.step}" if run.start.step else "")
    unit = "rows" if "rows_per_second" in document else "tokens"
    console.print(table(title, ("", "curve", "first", "last", f"{unit}/s"), _curves(run, document, unit)))
    if run.evaluations:
        found = [(f"after step {step}", f"{loss:.6f}") for step, loss in run.evaluations.items()]
        console.print(table("loss of --eval-data", ("", "loss"), found))
    resumed = settings.saving is not None and settings.saving.resume
    traced = "" if resumed else " (compiled before)" if settings.program else " (tracing and splitting)"
    console.print(
        f"the first step took {document['first_step_seconds']} s{traced}, the whole run {document['seconds']} s"
    )
    if settings.saving is not None and not run.stopped:
        console.print(end_of(run, settings), soft_wrap=True, markup=False)
    _print_difference(run, settings)


def _curves(run: Run, document: dict[str, Any], unit: str) -> list[tuple[str, ...]]:
    curves = {"parallel": (run.parallel, document[f"{unit}_per_second"])}
    if run.reference:
        curves["one device"] = (run.reference, document[f"reference_{unit}_per_second"])
    every = [loss for curve, _ in curves.values() for loss in curve.losses]
    return [
        (
            name,
            sparkline(curve.losses, min(every), max(every)),
            f"{curve.losses[0]:.6f}",
            f"{curve.losses[-1]:.6f}",
            f"{rate:,.0f}",
        )
        for name, (curve, rate) in curves.items()
    ]


def _print_difference(run: Run, settings: Settings) -> None:
    console, difference = stdout(), run.difference
    if difference is None:
        if settings.compare:
            console.print("not compared with one device, since the run goes on from a checkpoint")
        return
    tolerance = tolerance_of(settings)
    fine = difference <= tolerance
    colour, word = ("green", "the same") if fine else ("bold red", "not the same")
    lower, both = settings.plan.precision.param, settings.dtype
    reason = f": the parallel one computes in {lower}" if lower else f": both compute in {both}" if both else ""
    reason *= tolerance > TOLERANCES[None]
    console.print(
        f"[{colour}]{word}[/]: largest difference of the losses {difference:.1e} (tolerance {tolerance:g}{reason})",
        soft_wrap=True,
    )
