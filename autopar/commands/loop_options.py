"""The options of ``autopar train`` that say how its loop runs, saves and is started again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from autopar.commands.bundles import option

CLIP = 1.0  # the largest norm of all gradients that is left as it is

Steps = Annotated[int, typer.Option("--steps", min=1)]
Rate = Annotated[float, typer.Option("--lr", help="learning rate of AdamW")]
Compare = Annotated[bool, typer.Option(help="train the unmodified model too, and compare the losses")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, or auto: cuda if there is one for every rank")]
Accumulate = Annotated[int, typer.Option(min=1, help="batches in a step, reduced together")]
Clip = Annotated[float, typer.Option(min=0, help="most that the norm of all gradients may be; 0: anything")]
Checkpoint = Annotated[Path | None, typer.Option(metavar="DIR", help="save here, at the end too; all ranks see it")]
Every = Annotated[int, typer.Option(min=1, help="steps from one checkpoint to the next")]
Keep = Annotated[int, typer.Option(min=1, help="checkpoints that stay")]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the latest checkpoint, saved on whatever mesh")]
# the longer name is for torchrun's own command line, which takes --log for an unclear option of its own
LogFile = Annotated[Path | None, typer.Option("--log", "--log-file", help="write one JSON line per step to this file")]
Trace = Annotated[Path | None, typer.Option(metavar="DIR", help="write the timeline of a step here: step.json")]
FromProgram = Annotated[
    Path | None, typer.Option(metavar="DIR", help="start from what autopar compile wrote, without compiling")
]
Random = Annotated[
    bool, typer.Option("--random", help="start from random weights, where the folder or id of MODEL has weights too")
]
Restarts = Annotated[int, typer.Option(min=0, help="how often all ranks start again when one fails")]


@dataclass(frozen=True)
class LoopChoices:
    """How a run of training goes, by the names of its options.

    ``rate``: of learning. ``every``: steps from one checkpoint to the next, of which the latest ``keep`` stay.
    ``random``: start from weights that are in no file.
    """

    steps: int
    rate: float
    compare: bool
    program: Path | None
    accumulate: int
    clip: float
    checkpoint: Path | None
    every: int
    keep: int
    resume: bool
    max_restarts: int
    device: str
    log: Path | None
    trace: Path | None
    random: bool = False

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        return [
            option("steps", Steps, 20),
            option("rate", Rate, 1e-3),
            option("compare", Compare, True),
            option("program", FromProgram),
            option("accumulate", Accumulate, 1),
            option("clip", Clip, CLIP),
            option("checkpoint", Checkpoint),
            option("every", Every, 100),
            option("keep", Keep, 3),
            option("resume", Resume, False),
            option("max_restarts", Restarts, 0),
            option("device", Device, "auto"),
            option("log", LogFile),
            option("trace", Trace),
            option("random", Random, False),
        ]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        return cls(**given)
