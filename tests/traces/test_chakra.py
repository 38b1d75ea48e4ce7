"""Chakra traces, read by a reader that shares nothing with the writer: groups, bytes, messages; they can run."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from autopar.analysis.footprint import sent
from autopar.errors import InvariantError
from autopar.ir.program import PipelinedProgram
from autopar.ir.traffic import moved_bytes
from autopar.mesh import Mesh
from autopar.traces.chakra import write_chakra, write_message
from autopar.traces.chakra_schema import schema
from autopar.traces.operations import Operation, What
from autopar.traces.scheduled import timed
from autopar.traces.steps import pairs, places_of, step_of
from tests.selection import slow_but
from tests.traces.programs import PROGRAMS, compiled
from tests.traces.simulator import Simulation
from tests.traces.wire import Node, delimited, read

KINDS = {"all_reduce": 0, "all_gather": 2, "all_gather_invariant": 2, "all_to_all": 6, "reduce_scatter": 7}
KINDS |= {"reorder": 6, "dispatch_rows": 6, "return_rows": 6}
every = pytest.mark.parametrize("name", slow_but([3, 4, 6, 7], PROGRAMS))


@cache
def written(name: str) -> tuple[Mesh, dict[str, list[int]], list[list[Node]]]:
    """The mesh, the groups, and the nodes of each rank."""
    directory, program = Path(mkdtemp()), compiled(name)
    write_chakra(program, directory)
    groups = json.loads((directory / "comm_groups.json").read_text())
    ranks = []
    for rank in range(program.mesh.world_size):
        about, nodes = read(directory / f"step.{rank}.et")
        assert (about["version"], about["rank"]) == ("0.0.4", rank)
        ranks.append(nodes)
    return program.mesh, groups, ranks


@every
def test_nodes_come_after_what_they_need(name: str) -> None:
    for nodes in written(name)[2]:
        assert [node.id for node in nodes] == list(range(1, len(nodes) + 1))
        assert all(0 < before < node.id for node in nodes for before in node.before)
        assert all(not node.attributes["is_cpu_op"] for node in nodes)
        computes = [node for node in nodes if node.type == "COMP"]
        assert computes and all(node.attributes["num_ops"] > 0 < node.attributes["tensor_size"] for node in computes)


@every
def test_bytes_are_those_of_the_footprint(name: str) -> None:
    mesh, _, ranks = written(name)
    for rank, nodes in enumerate(ranks):
        found: Counter[tuple[str, str]] = Counter()
        for node in nodes:
            if node.type in ("COLL", "SEND"):
                kind, axis = node.attributes["operator"], node.attributes["axis"]
                found[axis, kind] += node.attributes["sent_bytes"]
                size = node.attributes["comm_size"]
                expected = size if node.type == "SEND" else moved_bytes(kind, mesh.size(axis), size)
                assert node.attributes["sent_bytes"] == expected > 0
        wanted: Counter[tuple[str, str]] = Counter()
        for transfer in sent(compiled(name), rank):
            wanted[transfer.axis, transfer.name] += transfer.bytes
        assert found == wanted


@every
def test_the_members_of_a_group_run_the_same_collectives_in_the_same_order(name: str) -> None:
    mesh, groups, ranks = written(name)
    assert all(int(group) > 0 for group in groups), "0 would be the world"
    runs: dict[str, list[list[tuple[str, int, int]]]] = defaultdict(list)
    for rank, nodes in enumerate(ranks):
        own: dict[str, list[tuple[str, int, int]]] = {g: [] for g, members in groups.items() if rank in members}
        for node in nodes:
            if node.type == "COLL":
                about = node.attributes
                assert about["comm_type"] == KINDS[about["operator"]]
                assert tuple(groups[about["pg_name"]]) == mesh.group(rank, about["axis"])
                own[about["pg_name"]].append((node.name, about["comm_type"], about["comm_size"]))
        for group, collectives in own.items():
            runs[group].append(collectives)
    for group, of_members in runs.items():
        assert len(of_members) == len(groups[group])
        assert of_members[0] and all(one == of_members[0] for one in of_members)


@every
def test_every_send_has_its_receive(name: str) -> None:
    ends: dict[str, list[tuple[int, int, int, int, str]]] = {"SEND": [], "RECV": []}
    for rank, nodes in enumerate(written(name)[2]):
        for node in nodes:
            if node.type in ends:
                about = node.attributes
                assert about["comm_src" if node.type == "SEND" else "comm_dst"] == rank
                ends[node.type].append(
                    (about["comm_src"], about["comm_dst"], about["comm_tag"], about["comm_size"], node.name)
                )
    assert sorted(ends["SEND"]) == sorted(ends["RECV"])
    tags = [one[:3] for one in ends["SEND"]]
    assert len(tags) == len(set(tags)), "a message has a tag of its own"
    assert bool(tags) == (name in ("ring", "experts") or "pp" in PROGRAMS[name][1])


@every
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_the_ranks_can_run_their_traces(name: str, seed: int) -> None:
    _, groups, ranks = written(name)
    assert Simulation(groups, ranks, seed).ends()


def test_ranks_that_wait_for_each_other_are_found() -> None:
    """A collective that one member has not; and a receive without its send."""
    _, groups, ranks = written("pipeline with ZeRO-1")
    for kind in ("COLL", "SEND"):
        lost = next(node.id for node in ranks[0] if node.type == kind)
        others = [replace(n, control=tuple({*n.control} - {lost}), data=tuple({*n.data} - {lost})) for n in ranks[0]]
        fewer = [node for node in others if node.id != lost]
        assert not Simulation(groups, [fewer, *ranks[1:]], 0).ends()


def test_one_rank_alone(tmp_path: Path) -> None:
    write_chakra(compiled("data and tensors"), tmp_path, [2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comm_groups.json", "step.2.et"]
    assert read(tmp_path / "step.2.et")[1] == written("data and tensors")[2][2]
    with pytest.raises(ValueError, match="rank 9 is not on mesh"):
        write_chakra(compiled("data and tensors"), tmp_path, [9])


def test_exchanges_between_experts_say_that_their_bytes_are_nominal() -> None:
    nodes = [node for own in written("experts")[2] for node in own]
    uneven = {node.attributes["operator"] for node in nodes if node.attributes.get("uneven")}
    assert uneven == {"dispatch_rows", "return_rows"}


def test_attributes_have_the_types_that_feeders_read() -> None:
    """Chakra's own feeder takes the field, whatever the attribute's type is said to be."""
    types = {"num_ops": 9, "tensor_size": 13, "comm_type": 9, "comm_size": 9, "comm_src": 7, "comm_dst": 7}
    types |= {"comm_tag": 7, "pg_name": 29, "is_cpu_op": 27}
    nodes = [node for own in written("experts")[2] for node in own]
    found = {(key, node.attributes[f"field of {key}"]) for node in nodes for key in types if key in node.attributes}
    assert found == set(types.items())


@pytest.mark.parametrize("length", [0, 127, 128, 300, 20_000])
def test_lengths_are_varints(length: int) -> None:
    class Message:
        def SerializeToString(self) -> bytes:
            return b"x" * length

    file = io.BytesIO()
    write_message(file, Message())
    write_message(file, Message())
    assert delimited(file.getvalue()) == [b"x" * length] * 2


def test_without_protobuf_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    with pytest.raises(ValueError, match=r"pip install 'autopar\[export\]'"):
        schema.__wrapped__()


# ---------------------------------------------------------------- faults


def steps(name: str) -> list[tuple[Operation, ...]]:
    return [step_of(compiled(name), place) for place in places_of(compiled(name))]


def first(step: Sequence[Operation], what: What) -> int:
    return next(number for number, one in enumerate(step) if one.what is what)


@pytest.mark.parametrize("what", [What.SEND, What.RECEIVE])
@pytest.mark.parametrize("fault", ["lost", "longer", "another"])
def test_a_message_with_one_end_is_found(what: What, fault: str) -> None:
    found = steps("three stages")
    assert len(list(pairs(found))) == sum(one.what is What.SEND for step in found for one in step)
    at = first(found[1], what)
    one = found[1][at]
    changed = {"lost": [], "longer": [replace(one, bytes=1)], "another": [replace(one, name="F9.9 -> 9")]}[fault]
    found[1] = (*found[1][:at], *changed, *found[1][at + 1 :])
    with pytest.raises(InvariantError, match=r"do not agree on message \d+ between them"):
        list(pairs(found))


def test_the_scheduled_step_of_a_pipeline_has_its_bubble() -> None:
    """Every compute comes after what it needs, and ranks wait for each other."""
    program = compiled("three stages")
    assert isinstance(program, PipelinedProgram)
    ends = []
    for own in timed(program):
        for one in own:
            before = one.operation.uses | one.operation.after
            assert all(own[number].end_s <= one.start_s for number in before)
        busy = sum(one.end_s - one.start_s for one in own if one.operation.what is What.COMPUTE)
        ends.append((own[-1].end_s, busy))
    assert all(busy < max(end for end, _ in ends) for _, busy in ends)
