"""Checks of exported ONNX files: onnx's own, and what it cannot know: that collectives of different ranks fit.

Each raises ExportError, naming the file and the node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from autopar.errors import ExportError
from autopar.exporters.collective_schemas import DOMAIN, REDUCTIONS, SCHEMAS, register
from autopar.exporters.onnx_rank import attributes


@dataclass(frozen=True)
class Call:
    """A collective in a file."""

    file: str
    rank: int
    node: str
    operator: str
    given: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, tuple[int, ...], int]:
        """Equal on all members, and of no other collective."""
        kind = "message" if self.operator in ("Send", "Recv") else "collective"
        return kind, tuple(self.given["group"]), self.given["collective_id"]

    def __str__(self) -> str:
        group, number = self.given["group"], self.given["collective_id"]
        return f"{self.operator} {number} of ranks {group} ({self.file}: {self.node})"


def check_files(directory: Path, files: Iterable[str], *, whole: bool) -> None:
    """Check each file by onnx's full check and ours; ``whole``: all ranks are there, so that all members must be."""
    register()
    calls = []
    for file in files:
        try:
            onnx.checker.check_model(str(directory / file), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"{file} is no valid ONNX: {str(error).strip()[:500]}") from error
        calls.append(calls_in(onnx.load(directory / file, load_external_data=False), file))
    for found in calls:
        for call in found:
            check_call(call)
    if whole:
        check_together(calls)


def calls_in(model: onnx.ModelProto, file: str) -> list[Call]:
    """The collectives of a file in their order."""
    rank = int(next(entry.value for entry in model.metadata_props if entry.key == "autopar.rank"))
    found = []
    for node in model.graph.node:
        if node.domain == DOMAIN:
            found.append(Call(file, rank, node.name, node.op_type, attributes(node)))
    return found


def check_call(call: Call) -> None:
    """One collective by itself: a known operator, a valid reduction, its rank among the members."""
    if call.operator not in SCHEMAS:
        raise ExportError(f"{call.file}: {call.node} is {call.operator}, which {DOMAIN} does not have")
    group = list(call.given["group"])
    if len(set(group)) != len(group) or call.rank not in group:
        raise ExportError(f"{call}: rank {call.rank} is not in the group, or a rank is there twice")
    if call.given.get("reduce_op", "sum") not in REDUCTIONS:
        raise ExportError(f"{call}: reduces by '{call.given['reduce_op']}', not by one of {', '.join(REDUCTIONS)}")
    position = {"Send": 0, "Recv": 1}.get(call.operator)
    if position is not None and group[position] != call.rank:
        raise ExportError(f"{call}: rank {call.rank} is on the other end of that message")


def check_together(files: Sequence[Sequence[Call]]) -> None:
    """All ranks: every member takes part in the same operator, in one order, and what is sent is received."""
    members: dict[Any, dict[int, Call]] = defaultdict(dict)
    for call in (call for calls in files for call in calls):
        if call.rank in members[call.key]:
            raise ExportError(f"{call}: rank {call.rank} has it twice")
        members[call.key][call.rank] = call
    for found in members.values():
        _check_members(found)
    _check_order(files)


def _check_members(found: Mapping[int, Call]) -> None:
    one = next(iter(found.values()))
    missing = sorted(set(one.given["group"]) - set(found))
    if missing:
        raise ExportError(f"{one}: ranks {sorted(found)} take part, ranks {missing} do not")
    kinds = {call.operator for call in found.values()}
    if kinds not in ({one.operator}, {"Send", "Recv"}):
        raise ExportError(f"{one}: other members have {', '.join(sorted(kinds))}")
    for call in found.values():
        for name in ("group_name", "reduce_op", "axis", "root"):
            if call.given.get(name) != one.given.get(name):
                raise ExportError(f"{call}: {name} is {call.given.get(name)!r}, and {one.given.get(name)!r} in {one}")


def _check_order(files: Sequence[Sequence[Call]]) -> None:
    """Members meet their collectives in one order, group by group and stage by stage: else they wait for each other."""
    orders: dict[tuple[int, ...], dict[tuple[int, ...], Call]] = defaultdict(dict)
    for calls in files:
        numbers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for call in calls:
            if call.key[0] == "collective":
                numbers[call.key[1]].append(call.key[2])
        for group, order in numbers.items():
            call = next(call for call in calls if call.key[1] == group)
            for other, first in orders[group].items():
                if set(other) & set(order) and list(other) != order:
                    raise ExportError(f"{call}: the collectives of its group have another order than in {first.file}")
            orders[group][tuple(order)] = call
