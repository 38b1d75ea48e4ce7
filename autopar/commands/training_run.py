"""A run of ``autopar train``: what was asked for becomes a plan, batches and settings, and ranks are started."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
from torch import nn

from autopar.commands.data_options import DataChoices
from autopar.commands.launch import is_rank, is_restart, relaunch
from autopar.commands.loop_options import LoopChoices
from autopar.commands.options import ModelChoices, read_mesh
from autopar.commands.orphans import end_with_launcher
from autopar.commands.plan_options import PlanChoices
from autopar.commands.step_traces import fresh_profiles, joined_traces
from autopar.commands.tables import print_json, stderr
from autopar.commands.this_machine import device_of_rank, refuse_ranks
from autopar.commands.train_report import document_of, end_of, print_report, tolerance_of
from autopar.commands.training_data import Wanted, evaluation_of, model_for, refuse_data, refuse_early, source_of
from autopar.commands.watch_options import WatchChoices
from autopar.commands.watching import Shown, watched
from autopar.data.batch_source import Source
from autopar.data.loader_stream import LoaderStream
from autopar.ir.batch import data_ways
from autopar.ir.program import AnyProgram
from autopar.mesh import SEQUENCE, Mesh
from autopar.notes import warn
from autopar.plan import Plan
from autopar.program_files.program_file import load
from autopar.training.loop import Run, Settings, train
from autopar.training.ranks import is_first
from autopar.training.saving import Saving
from autopar.zoo.named import Example, rows_for

LENGTH = 128
SHAPE = re.compile(r"i64\[(\d+), (\d+)\]")  # of tokens, as a program knows its inputs


@dataclass(frozen=True)
class Asked:
    """What was given on the command line. ``usual_mesh``: where neither ``mesh`` nor a program says another."""

    model: str
    mesh: str | None
    usual_mesh: str
    loop: LoopChoices
    plan: PlanChoices
    choices: ModelChoices
    data: DataChoices
    watch: WatchChoices
    as_json: bool


def run_training(asked: Asked) -> None:
    """Train, on the ranks; a process that is none starts them. Raises ValueError, and typer.Exit with a code but 0."""
    loop, data = asked.loop, asked.data
    stored = load(loop.program) if loop.program is not None else None
    on = read_mesh(asked.mesh or asked.usual_mesh) if asked.mesh or stored is None else stored.mesh
    rows, length = _sizes(stored, asked.choices.batch, asked.choices.length, on)
    if data.loader is None:
        _refuse_uneven_parts(length, on)
    plan = asked.plan.plan(stored.plan) if stored is not None else _plan(asked, on, rows)
    where, saving = device_of_rank(loop.device, on.world_size), _saving(loop)
    refuse_data(data)
    wanted = Wanted(data, on, plan, rows, length, asked.choices)
    about = {"model": asked.model, "mesh": str(on), "batch": rows, "length": length, "lr": loop.rate, **plan.to_json()}
    shown = Shown(f"{asked.model} on {on}", asked.watch, asked.as_json, about)
    if on.world_size > 1 and not is_rank():
        refuse_ranks(on.world_size, where)
        refuse_early(asked.model, wanted, random=loop.random)
        shown.say_launch(on.world_size)
        with joined_traces(loop.trace), fresh_profiles(asked.watch.profile):
            relaunch(on.world_size, sys.argv[1:], loop.max_restarts, stops=True)
        return
    if is_rank():
        end_with_launcher()
    source = source_of(wanted)
    evaluation = evaluation_of(wanted)
    shows = is_first() and not asked.as_json
    example = model_for(asked.model, asked.choices, source, evaluation, random=loop.random, shown=shows)
    compare = loop.compare and not _has_parts(source, plan, on) and not _is_large(example)  # which say so
    settings = Settings(
        on, plan, loop.steps, loop.rate, where, compare, loop.accumulate, loop.clip, saving, loop.log, loop.program,
        loop.trace, asked.watch.peak, asked.watch.profile, evaluation, example.files, _half(example.model),
    )  # fmt: skip
    whole = sum(parameter.numel() for parameter in example.model.parameters())  # a stage of a pipeline has fewer
    start = time.perf_counter()
    with joined_traces(loop.trace), fresh_profiles(asked.watch.profile):
        run = _train(example.model, source, settings, shown)
    if is_first():
        document = document_of(asked.model, run, settings, source, time.perf_counter() - start) | {"parameters": whole}
        _report(example.model, run, settings, document, asked.as_json)


def _has_parts(source: Source, plan: Plan, mesh: Mesh) -> bool:
    """Whether each rank has its rows of a loader only, so that rank 0 cannot train the unmodified model beside."""
    has_parts = isinstance(source, LoaderStream) and plan.inputs == "local" and mesh.world_size > 1
    if has_parts:
        warn("not compared with one device: with --inputs local each rank has its own rows of a batch", stacklevel=2)
    return has_parts


def _half(model: nn.Module) -> str | None:
    """The dtype of fewest bits of the parameters, if they have fewer than float32."""
    floating = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    least = min(floating, key=lambda dtype: dtype.itemsize, default=torch.float32)
    return str(least).removeprefix("torch.") if least in (torch.float16, torch.bfloat16) else None


def _is_large(example: Example) -> bool:
    """Whether the unmodified model would have to be read whole, though it is one that is built without weights."""
    if example.is_large and is_first():
        said = "not compared with one device: the unmodified model is too large to be trained beside (--no-compare)"
        warn(said, stacklevel=2)
    return example.is_large


def _sizes(stored: AnyProgram | None, batch: int | None, length: int | None, mesh: Mesh) -> tuple[int, int]:
    """Rows and length of a batch: those that were asked for, else those of the program, else the usual ones."""
    call = stored.fingerprint.call.inputs if stored is not None and stored.fingerprint is not None else ()
    shape = next((SHAPE.fullmatch(fact) for path, fact in call if path == "input_ids"), None)
    rows, long = (int(shape[1]), int(shape[2])) if shape is not None else (rows_for(data_ways(mesh)), LENGTH)
    return batch or rows, length or long


def _report(model: nn.Module, run: Run, settings: Settings, document: dict[str, Any], as_json: bool) -> None:
    """Print the result. Ends with code 1 where the losses differ."""
    print_json(document) if as_json else print_report(model, run, settings, document)
    stderr().print(end_of(run, settings), soft_wrap=True, markup=False) if run.stopped else None
    if run.difference is not None and not run.difference <= tolerance_of(settings):
        raise typer.Exit(1)


def _plan(asked: Asked, mesh: Mesh, rows: int) -> Plan:
    """The plan of the options; a pipeline gets two microbatches for each of its ranks, if there are enough rows."""
    usual: dict[str, Any] = {}
    if mesh.is_pipelined:
        usual["microbatches"] = max(1, min(2 * mesh.size("pp"), rows // data_ways(mesh)))
    if mesh.size(SEQUENCE) > 1 and asked.data.loader is None:
        usual["inputs"] = "local"  # a rank makes its part of each batch, and nothing else
    plan = asked.plan.over(usual).plan()
    if asked.loop.accumulate > 1 and (mesh.is_pipelined or plan.microbatches > 1):
        raise ValueError("--accumulate does not go with microbatches\nWay out: a larger --batch, more --microbatches")
    return plan


def _train(model: nn.Module, source: Source, settings: Settings, shown: Shown) -> Run:
    with watched(shown, settings) as (on_start, on_step):
        try:
            return train(model, source, settings, on_start, on_step)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _refuse_uneven_parts(length: int, mesh: Mesh) -> None:
    if length < 2:
        raise ValueError(f"--length {length}: a row of one token has no next one\nWay out: --length 2, or more.")
    ways = mesh.size(SEQUENCE)
    if length % ways:
        more = length + -length % (2 * ways)
        raise ValueError(f"--length {length}: {SEQUENCE}={ways} does not divide it\nWay out: --length {more}")


def _saving(loop: LoopChoices) -> Saving | None:
    directory: Path | None = loop.checkpoint
    if directory is None:
        if loop.resume:
            raise ValueError("--resume needs the directory of the checkpoints\nWay out: --checkpoint DIR --resume")
        return None
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--checkpoint {directory}: that is a file\nWay out: a directory, which may be new.")
    resume = loop.resume or is_restart()  # a restart has checkpoints of this very run
    return Saving(directory, loop.every, loop.keep, resume)
