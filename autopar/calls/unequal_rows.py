"""``Plan(inputs="local")``: ranks that pass unequally many rows (the last batch of a sampler that does not pad).

The ranks compare each call before its first collective (:mod:`autopar.communication.agreement`). Where their calls are
alike but for the numbers of rows, each gets the rows of all, in the order of the ranks, and the call is that of the
whole batch: if the ranks divide it, each takes an equal part, else the program is the one of a batch that they do not
divide.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.calls.calls import Call, resized
from autopar.communication.agreement import Said, UnequalRows, digest_of
from autopar.communication.connect import Connection
from autopar.errors import IndivisibleError
from autopar.ir.batch import data_axes, data_ways, input_dims
from autopar.ir.program import AnyProgram
from autopar.ir.tables import OutputKind
from autopar.mesh import Mesh
from autopar.plan import Plan


def said(text: str, call: Call, kind: Hashable, mesh: Mesh, plan: Plan) -> Said:
    """``text``, with what tells whether other ranks make the same call with other numbers of rows.

    ``kind``: what else determines the program. Rows of a pipeline, of microbatches and of inputs that get gradients
    stay on their ranks, so their numbers may not differ.
    """
    moves = not mesh.is_pipelined and plan.microbatches == 1 and not any(x.requires_grad for x in call.tensors)
    if plan.inputs != "local" or call.rows_of_all or not moves:
        return Said(text)
    dims = input_dims(call.named_tensors, plan)
    rows = [tensor.shape[dim.batch] for tensor, dim in zip(call.tensors, dims) if dim.batch is not None]
    others = [
        (tensor.dtype, tensor.requires_grad, [size for at, size in enumerate(tensor.shape) if at != dim.batch])
        for tensor, dim in zip(call.tensors, dims)
    ]
    values = [leaf for leaf in call.leaves if not isinstance(leaf, Tensor)]
    return Said(text, digest_of((repr(kind), repr(others), repr(values))), tuple(rows))


@dataclass(frozen=True)
class Joined:
    """A call with the rows of all ranks, or this rank's equal part of them; ``counts``: the rows that each passed."""

    call: Call
    counts: tuple[int, ...]

    def check_outputs(self, program: AnyProgram, mesh: Mesh) -> None:
        """Raise IndivisibleError where outputs would be in other parts than the rows that ranks passed."""
        split = set(data_axes(mesh))
        in_parts = any(
            entry.kind is OutputKind.USER and any(split & kind.layout.axes for kind in types)
            for entry, types in zip(program.outputs, program.returned_types)
        )
        total, ways = sum(self.counts), len(self.counts)
        part = -(-total // ways)
        own = [min(part, max(0, total - part * place)) for place in range(ways)]
        if in_parts and own != list(self.counts):
            raise IndivisibleError(
                f"the ranks pass {_numbers(self.counts)} rows, and outputs that have rows would be in parts of "
                f"{_numbers(own)}\nWay out: train_step, which gives the loss alone; rows dealt out as those parts; "
                'drop_last=True; or Plan(inputs="global"), where every rank passes the whole batch.'
            )


def joined(call: Call, found: UnequalRows, connection: Connection, plan: Plan) -> Joined:
    """The call of the whole batch; collective. Raises IndivisibleError where ranks of one part differ."""
    mesh, comm = connection.mesh, connection.comm
    group = mesh.merged(data_axes(mesh))
    parts: list[tuple[int, ...]] = [()] * data_ways(mesh)
    for rank, rows in enumerate(found.rows):
        place = mesh.position(group, mesh.coordinates(rank))
        if parts[place] not in ((), rows):
            raise IndivisibleError(
                f"ranks that differ only on other axes than {group} pass {parts[place]} and {rows} rows\n"
                "Way out: let these ranks draw the same samples."
            )
        parts[place] = rows
    dims = input_dims(call.named_tensors, plan)
    numbers = iter(zip(*parts))
    places = iter(dims)

    def whole(tensor: Tensor) -> Tensor:
        dim = next(places).batch
        return tensor if dim is None else _of_all(tensor, dim, next(numbers), connection)

    args, kwargs = pytree.tree_map_only(Tensor, whole, (call.args, call.kwargs))
    totals = [sum(each) for each in zip(*parts)]
    counts = tuple(of_part[0] for of_part in parts)
    if math.gcd(*totals) % len(parts):
        return Joined(resized(call, args, kwargs, rows_of_all=True), counts)
    places, position = iter(dims), comm.position(group)

    def equal(tensor: Tensor) -> Tensor:
        dim = next(places).batch
        return tensor if dim is None else tensor.chunk(len(parts), dim)[position].contiguous()

    args, kwargs = pytree.tree_map_only(Tensor, equal, (args, kwargs))
    return Joined(resized(call, args, kwargs, rows_of_all=False), counts)


def _of_all(tensor: Tensor, dim: int, rows: Sequence[int], connection: Connection) -> Tensor:
    """The rows of all ranks, in their order, of which this one has some along ``dim``."""
    comm = connection.comm
    own = tensor.detach().to(comm.device).movedim(dim, 0)
    missing = max(rows) - own.shape[0]
    sent = torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own.contiguous()
    for axis in reversed(data_axes(connection.mesh)):
        sent = comm.exchange(sent.contiguous(), axis)
    found = sent.reshape(len(rows), max(rows), *own.shape[1:])
    together = torch.cat([found[place, :count] for place, count in enumerate(rows)])
    return together.movedim(0, dim).contiguous()


def _numbers(counts: Sequence[int]) -> str:
    return " ".join(map(str, counts[:8])) + (" ..." if len(counts) > 8 else "")
