"""``autopar train``: train an unmodified model over a mesh, on text or a user's batches, beside one device."""

from __future__ import annotations

from typing import Annotated

import typer

from autopar.commands.bundles import expanded
from autopar.commands.data_options import DataChoices
from autopar.commands.loop_options import LoopChoices
from autopar.commands.options import Json, ModelChoices, ModelName
from autopar.commands.plan_options import PlanChoices
from autopar.commands.watch_options import WatchChoices

MESH = "dp=2,tp=2"
MeshOrNone = Annotated[
    str | None,
    typer.Option("--mesh", metavar="AXES", help=f"e.g. dp=4; 1 for one device  [default: {MESH}, or the program's]"),
]


@expanded
def train_command(
    model: ModelName = "hf:llama",
    mesh: MeshOrNone = None,
    *,
    loop: LoopChoices,
    plan: PlanChoices,
    choices: ModelChoices,
    data: DataChoices,
    watch: WatchChoices,
    as_json: Json = False,
) -> None:
    """Train MODEL over a mesh, on text or on batches of your own; by itself it starts one process per rank (torchrun).

    Without --data a language model learns Python's own reference, byte by byte; --data file.py:loader is for any model.
    Rank 0 also trains the unmodified model, from the same weights on the same batches. Exit code 1 if the losses differ
    at any step, in float32 by more than 1e-4. SIGTERM ends the step, saves and stops; --resume goes on.
    """
    from autopar.commands.training_run import Asked, run_training

    run_training(Asked(model, mesh, MESH, loop, plan, choices, data, watch, as_json))
