"""What ``autopar train`` shows while it runs: a bar on a terminal, lines elsewhere; and where else its records go."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from autopar.commands.tables import stderr
from autopar.commands.watch_options import USUAL, WatchChoices
from autopar.training.loop import Settings
from autopar.training.ranks import is_first
from autopar.training.saving import Start
from autopar.training.sinks import Lines, Sink, TensorBoard, Wandb
from autopar.training.step_record import StepRecord


@dataclass(frozen=True)
class Shown:
    """A run as it is shown. ``as_json``: lines are JSON objects. ``config``: for Weights & Biases."""

    title: str
    watch: WatchChoices
    as_json: bool
    config: Mapping[str, Any]

    def say_launch(self, ranks: int) -> None:
        """The first line, at once: ranks need seconds to import torch."""
        console = stderr()
        if not (console.is_terminal or self.as_json):
            _writer(console)(f"{self.title}: starting {ranks} processes")


@contextmanager
def watched(shown: Shown, settings: Settings) -> Iterator[tuple[Callable[[Start], None], Sink]]:
    """The functions that training calls at its start and after each step; on other ranks than the first they are mute.

    Raises ValueError for a package that is missing.
    """
    if not is_first():
        yield lambda start: None, lambda record: None
        return
    console, watch = stderr(), shown.watch
    with ExitStack() as stack:
        sinks: list[Sink] = []
        if watch.tensorboard is not None:
            sinks.append(stack.enter_context(TensorBoard(watch.tensorboard)))
        if watch.wandb:
            sinks.append(stack.enter_context(Wandb(shown.config)))
        if console.is_terminal and not shown.as_json:
            bar = stack.enter_context(_progress(console))
            task = bar.add_task(shown.title, total=settings.steps, loss="")
            sinks.append(lambda record: bar.update(task, completed=record.step + 1, loss=f"loss {record.loss:.4f}"))
        say = _writer(console)
        every = watch.every or (None if console.is_terminal else USUAL)
        if every is not None:
            sinks.append(Lines(every, say, settings.steps, as_json=shown.as_json))
            say(_beginning(shown, settings))

        def on_step(record: StepRecord) -> None:
            for sink in sinks:
                sink(record)

        yield lambda start: _say_start(start, settings, say, shown.as_json), on_step


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)


def _writer(console: Console) -> Callable[[str], None]:
    """Writes a line at once, above the bar if there is one."""

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)
        console.file.flush()

    return say


def _beginning(shown: Shown, settings: Settings) -> str:
    """Said before the first step, which compiles and may take long."""
    if shown.as_json:
        return json.dumps({"event": "started", "mesh": dict(settings.mesh.axes), "steps": settings.steps})
    return f"{shown.title}: {settings.steps} steps; the first one compiles the program"


def _say_start(start: Start, settings: Settings, say: Callable[[str], None], as_json: bool) -> None:
    saving = settings.saving
    if saving is None or not saving.resume:
        return
    if as_json:
        say(json.dumps({"event": "resumed", "step": start.step, "checkpoint": str(start.path) if start.path else None}))
        return
    found = f"resumed from {start.path}" if start.path else f"no checkpoint in {saving.directory} yet"
    say(f"{found}: starting at step {start.step}")
