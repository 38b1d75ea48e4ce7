"""``Plan(inputs="local")``: the parts that ranks pass fit together, and to what the model is called with.

Ranks of the batch axes pass their rows, ranks of ``sp`` one contiguous part of the positions, whatever order the
program computes in. All parts of one input have the same sizes, but for their rows
(:mod:`autopar.calls.unequal_rows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from autopar.calls.calls import Call
from autopar.communication.connect import Connection
from autopar.errors import IndivisibleError, InvariantError, TraceError
from autopar.ir.batch import InputDims, input_dims
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.plan import Plan

SIZES = 64  # the numbers of a call that ranks compare


def check_parts_of_ranks(call: Call, connection: Connection, plan: Plan) -> None:
    """Raise IndivisibleError unless all ranks pass parts of the same sizes; every rank calls this at the same time."""
    comm = connection.comm
    sizes = [size for tensor in call.tensors for size in tensor.shape][:SIZES]
    mine = torch.tensor([*sizes, *[-1] * (SIZES - len(sizes))], device=comm.device)
    for axis in connection.mesh.names:
        found = comm.exchange(mine, axis).tolist()
        other = next((place for place, sizes in enumerate(found) if sizes != mine.tolist()), None)
        if other is not None:
            raise IndivisibleError(_unequal(call, plan, axis, comm.position(axis), other, found[other]))


def _unequal(call: Call, plan: Plan, axis: str, position: int, other: int, sizes: Sequence[int]) -> str:
    """The message: the first input that has other sizes at position ``other`` of ``axis``."""
    start = 0
    for (name, tensor), dims in zip(call.named_tensors, input_dims(call.named_tensors, plan)):
        theirs = list(sizes[start : start + tensor.dim()])
        start += tensor.dim()
        if theirs != list(tensor.shape):
            return (
                f"input '{name}': position {position} on axis '{axis}' passes a part {list(tensor.shape)} and position "
                f"{other} one {theirs} ({_said(dims)}); only numbers of rows may differ, and those not on an axis pp, "
                "with microbatches, or where an input gets a gradient\n"
                "Way out: pad the whole batch before it is cut (autopar.pad_batch), drop what is left over, or pass "
                'the whole batch on every rank, Plan(inputs="global").'
            )
    return f"positions {position} and {other} on axis '{axis}' pass other inputs\nWay out: pass the same on all ranks."


def check_parts(program: AnyProgram, call: Call) -> None:
    """Raise InvariantError unless this rank's parts are what the program takes."""
    if program.plan.inputs != "local":
        return
    dims = input_dims(call.named_tensors, program.plan)
    for (port, entry), tensor, of in zip(program.takes(InputKind.INPUT), call.tensors, dims):
        expected = list(port.value.layout.local_shape(program.mesh))
        if isinstance(program, PipelinedProgram) and of.batch is not None:
            expected[of.batch] = tensor.shape[of.batch]  # the program is that of one microbatch
        if list(tensor.shape) != expected:
            raise InvariantError(
                f"input '{entry.target}': this rank's part is {list(tensor.shape)}, it has to be {expected} "
                f"({_said(of)})\n"
                f"Way out: say which dim is the batch, Plan(batch_dims={{'{entry.target}': ...}}), and which the "
                "sequence, Plan(sequence_dims=...), None for none."
            )


@contextmanager
def explained(call: Call, whole: Call, mesh: Mesh, plan: Plan) -> Iterator[None]:
    """Within this context, a model that cannot be called with the ``whole`` inputs says of which parts these are."""
    try:
        yield
    except TraceError as problem:
        if plan.inputs != "local":
            raise
        found = zip(call.named_tensors, whole.tensors, input_dims(call.named_tensors, plan))
        lines = [
            f"  {name or 'input'} {list(full.shape)} of a part {list(tensor.shape)} ({_said(dims)})"
            for (name, tensor), full, dims in found
        ]
        raise TraceError(
            f"{str(problem).strip()}\n"
            f'With Plan(inputs="local") on {mesh} the model is called with\n' + "\n".join(lines[:8]) + "\n"
            "Way out: pass each rank's part of all of them, or say what is not in parts: "
            "Plan(batch_dims={'input': None}), Plan(sequence_dims={'input': None})."
        ) from problem


def _said(dims: InputDims) -> str:
    rows = "no batch dim" if dims.batch is None else f"batch dim {dims.batch}"
    return f"{rows}, " + ("no sequence dim" if dims.sequence is None else f"sequence dim {dims.sequence}")
