"""The border between a module (whole tensors, DTensors) and a rank program (local tensors of fixed sizes)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from autopar.communication.communicator import Communicator
from autopar.communication.connect import Connection
from autopar.communication.pieces import padded
from autopar.dtensors.dtensor import local_of, of_local, spec_of
from autopar.dtensors.piecewise import dtensor
from autopar.errors import IndivisibleError, InvariantError
from autopar.ir.layout import Layout, runs, shard
from autopar.ir.node import Value
from autopar.weights.stored import stored

Part = Callable[[Tensor], Tensor]


def part_of(layout: Layout, comm: Communicator, *, is_local: bool = False) -> Part:
    """A function that takes this rank's part out of a user's tensor: a whole one or, with ``is_local``, the part
    itself.

    Parts of uneven splits are padded with zeros to the sizes on which the program works.
    """
    shape = layout.local_shape(comm.mesh)
    cuts: list[tuple[int, int, int] | tuple[int, Tensor]] = []
    for dim in range(len(shape)):
        owned = layout.indices(dim, comm.coordinates, comm.mesh)
        if owned is None or is_local:
            continue
        pieces = runs(owned) or [(0, 0)]
        cuts.append((dim, *pieces[0]) if len(pieces) == 1 else (dim, owned.to(comm.device)))

    device = comm.device

    def part(tensor: Tensor) -> Tensor:
        if not cuts and tensor.shape == shape and tensor.device == device and tensor.is_contiguous():
            return tensor.detach() if tensor.requires_grad else tensor
        x = tensor.detach() if tensor.requires_grad else tensor
        if x.device != device:
            x = x.to(device)
        for cut in cuts:
            x = x.index_select(*cut) if len(cut) == 2 else x.narrow(*cut)
        return padded(x, shape).contiguous()

    return part


def joined(local: Tensor, layout: Layout, comm: Communicator) -> Tensor:
    """The whole of a value of any layout, on every rank: each puts its part into zeros, and these are summed."""
    if not layout.groups:
        return local
    whole = local.new_zeros(layout.shape)
    owned = [layout.indices(dim, comm.coordinates, comm.mesh) for dim in range(local.dim())]
    for dim, indices in enumerate(owned):
        local = local.narrow(dim, 0, local.shape[dim] if indices is None else len(indices))
    where = [torch.arange(size) if own is None else own for size, own in zip(layout.shape, owned)]
    whole[tuple(grid.to(local.device) for grid in torch.meshgrid(*where, indexing="ij"))] = local
    for axis in layout.groups:
        whole = comm.all_reduce(whole, axis, "sum")
    return whole


def trimmed(x: Tensor, shape: torch.Size) -> Tensor:
    """``x`` without the zeros that an uneven split has at its end."""
    if x.shape != shape:
        for dim, size in enumerate(shape):
            x = x.narrow(dim, 0, size)
    return x.contiguous()


@dataclass
class Result:
    """How one output is passed to the user, and its gradient to the program.

    Whole values are plain tensors, parts are DTensors; parts that DTensor cannot express are joined.
    """

    name: str
    value: Value
    connection: Connection
    _spec: Any = field(default=None, init=False)
    _join: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        layout, comm = self.value.layout, self.connection.comm
        self._local_shape = layout.local_shape(comm.mesh)
        if layout.partial:
            raise InvariantError(f"output '{self.name}' is still partial: {layout}; a reduction is missing before it")
        if not layout.axes:
            return
        try:
            form = stored(layout, comm.mesh, self.connection.dims, self.name)
        except IndivisibleError:
            self._join = True
            return
        self._shape = shard(torch.empty(layout.shape, device="meta"), layout, comm.mesh, comm.coordinates).shape
        local = torch.empty(self._shape, dtype=self.value.dtype, device=comm.device)
        self._spec = spec_of(dtensor(local, self.connection.device_mesh, form.placements, layout.shape))

    @property
    def is_given_as_it_is(self) -> bool:
        """Whether :meth:`give` gives the program's tensor itself."""
        return self._spec is None and not (self._join and self.value.layout.groups)

    def give(self, local: Tensor) -> Tensor:
        """The user's value for the program's ``local``."""
        if self._spec is not None:
            return of_local(trimmed(local, self._shape), self._spec)
        return joined(local, self.value.layout, self.connection.comm) if self._join else local

    def take(self, grad: Tensor | None) -> Tensor:
        """The program's part of the gradient of the user's value; zeros where there is none."""
        if type(grad) is Tensor and grad.shape == self._local_shape and not self._join:
            return grad.contiguous()
        comm, layout = self.connection.comm, self.value.layout
        if grad is None:
            return torch.zeros(self._local_shape, dtype=self.value.dtype, device=comm.device)
        if self._join:
            return part_of(layout, comm)(grad)
        if isinstance(grad, DTensor):
            wanted = self._spec.placements if self._spec else [Replicate()] * grad.device_mesh.ndim
            grad = local_of(grad if grad.placements == wanted else grad.redistribute(placements=wanted))
        return padded(grad, self._local_shape).contiguous()
