"""Ranks that have to pass the same batch do: compared in the first calls, and now and then.

With ``Plan(inputs="global")`` all ranks pass the whole batch. With ``"local"`` those that have the same place on the
axes that split an input pass the same part of it: the ranks of ``tp`` and ``pp``, and for the batch those of ``sp``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from autopar.calls.calls import Call
from autopar.communication.agreement import ranks_text
from autopar.communication.connect import Connection
from autopar.communication.digests import BITS, digest
from autopar.errors import RanksDifferError
from autopar.ir.batch import InputDims, input_dims
from autopar.mesh import DATA_AXES, SEQUENCE, Mesh
from autopar.plan import Plan

FIRST, PERIOD = 3, 64
NOBODY = -(1 << BITS)


def is_due(calls: int) -> bool:
    """Whether the inputs of the call after so many of its kind are compared."""
    return calls < FIRST or calls % PERIOD == 0


def check_shared_inputs(call: Call, connection: Connection, plan: Plan) -> None:
    """Raise RanksDifferError, on every rank, where ranks pass different numbers as the same input; collective."""
    named = call.named_tensors
    axes = [_splitting(dims, connection.mesh, plan) for dims in input_dims(named, plan)]
    own = [digest(tensor) for _, tensor in named]
    start, spans = 0, []
    for splitting in axes:
        spans.append((start, start + math.prod(map(connection.mesh.size, splitting))))
        start = spans[-1][1]
    found = torch.full((2, start), NOBODY)
    for number, splitting, (first, _) in zip(own, axes, spans):
        place = first + _position(splitting, connection)
        found[0, place], found[1, place] = number, -number
    agreement = connection.comm.agreement
    agreement.reduce(found)
    differing = (found[0] != -found[1]).tolist()
    wrong = [place for place, (first, last) in enumerate(spans) if any(differing[first:last])]
    if wrong:
        numbers = [numbers[wrong[0]] for numbers in agreement.everyone(own)]
        raise RanksDifferError(_message([named[place][0] for place in wrong], numbers, plan))


def _splitting(dims: InputDims, mesh: Mesh, plan: Plan) -> tuple[str, ...]:
    """The axes along which ranks pass different parts of an input."""
    if plan.inputs != "local":
        return ()
    data = DATA_AXES if dims.batch is not None else ()
    sequence = (SEQUENCE,) if dims.sequence is not None else ()
    return tuple(axis for axis in mesh.names if axis in (*data, *sequence))


def _position(axes: Sequence[str], connection: Connection) -> int:
    position = 0
    for axis in axes:
        position = position * connection.mesh.size(axis) + connection.comm.coordinates[axis]
    return position


def _message(wrong: Sequence[str], numbers: Sequence[int], plan: Plan) -> str:
    """The message about inputs called ``wrong``; ``numbers`` are the digests of the first of them on each rank."""
    groups: dict[int, list[int]] = {}
    for rank, number in enumerate(numbers):
        groups.setdefault(number, []).append(rank)
    names = ", ".join(f"'{name}'" if name else "a positional input" for name in wrong[:4])
    said = f"the ranks pass different numbers as {names}: " + ", others than ".join(
        ranks_text(ranks) for ranks in list(groups.values())[:4]
    )
    if plan.inputs == "local":
        return (
            f'{said}\nWith Plan(inputs="local") ranks that differ only on tp or pp (or on sp, for what has no '
            "sequence) pass the same part.\n"
            "Way out: let these ranks draw the same samples (a sampler of as many parts as the data axes have ranks, "
            "autopar.data), or say which inputs are in parts: Plan(batch_dims=...), Plan(sequence_dims=...)."
        )
    return (
        f"{said}\nWith the plan's inputs='global' every rank passes the whole batch; its program takes its own part.\n"
        'Way out: Plan(inputs="local") if each data-parallel rank loads its own rows (a DistributedSampler); '
        "else the same batch on every rank: one seed for shuffling, augmenting and drawing."
    )
