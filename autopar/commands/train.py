"""``autopar train``: train an unmodified language model on real text over a mesh, beside the same on one device."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from torch import nn

from autopar.commands.bundles import expanded
from autopar.commands.data_options import DataChoices
from autopar.commands.launch import is_rank, is_restart, relaunch
from autopar.commands.options import Json, ModelChoices, ModelName, read_mesh
from autopar.commands.orphans import end_with_launcher
from autopar.commands.plan_options import PlanChoices
from autopar.commands.step_traces import fresh_profiles, joined_traces
from autopar.commands.tables import print_json, stderr
from autopar.commands.this_machine import device_of_rank, refuse_ranks
from autopar.commands.train_report import document_of, end_of, print_report, tolerance_of
from autopar.commands.trained_model import refuse_model
from autopar.commands.watching import Shown, WatchChoices, watched
from autopar.data.token_stream import TokenStream
from autopar.ir.batch import data_ways
from autopar.ir.program import AnyProgram
from autopar.mesh import SEQUENCE, Mesh
from autopar.plan import Plan
from autopar.program_files.program_file import load
from autopar.training.loop import CLIP, Run, Settings, train
from autopar.training.ranks import is_first
from autopar.training.saving import Saving
from autopar.zoo.named import Example, rows_for

MESH, LENGTH = "dp=2,tp=2", 128
SHAPE = re.compile(r"i64\[(\d+), (\d+)\]")  # of tokens, as a program knows its inputs

Accumulate = Annotated[int, typer.Option(min=1, help="batches in a step, reduced together")]
Clip = Annotated[float, typer.Option(min=0, help="most that the norm of all gradients may be; 0: anything")]
Checkpoint = Annotated[Path | None, typer.Option(metavar="DIR", help="save here, at the end too; all ranks see it")]
Every = Annotated[int, typer.Option(min=1, help="steps from one checkpoint to the next")]
Keep = Annotated[int, typer.Option(min=1, help="checkpoints that stay")]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the latest checkpoint, saved on whatever mesh")]
# the longer name is for torchrun's own command line, which takes --log for an unclear option of its own
LogFile = Annotated[Path | None, typer.Option("--log", "--log-file", help="write one JSON line per step to this file")]
Trace = Annotated[Path | None, typer.Option(metavar="DIR", help="write the timeline of a step here: step.json")]
MeshOrNone = Annotated[
    str | None,
    typer.Option("--mesh", metavar="AXES", help=f"e.g. dp=4; 1 for one device  [default: {MESH}, or the program's]"),
]
FromProgram = Annotated[
    Path | None, typer.Option(metavar="DIR", help="start from what autopar compile wrote, without compiling")
]
Restarts = Annotated[int, typer.Option(min=0, help="how often all ranks start again when one fails")]


@expanded
def train_command(
    model: ModelName = "hf:llama",
    mesh: MeshOrNone = None,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    rate: Annotated[float, typer.Option("--lr", help="learning rate of AdamW")] = 1e-3,
    compare: Annotated[bool, typer.Option(help="train the unmodified model too, and compare the losses")] = True,
    program: FromProgram = None,
    accumulate: Accumulate = 1,
    clip: Clip = CLIP,
    checkpoint: Checkpoint = None,
    every: Every = 100,
    keep: Keep = 3,
    resume: Resume = False,
    max_restarts: Restarts = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if there is one for every rank")] = "auto",
    log: LogFile = None,
    trace: Trace = None,
    *,
    plan: PlanChoices,
    choices: ModelChoices,
    data: DataChoices,
    watch: WatchChoices,
    as_json: Json = False,
) -> None:
    """Train MODEL over a mesh on byte-level tokens of real text; by itself it starts one process per rank (torchrun).

    Rank 0 also trains the unmodified model, from the same weights on the same batches. Exit code 1 if the losses differ
    at any step, in float32 by more than 1e-4. SIGTERM ends the step, saves and stops; --resume goes on.
    """
    stored = load(program) if program is not None else None
    on = read_mesh(mesh or MESH) if mesh or stored is None else stored.mesh
    rows, length = _sizes(stored, choices.batch, choices.length, on)
    _refuse_uneven_parts(length, on)
    asked = plan.plan(stored.plan) if stored is not None else _plan(plan, on, rows, accumulate)
    where, saving = device_of_rank(device, on.world_size), _saving(checkpoint, every, keep, resume)
    stream = TokenStream(data.read(), rows, length, data.documents)
    about = {"model": model, "mesh": str(on), "batch": rows, "length": length, "lr": rate, **asked.to_json()}
    shown = Shown(f"{model} on {on}", watch, as_json, about)
    if on.world_size > 1 and not is_rank():
        refuse_ranks(on.world_size, where)
        shown.say_launch(on.world_size)
        with joined_traces(trace), fresh_profiles(watch.profile):
            relaunch(on.world_size, sys.argv[1:], max_restarts, stops=True)
        return
    if is_rank():
        end_with_launcher()
    example = _language_model(model, choices, stream, as_json)
    settings = Settings(
        on, asked, steps, rate, where, compare, accumulate, clip, saving, log, program, trace, watch.peak, watch.profile
    )
    start = time.perf_counter()
    with joined_traces(trace), fresh_profiles(watch.profile):
        run = _train(example.model, stream, settings, shown)
    if is_first():
        document = document_of(model, run, settings, stream, time.perf_counter() - start)
        _report(example.model, run, settings, document, as_json)


def _language_model(name: str, choices: ModelChoices, stream: TokenStream, as_json: bool) -> Example:
    """The model ``name``. Raises ValueError where it cannot be trained on the batches of ``stream``."""
    example = replace(choices, batch=None, length=None).example(name, shown=is_first() and not as_json)
    refuse_model(name, example.model, stream)
    return example


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


def _plan(choices: PlanChoices, mesh: Mesh, rows: int, accumulate: int) -> Plan:
    """The plan of the options; a pipeline gets two microbatches for each of its ranks, if there are enough rows."""
    usual: dict[str, Any] = {}
    if mesh.is_pipelined:
        usual["microbatches"] = max(1, min(2 * mesh.size("pp"), rows // data_ways(mesh)))
    if mesh.size(SEQUENCE) > 1:
        usual["inputs"] = "local"  # a rank makes its part of each batch, and nothing else
    plan = choices.over(usual).plan()
    if accumulate > 1 and (mesh.is_pipelined or plan.microbatches > 1):
        raise ValueError("--accumulate does not go with microbatches\nWay out: a larger --batch, more --microbatches")
    return plan


def _train(model: nn.Module, text: TokenStream, settings: Settings, shown: Shown) -> Run:
    with watched(shown, settings) as (on_start, on_step):
        try:
            return train(model, text, settings, on_start, on_step)
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


def _saving(directory: Path | None, every: int, keep: int, resume: bool) -> Saving | None:
    if directory is None:
        if resume:
            raise ValueError("--resume needs the directory of the checkpoints\nWay out: --checkpoint DIR --resume")
        return None
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--checkpoint {directory}: that is a file\nWay out: a directory, which may be new.")
    return Saving(directory, every, keep, resume or is_restart())  # a restart has checkpoints of this very run
