"""Timelines: of steps that are scheduled by the cost model, and of real ones, recorded on real ranks."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from autopar import parallelize
from autopar.errors import InvariantError, LaunchError
from autopar.ir import collectives as comm
from autopar.ir.node import origin
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.mesh import Mesh
from autopar.models import gpt
from autopar.plan import Plan
from autopar.traces.operations import What
from autopar.traces.scheduled import timed, write_scheduled
from autopar.traces.slices import Slice, gaps, merged, one_after_the_other
from tests.launch import run_ranks
from tests.traces.programs import PROGRAMS, ROWS, compiled
from tests.traffic import sent_since

Event = dict[str, Any]


def streams(document: dict[str, Any]) -> dict[tuple[int, str], list[Event]]:
    """(rank, name of the stream) -> its slices, in order."""
    events = document["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[event["pid"], names[event["pid"], event["tid"]]].append(event)
    return {key: sorted(own, key=lambda e: (e["ts"], e["dur"])) for key, own in found.items()}


def plain(found: dict[str, list[Event]]) -> dict[str, list[Event]]:
    """Slices without the numbers of their streams, which differ from file to file."""
    hidden = {"tid": 0, "args": None}
    return {stream: [{**e, **hidden, "sent": e["args"].get("sent")} for e in own] for stream, own in found.items()}


def check_nothing_overlaps(document: dict[str, Any]) -> None:
    for (rank, stream), own in streams(document).items():
        assert all(event["dur"] >= 0 for event in own)
        for before, then in pairwise(own):
            later = then["ts"] - (before["ts"] + before["dur"])
            assert later > -0.01, f"{before['name']} and {then['name']} overlap on {stream} of rank {rank}"


# ---------------------------------------------------------------- scheduled


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_a_scheduled_step(name: str, tmp_path: Path) -> None:
    program = compiled(name)
    write_scheduled(program, tmp_path)
    whole = json.loads((tmp_path / "step.json").read_text())
    check_nothing_overlaps(whole)
    roles = timed(program)
    end = max(one.end_s for own in roles for one in own)
    for rank in range(program.mesh.world_size):
        alone = json.loads((tmp_path / "ranks" / f"rank{rank}.json").read_text())
        assert alone["distributedInfo"]["rank"] == rank
        found = {stream: own for (of, stream), own in streams(whole).items() if of == rank}
        assert plain(found) == plain({stream: own for (_, stream), own in streams(alone).items()})
        own = roles[program.mesh.coordinates(rank).get("pp", 0)]
        assert Counter(e["name"] for e in found["compute"]) == Counter(
            one.operation.name for one in own if one.operation.what is What.COMPUTE
        )
        for stream, events in found.items():
            if stream.startswith("communication "):
                issued = [one.operation for one in own if one.operation.axis == stream.removeprefix("communication ")]
                issued = [one for one in issued if one.what is What.COLLECTIVE]
                assert [(e["name"], e["args"]["sent"]) for e in events] == [(one.name, one.sent) for one in issued]
        idle = sum(e["dur"] for e in found.get("bubbles", ()))
        assert idle + sum(e["dur"] for e in found["compute"]) == pytest.approx(end * 1e6, abs=0.01 * len(own))


def test_bubbles_say_what_a_rank_waits_for(tmp_path: Path) -> None:
    write_scheduled(compiled("three stages"), tmp_path)
    found = streams(json.loads((tmp_path / "step.json").read_text()))
    first = found[2, "bubbles"][0]
    assert (first["ts"], first["name"]) == (0.0, "waits for F0.0 -> 1"), "stage 1 waits for the first message"
    assert any("all_reduce" in event["name"] for event in found[0, "bubbles"]), "exposed collectives of tp"


@pytest.mark.parametrize(("ranks", "expected"), [(None, [0, 2]), ([3, 1, 2], [1, 3])])
def test_of_a_large_program_one_rank_of_each_role(
    ranks: list[int] | None, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopar.traces.scheduled.MOST_OPERATIONS", 300)
    names = write_scheduled(compiled("pipeline with ZeRO-1"), tmp_path, ranks)
    assert names == ["step.json", *(f"ranks/rank{rank}.json" for rank in expected)]
    assert {rank for rank, _ in streams(json.loads((tmp_path / "step.json").read_text()))} == set(expected)


# ---------------------------------------------------------------- real


@dataclass
class Ran:
    """What a rank ran in the traced step: bytes by axis, the nodes of collectives by axis, its instructions."""

    sent: Counter[str]
    nodes: dict[str, list[tuple[str, str]]]
    instructions: list[str]
    changed: float


def traced(mesh: str, plan: dict[str, Any], directory: str) -> Ran:
    torch.manual_seed(0)
    made = gpt.build()
    batch = gpt.example_batch(made, ROWS)
    parallel = parallelize(made, Mesh.parse(mesh), Plan(**plan))
    loss = parallel.train_step(**batch)
    before = parallel.traffic
    with parallel.trace(directory):
        with pytest.raises(InvariantError, match="recorded already"), parallel.trace(directory):
            pass
        again = parallel.train_step(**batch)
    sent: Counter[str] = Counter()
    for transfer in sent_since(before, parallel.traffic):
        sent[transfer.axis] += transfer.bytes
    parallel.train_step(**batch)  # not recorded any more
    program = parallel.program
    place = program.mesh.coordinates(dist.get_rank()).get("pp", 0)
    pipelined = isinstance(program, PipelinedProgram)
    instructions = [str(step) for step in program.required_schedule.ranks[place]] if pipelined else []
    return Ran(sent, collectives(program), instructions, float(again - loss))


def collectives(program: AnyProgram) -> dict[str, list[tuple[str, str]]]:
    """The nodes that communicate in a step, with their modules, by axis, in the order of the graphs."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for part in program.parts:
        graphs = [part.required_role.forward, part.required_role.backward]
        for node in (node for graph in graphs if graph is not None for node in graph.nodes):
            if comm.moving(node.target) and not comm.is_idle(node, part.mesh):
                found[str(comm.arguments_of(node)["axis"])].append((node.name, origin(node).module))
    return found


@pytest.mark.parametrize(
    ("mesh", "plan"),
    [
        ("dp=2", {"bucket_mb": 0.01, "overlap_mb": 0.0}),
        pytest.param("dp=2,tp=2", {"zero": 3}, marks=pytest.mark.slow),
        pytest.param("pp=2,tp=2", {"microbatches": 4}, marks=pytest.mark.slow),
        pytest.param("pp=2", {"microbatches": 4, "schedule": "zb-v"}, marks=pytest.mark.slow),
    ],
)
def test_a_real_step(mesh: str, plan: dict[str, Any], tmp_path: Path) -> None:
    size = Mesh.parse(mesh).world_size
    results = run_ranks(traced, size, mesh, plan, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"rank{rank}.json" for rank in range(size)]
    for rank, ran in enumerate(results):
        document = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert ran.changed == 0.0
        assert document["distributedInfo"] == {"backend": "gloo", "rank": rank, "world_size": size}
        check_nothing_overlaps(document)
        found = {stream: own for (_, stream), own in streams(document).items()}
        sizes: Counter[str] = Counter()
        for stream, events in found.items():
            sizes[stream.partition(" ")[2].split(" ")[-1].partition("=")[0]] += sum(
                event["args"].get("sent", 0) for event in events
            )
        assert +sizes == +ran.sent
        (check_schedule if ran.instructions else check_collectives)(ran, found)
    check_merged(tmp_path, size)


def check_collectives(ran: Ran, found: dict[str, list[Event]]) -> None:
    """One slice for each collective of the program, under the name of its node, in the order of the graph."""
    for axis, nodes in ran.nodes.items():
        events = found[f"communication {axis}"]
        assert [(event["name"], event["args"].get("module", "")) for event in events] == nodes
        assert any(module for _, module in nodes) or axis == "pp"
    known = {node for nodes in ran.nodes.values() for node in nodes}
    computes = [event["args"] for event in found["compute"] if "until_module" in event["args"]]
    assert computes and {(about["until"], about["until_module"]) for about in computes} <= known


def check_schedule(ran: Ran, found: dict[str, list[Event]]) -> None:
    """One slice for each compute, send and receive of the schedule; gradients of a shared embedding travel too."""
    computes = [text for text in ran.instructions if " " not in text]
    assert [event["name"] for event in found["schedule"]] == computes
    for way, said, stream in (("SEND", "sending", "send to"), ("RECV", "message", "receive from")):
        wanted = Counter(f"{said} {text[5:]}" for text in ran.instructions if text.startswith(way))
        names = [event["name"] for of, own in found.items() if of.startswith(stream) for event in own]
        assert Counter(name for name in names if "a parameter" not in name) == wanted
    slices = {event["name"] for event in found.get("communication tp", ())}
    assert slices <= {name for name, _ in ran.nodes.get("tp", ())}


def check_merged(directory: Path, size: int) -> None:
    whole = merged(directory)
    check_nothing_overlaps(whole)
    ranks = {rank for rank, _ in streams(whole)}
    assert ranks == set(range(size))
    starts = {rank: min(own[0]["ts"] for (of, _), own in streams(whole).items() if of == rank) for rank in ranks}
    assert max(starts.values()) - min(starts.values()) < 60e6, "the clocks of one machine are one"


def test_a_trace_needs_ranks() -> None:
    made = gpt.build()
    with pytest.raises(LaunchError, match="needs 2 processes"):
        parallelize(made, Mesh(dp=2)).trace("nowhere")


def test_a_failed_step_leaves_no_file(tmp_path: Path) -> None:
    parallel = parallelize(gpt.build(), Mesh(dp=1))
    with pytest.raises(ZeroDivisionError), parallel.trace(tmp_path / "new"):
        _ = 1 / 0
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("content", "words"), [("{", "is no trace of a rank"), ("[]", "has no traceEvents"), (None, "has no files")]
)
def test_only_traces_are_merged(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "rank0.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        merged(tmp_path)


# ---------------------------------------------------------------- slices


def one(name: str, start: float, end: float) -> Slice:
    return Slice(0, "communication dp", name, start, end)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([("a", 0, 10), ("b", 1, 20)], [("a", 0, 10), ("b", 10, 20)]),  # b waits in the queue
        ([("a", 0, 20), ("b", 5, 10)], [("a", 0, 5), ("b", 5, 10)]),  # a had ended when b was seen to be
        ([("a", 0, 9), ("b", 1, 8), ("c", 2, 30)], [("a", 0, 1), ("b", 1, 8), ("c", 8, 30)]),
        ([("b", 30, 40), ("a", 0, 20)], [("a", 0, 20), ("b", 30, 40)]),
    ],
)
def test_a_stream_runs_one_after_the_other(given: Any, expected: Any) -> None:
    found = one_after_the_other(one(*slice) for slice in given)
    assert [(slice.name, slice.start_s, slice.end_s) for slice in found] == expected


def test_gaps() -> None:
    slices = [one("b", 5, 6), one("a", 1, 2), one("c", 6, 7)]
    found = [(start, end, then.name if then else None) for start, end, then in gaps(slices, 0, 9)]
    assert found == [(0, 1, "a"), (2, 5, "b"), (7, 9, None)]
