"""``autopar train``: train an unmodified language model on real text over a mesh, beside the same on one device."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from autopar.calls import data_ways
from autopar.commands.byte_text import BYTES, ByteText, read_text
from autopar.commands.curves import sparkline
from autopar.commands.launch import is_rank, relaunch
from autopar.commands.options import (
    ConfigTexts,
    Json,
    ModelName,
    PlanTexts,
    Seed,
    read_config,
    read_mesh,
    read_plan,
)
from autopar.commands.tables import print_json, stderr, stdout, table, traffic_json, traffic_table
from autopar.commands.training import Run, Settings, is_first, train
from autopar.mesh import Mesh
from autopar.named_models import named_model, rows_for

TOLERANCE = 1e-4  # of the loss, at every step, in float32


def train_command(
    model: ModelName = "hf:llama",
    mesh: Annotated[str, typer.Option("--mesh", metavar="AXES", help="e.g. dp=2,tp=2; 1 for one device")] = "dp=2,tp=2",
    steps: Annotated[int, typer.Option(min=1)] = 20,
    rate: Annotated[float, typer.Option("--lr", help="learning rate of AdamW")] = 1e-3,
    batch: Annotated[int | None, typer.Option(min=1, help="rows of the global batch  [default: about 12]")] = None,
    length: Annotated[int, typer.Option(min=2, help="bytes in a row")] = 128,
    text: Annotated[Path | None, typer.Option(help="a file to train on; default: Python's own reference")] = None,
    compare: Annotated[bool, typer.Option(help="train the unmodified model too, and compare the losses")] = True,
    seed: Seed = 0,
    plan: PlanTexts = None,
    config: ConfigTexts = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if there is one for every rank")] = "auto",
    log: Annotated[Path | None, typer.Option(help="write one JSON line per step to this file")] = None,
    as_json: Json = False,
) -> None:
    """Train MODEL over a mesh on byte-level tokens of real text; by itself it starts one process per rank (torchrun).

    Rank 0 also trains the unmodified model, from the same weights on the same batches. Exit code 1 if the losses differ
    by more than 1e-4 at any step.
    """
    on, choices, overrides = read_mesh(mesh), read_plan(plan), read_config(config)
    stream = ByteText(read_text(text), batch or rows_for(data_ways(on)), length)
    where = _device(device, on)
    if on.world_size > 1 and not is_rank():
        relaunch(on.world_size, sys.argv[1:])
        return
    example = named_model(model, overrides, seed=seed)
    _refuse_other_than_bytes(model, example.model)
    settings = Settings(on, choices, steps, rate, where, compare, log)
    start = time.perf_counter()
    try:
        with _progress(shown=is_first() and not as_json) as progress:
            task = progress.add_task(f"{model} on {on}", total=steps)
            run = train(example.model, stream, settings, lambda _: progress.advance(task))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if is_first():
        document = _document(model, run, settings, stream, time.perf_counter() - start)
        print_json(document) if as_json else _print(example.model, run, settings, document)
        difference = run.difference
        if difference is not None and not difference <= TOLERANCE:
            raise typer.Exit(1)


def _device(name: str, mesh: Mesh) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= mesh.world_size else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: it is one of auto, cpu, cuda")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def _refuse_other_than_bytes(name: str, model: nn.Module) -> None:
    sizes = getattr(model, "config", None)
    vocabulary = getattr(sizes, "vocab_size", getattr(sizes, "vocab", None))
    if not isinstance(vocabulary, int):
        raise ValueError(f"train needs a language model that takes input_ids and labels; {name} has no vocabulary")
    if vocabulary < BYTES:
        key = "vocab_size" if hasattr(sizes, "vocab_size") else "vocab"
        raise ValueError(
            f"{name} has a vocabulary of {vocabulary}, and bytes need {BYTES}\nWay out: --config {key}=288"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{name} is too large to be trained from random weights here\nWay out: --config layers=2")


def _progress(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr()
    return Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True)


# ---------------------------------------------------------------- the report


def _document(model: str, run: Run, settings: Settings, text: ByteText, seconds: float) -> dict[str, Any]:
    tokens = text.batch * text.length
    reference = run.reference
    return {
        "model": model,
        "mesh": dict(settings.mesh.axes),
        "device": settings.device.type,
        "batch": text.batch,
        "length": text.length,
        "steps": settings.steps,
        "losses": run.parallel.losses,
        "reference_losses": reference.losses if reference else None,
        "largest_difference": run.difference,
        "tolerance": TOLERANCE,
        "tokens_per_second": round(tokens / run.parallel.step_seconds, 1),
        "reference_tokens_per_second": round(tokens / reference.step_seconds, 1) if reference else None,
        "first_step_seconds": round(run.parallel.seconds[0], 2),
        "seconds": round(seconds, 2),
        "traffic_per_step": traffic_json(run.traffic, run.counted),
    }


def _print(model: nn.Module, run: Run, settings: Settings, document: dict[str, Any]) -> None:
    console = stdout()
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{type(model).__name__}, {count:,} parameters, on {settings.mesh}: {settings.mesh.world_size} "
        f"{settings.device.type} processes, batches of {document['batch']} x {document['length']} bytes"
    )
    console.print(traffic_table("sent by one rank in a step", run.traffic, run.counted))
    curves = {"parallel": run.parallel} | ({"one device": run.reference} if run.reference else {})
    every = [loss for curve in curves.values() for loss in curve.losses]
    rows = [
        (
            name,
            sparkline(curve.losses, min(every), max(every)),
            f"{curve.losses[0]:.6f}",
            f"{curve.losses[-1]:.6f}",
            f"{document['batch'] * document['length'] / curve.step_seconds:,.0f}",
        )
        for name, curve in curves.items()
    ]
    console.print(table(f"loss of {settings.steps} steps", ("", "curve", "first", "last", "tokens/s"), rows))
    console.print(
        f"the first step took {document['first_step_seconds']} s (tracing and splitting), the whole run "
        f"{document['seconds']} s"
    )
    difference = run.difference
    if difference is not None:
        fine = difference <= TOLERANCE
        colour, word = ("green", "the same") if fine else ("bold red", "not the same")
        found = f"largest difference of the losses {difference:.1e} (tolerance {TOLERANCE:g})"
        console.print(f"[{colour}]{word}[/]: {found}")
