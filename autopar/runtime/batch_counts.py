"""What a rank counts in one microbatch of the whole batch before a step (:mod:`autopar.pipeline.microbatches`).

Each rank counts for itself, from the whole microbatch: it has it, or with ``Plan(inputs="local")`` gathers what is
counted (labels, masks) over the axes that split it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autopar.autodiff.autograd import below_autograd
from autopar.communication.communicator import Communicator
from autopar.errors import AutoparError
from autopar.ir.batch import InputDims, input_dims
from autopar.ir.layout import Layout, Split
from autopar.ir.program import AnyProgram
from autopar.ir.tables import InputKind
from autopar.mesh import DATA_AXES, SEQUENCE
from autopar.pipeline.microbatches import counts, taken
from autopar.weights.absent import Table
from autopar.weights.border import joined


class BatchCounts:
    """The counts of ``program``, bound to the buffers in ``slots``."""

    def __init__(self, program: AnyProgram, slots: Mapping[str, tuple[Table, str]], comm: Communicator) -> None:
        self._program, self._slots, self._comm = program, slots, comm
        self._needed = taken(program)
        constants = program.counts.constants if program.counts is not None else {}
        self._axes = [axis for axis in (*DATA_AXES, SEQUENCE) if comm.mesh.size(axis) > 1]
        if self._needed and program.plan.inputs == "local":
            comm.open(self._axes)
        self._constants = {name: tensor.to(comm.device) for name, tensor in constants.items()}

    def of(self, tensors: Sequence[Tensor], share: float) -> list[Tensor]:
        """What this microbatch, a ``share`` of the batch, contributes; ``tensors`` are all inputs of the model.

        Collective for local inputs.
        """
        counting = self._program.counts
        if counting is None:
            return []
        self._comm.phase = "forward"
        buffers = {entry.target: self._buffer(entry.target) for _, entry in counting.takes(InputKind.BUFFER)}
        entries = list(counting.takes(InputKind.INPUT))
        named = [(entry.target, tensor) for (_, entry), tensor in zip(entries, tensors)]
        inputs = []
        with torch.no_grad(), below_autograd():
            for (port, entry), (_, tensor), dims in zip(entries, named, input_dims(named, counting.plan)):
                if entry.target not in self._needed:
                    inputs.append(tensor)
                elif counting.plan.inputs != "local":
                    inputs.append(tensor.to(self._comm.device))
                else:
                    inputs.append(self._gathered(tensor.to(self._comm.device), port.value.shape, dims))
            return counts(self._program, inputs, {**self._constants, **buffers}, share)

    def _gathered(self, part: Tensor, shape: Sequence[int], dims: InputDims) -> Tensor:
        """The whole of an input of which each rank passes a part."""
        layout = Layout.whole(shape)
        for axis in self._axes:
            dim = dims.sequence if axis == SEQUENCE else dims.batch
            if dim is not None:
                layout = layout.place(axis, Split(dim), self._comm.mesh)
        if part.dtype == torch.bool:
            return joined(part.to(torch.uint8), layout, self._comm).bool()
        return joined(part, layout, self._comm)

    def _buffer(self, name: str) -> Tensor:
        table, key = self._slots[name]
        held = table[key]
        whole: Tensor = held.full_tensor() if hasattr(held, "full_tensor") else held
        if whole.is_meta:
            raise AutoparError(
                f"'{name}' has no data on this rank, and the loss of a microbatch is weighed with it\n"
                "Way out: load the weights before the first step."
            )
        return whole.detach()
