"""The options of ``autopar train`` that say how a run is watched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from autopar.commands.bundles import option

USUAL = 10  # steps from one line to the next

LogEvery = Annotated[
    int | None,
    typer.Option(min=1, help=f"steps from one line to the next  [default: {USUAL}; on a terminal none, but a bar]"),
]
TensorBoardFolder = Annotated[
    Path | None, typer.Option("--tensorboard", metavar="DIR", help="write curves for tensorboard --logdir DIR")
]
ToWandb = Annotated[bool, typer.Option("--wandb", help="send the numbers of each step to Weights & Biases")]
PeakTflops = Annotated[
    float | None, typer.Option(min=0.001, metavar="TFLOPS", help="peak of one device, for mfu, where autopar has none")
]
ProfileFolder = Annotated[
    Path | None, typer.Option("--profile", metavar="DIR", help="write torch.profiler's view of a step: rank0.json, ...")
]


@dataclass(frozen=True)
class WatchChoices:
    """How a run is watched.

    ``every``: steps from one line to the next; None for the usual number, and none on a terminal. ``peak``: operations
    per second of one device. ``profile``: a directory for what the profiler of each rank sees.
    """

    every: int | None = None
    tensorboard: Path | None = None
    wandb: bool = False
    peak: float | None = None
    profile: Path | None = None

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        return [
            option("log_every", LogEvery),
            option("tensorboard", TensorBoardFolder),
            option("wandb", ToWandb, False),
            option("peak_tflops", PeakTflops),
            option("profile", ProfileFolder),
        ]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Raises ValueError for a package that is missing, before any rank is started."""
        folder, wandb, peak = given["tensorboard"], given["wandb"], given["peak_tflops"]
        if folder is not None or wandb:
            from autopar.training.sinks import package  # which imports torch
        if folder is not None:
            package("tensorboard", "--tensorboard")
        if wandb:
            package("wandb", "--wandb")
        return cls(given["log_every"], folder, wandb, peak * 1e12 if peak else None, given["profile"])
