"""Chakra execution traces: what each rank computes and sends in a step, for simulators of networks such as ASTRA-sim.

    step.0.et, step.1.et, ...   one file for each rank: messages, each after its length as a varint; the first is
                                ``GlobalMetadata``, the others are nodes in the order in which the rank issues them
    comm_groups.json            {"1": [0, 1], ...}: the ranks of each group, by the names that nodes give as ``pg_name``

Schema: :mod:`autopar.traces.chakra_schema`. The attributes are those that the feeders of Chakra and ASTRA-sim read,
with the types that both take. Every operation (:mod:`autopar.traces.operations`) is one node, but a shift, which is a
send and a receive. An exchange of rows between experts has the bytes of a balanced load, and says so: ``uneven``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from autopar.cost.machine import ACCELERATOR, Machine
from autopar.ir.program import AnyProgram
from autopar.mesh import PIPELINE, Mesh
from autopar.traces.chakra_schema import COMMUNICATION_TYPES, NODE_TYPES, VERSION, schema
from autopar.traces.operations import Operation, What
from autopar.traces.steps import check_messages, places_of, step_of

PREFIX, GROUPS = "step", "comm_groups.json"

# collective -> how Chakra calls it; a shift is a send and a receive
COLLECTIVES = {
    "all_reduce": "ALL_REDUCE",
    "all_gather": "ALL_GATHER",
    "all_gather_invariant": "ALL_GATHER",
    "reduce_scatter": "REDUCE_SCATTER",
    "all_to_all": "ALL_TO_ALL",
    "reorder": "ALL_TO_ALL",
    "dispatch_rows": "ALL_TO_ALL",
    "return_rows": "ALL_TO_ALL",
}
INTEGERS = {"num_ops": "int64_val", "tensor_size": "uint64_val", "comm_type": "int64_val", "comm_size": "int64_val"}
INTEGERS |= {"comm_priority": "int32_val", "comm_src": "int32_val", "comm_dst": "int32_val", "comm_tag": "int32_val"}


def write_chakra(
    program: AnyProgram, directory: Path, ranks: Sequence[int] | None = None, machine: Machine = ACCELERATOR
) -> list[str]:
    """Write the traces of a step of a differentiated program to ``directory``, which exists; of all ranks, or of some.

    Gives the names of the files, in the order of ``ranks``. Raises ValueError for a rank that is not on the mesh, or
    without the package protobuf; InvariantError.
    """
    wanted = range(program.mesh.world_size) if ranks is None else ranks
    places = {rank: program.mesh.coordinates(rank).get(PIPELINE, 0) for rank in wanted}
    steps = {place: step_of(program, place, machine) for place in places_of(program)}
    check_messages(list(steps.values()))
    groups = group_names(program.mesh, list(steps.values()))
    content = {name: list(members) for members, name in groups.items()}
    (directory / GROUPS).write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
    for rank, place in places.items():
        with open(directory / f"{PREFIX}.{rank}.et", "wb") as file:
            for message in messages_of(steps[place], rank, program.mesh, groups):
                write_message(file, message)
    return [f"{PREFIX}.{rank}.et" for rank in wanted]


def write_message(file: BinaryIO, message: Any) -> None:
    """Write the length of a protobuf message, as a varint, and then the message."""
    content = message.SerializeToString()
    length = len(content)
    while length > 0x7F:
        file.write(bytes([length & 0x7F | 0x80]))
        length >>= 7
    file.write(bytes([length]))
    file.write(content)


def group_names(mesh: Mesh, steps: Sequence[Sequence[Operation]]) -> dict[tuple[int, ...], str]:
    """The members of each group over which ranks communicate -> its name: a number from 1, as ASTRA-sim needs it.

    0 would stand for all ranks.
    """
    axes = sorted({one.axis for step in steps for one in step if one.what is What.COLLECTIVE})
    members = dict.fromkeys(group for axis in axes for group in mesh.groups(axis))
    return {group: str(number) for number, group in enumerate(members, 1)}


def messages_of(
    step: Sequence[Operation], rank: int, mesh: Mesh, groups: Mapping[tuple[int, ...], str]
) -> Iterator[Any]:
    """The messages of the file of ``rank``: metadata, then the nodes of ``step``, the operations of its role."""
    made = schema()
    about: dict[str, int | str] = {
        "rank": rank,
        "world_size": mesh.world_size,
        "mesh": str(mesh),
        "torch": torch.__version__,
    }
    yield made.GlobalMetadata(version=VERSION, attr=[_attribute(name, found) for name, found in about.items()])
    nodes = _Nodes(rank, mesh, groups)
    for operation in step:
        yield from nodes.of(operation)


@dataclass(frozen=True)
class _Ids:
    """The nodes of an operation: all of them, and the one that has its result."""

    every: tuple[int, ...]
    result: int


class _Nodes:
    """The nodes of one rank, numbered from 1 in the order in which it issues them."""

    def __init__(self, rank: int, mesh: Mesh, groups: Mapping[tuple[int, ...], str]) -> None:
        self.rank, self.mesh, self.groups = rank, mesh, groups
        self.ids: list[_Ids] = []
        self.count = 0

    def of(self, one: Operation) -> Iterator[Any]:
        """The node of an operation; of a shift its send and its receive."""
        found: list[Any] = []
        if one.what is What.COMPUTE:
            found = [self._node(one, "COMP_NODE", num_ops=max(1, one.flops), tensor_size=max(1, one.bytes))]
        elif one.what is What.SEND:
            found = [self._send(one)]
        elif one.what is What.RECEIVE:
            found = [self._receive(one)]
        elif one.kind == "shift":
            found = [self._send(one), self._receive(one)]
        else:
            group = self.groups[self.mesh.group(self.rank, one.axis)]
            kind = COMMUNICATION_TYPES[COLLECTIVES[one.kind]]
            found = [self._node(one, "COMM_COLL_NODE", comm_type=kind, comm_size=one.bytes, pg_name=group)]
        self.ids.append(_Ids(tuple(node.id for node in found), found[-1].id))
        yield from found

    def _send(self, one: Operation) -> Any:
        ends = {"comm_src": self.rank, "comm_dst": self._peer(one, one.step)}
        return self._node(one, "COMM_SEND_NODE", comm_size=one.bytes, comm_tag=one.tag, **ends)

    def _receive(self, one: Operation) -> Any:
        step = one.step if one.what is What.RECEIVE else -one.step
        ends = {"comm_src": self._peer(one, step), "comm_dst": self.rank}
        return self._node(one, "COMM_RECV_NODE", comm_size=one.bytes, comm_tag=one.tag, **ends)

    def _peer(self, one: Operation, step: int) -> int:
        members = self.mesh.group(self.rank, one.axis)
        return members[(members.index(self.rank) + step) % len(members)]

    def _node(self, one: Operation, kind: str, **attributes: int | str) -> Any:
        self.count += 1
        more: dict[str, Any] = {"is_cpu_op": False, **attributes, "run": one.run, "operator": one.kind}
        if one.what is not What.COMPUTE:
            more["axis"] = one.axis
            more["sent_bytes"] = one.sent if kind != "COMM_RECV_NODE" else 0
        if one.is_uneven:
            more["uneven"] = True
        if one.module:
            more["module"] = one.module
        return schema().Node(
            id=self.count,
            name=one.name,
            type=NODE_TYPES[kind],
            data_deps=sorted(self.ids[number].result for number in one.uses),
            ctrl_deps=sorted(node for number in one.after for node in self.ids[number].every),
            duration_micros=round(one.seconds * 1e6),
            attr=[_attribute(name, found) for name, found in more.items()],
        )


def _attribute(name: str, found: bool | int | str) -> Any:
    made = schema().AttributeProto
    if isinstance(found, bool):
        return made(name=name, bool_val=found)
    if isinstance(found, str):
        return made(name=name, string_val=found)
    return made(name=name, **{INTEGERS.get(name, "int64_val"): found})
