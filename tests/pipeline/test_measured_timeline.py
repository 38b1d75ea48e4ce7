"""What a real step of a pipeline looks like: when each rank computed what, and how many activations it held."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import pytest
import torch
from rich.console import Console

from autopar import parallelize
from autopar.errors import InvariantError
from autopar.mesh import Mesh
from autopar.models import mlp
from autopar.plan import Plan
from autopar.schedules.draw import draw
from autopar.schedules.instructions import Kind
from autopar.schedules.named import make_schedule
from autopar.schedules.svg import svg
from autopar.schedules.timing import Timeline
from tests.launch import run_ranks

P, M = 3, 6
SCHEDULES = ("gpipe", "1f1b", "zb-h1")


def steps() -> dict[str, tuple[Timeline, int]]:
    """By schedule the timeline of a step, and the most microbatches that this rank held."""
    found = {}
    for name in SCHEDULES:
        torch.manual_seed(0)
        model = mlp.build()
        batch = mlp.example_batch(model, 2 * M)
        parallel = parallelize(model, Mesh(pp=P), Plan(microbatches=M, schedule=name))
        with pytest.raises(InvariantError, match="no timeline"):
            parallel.timeline()
        for _ in range(2):
            parallel.train_step(**batch)
        executable: Any = parallel._programs.latest_bound
        found[name] = parallel.timeline(), executable.in_flight
    return found


@cache
def measured() -> list[dict[str, tuple[Timeline, int]]]:
    return run_ranks(steps, P)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rank_gets_the_computes_of_all_in_their_order(name: str) -> None:
    timelines = [found[name][0] for found in measured()]
    assert timelines[0] == timelines[1] == timelines[2]
    schedule = make_schedule(name, P, M)
    for rank, events in enumerate(timelines[0].ranks):
        found = [(event.kind, event.stage, event.microbatch) for event in events]
        assert found == [(step.kind, step.stage, step.microbatch) for step in schedule.computes(rank)]
    assert timelines[0].measured


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_ranks_clocks_agree(name: str) -> None:
    """No stage starts before what it uses has been made."""
    events = [event for own in measured()[0][name][0].ranks for event in own]
    ended = {(event.kind, event.stage, event.microbatch): event.end_s for event in events}
    for event in events:
        if event.kind is Kind.F and event.stage > 0:
            assert event.start_s > ended[Kind.F, event.stage - 1, event.microbatch]
        if event.kind in (Kind.B, Kind.I) and event.stage < P - 1:
            assert event.start_s > ended[event.kind, event.stage + 1, event.microbatch]


def test_activations_held_are_those_of_the_schedule() -> None:
    """All m microbatches with GPipe, p - rank with 1F1B; with ZB-H1, whose weight gradients come late, always p."""
    held = {name: [found[name][1] for found in measured()] for name in SCHEDULES}
    assert held == {"gpipe": [M] * P, "1f1b": [P - rank for rank in range(P)], "zb-h1": [P] * P}


def test_a_measured_step_is_drawn() -> None:
    timeline = measured()[0]["1f1b"][0]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(draw(timeline, 100))
    assert [f"rank {rank}" in console.export_text(clear=False) for rank in range(P)] == [True] * P
    picture = svg(timeline, "a step")
    assert picture.count("<title>F") >= P * M
    assert timeline.bubble > 0
