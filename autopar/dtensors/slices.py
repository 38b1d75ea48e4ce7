"""The slices of a whole tensor that this rank holds: rectangles, in the model's own order, without padding.

A part of a fused QKV weight is three of them, a contiguous part is one. Files need to know no more: a tensor that was
split in one way is written, and read, as rectangles in which any other split can find its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from autopar.dtensors.dtensor import is_first, local_of
from autopar.dtensors.placements import Pieces, orders, owned_positions
from autopar.ir.layout import runs

if TYPE_CHECKING:  # which a rank needs when it writes a checkpoint
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """``length`` neighbouring indices along a dim: from ``start`` in the whole tensor, from ``local`` in the part."""

    start: int
    local: int
    length: int


@dataclass(frozen=True)
class Slices:
    """``local``, whose place in the whole tensor of shape ``shape`` ``runs`` gives, for each dim.

    ``first``: no rank before this one holds the same. Torch's distributed checkpoint calls the methods with
    underscores.
    """

    local: Tensor
    shape: torch.Size
    runs: tuple[tuple[Run, ...], ...]
    first: bool

    def pieces(self) -> Iterator[tuple[Offsets, Tensor]]:
        """(offsets in the whole, the view of ``local`` that belongs there), one rectangle after the other."""
        for rectangle in itertools.product(*self.runs):
            view = self.local
            for dim, run in enumerate(rectangle):
                view = view.narrow(dim, run.local, run.length)
            yield tuple(run.start for run in rectangle), view

    def at(self, index: int) -> Slices:
        """The slices of the part ``index`` along the first dim, which has one dim less; none if another rank has it."""
        for run in self.runs[0]:
            if run.start <= index < run.start + run.length:
                return Slices(self.local[run.local + index - run.start], self.shape[1:], self.runs[1:], self.first)
        inner = self.shape[1:] or torch.Size([1])
        return Slices(self.local.new_empty(0, *inner[1:]), self.shape[1:], ((),) * len(inner), self.first)

    def size(self) -> torch.Size:
        return self.shape

    def empty_on_cpu(self) -> Slices:
        return Slices(torch.empty_like(self.local, device="cpu"), self.shape, self.runs, self.first)

    def copied_to_cpu(self) -> Slices:
        return Slices(self.local.to("cpu", copy=True), self.shape, self.runs, self.first)

    def copy_from(self, whole: Tensor) -> None:
        """Take this rank's part of ``whole``."""
        for offsets, view in self.pieces():
            view.copy_(whole[tuple(slice(start, start + size) for start, size in zip(offsets, view.shape))])

    @cached_property
    def _views(self) -> dict[Offsets, Tensor]:
        return dict(self.pieces())

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(offsets), view.shape) for offsets, view in self._views.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._views[tuple(index.offset)]


def slices_of(tensor: Tensor) -> Slices:
    """The slices of a DTensor; any other tensor is the whole."""
    order = orders(tensor.placements) if isinstance(tensor, DTensor) else {}
    found = []
    for dim, size in enumerate(tensor.shape):
        owned = _positions(tensor, dim)
        if owned is not None and dim in order:
            owned = order[dim][owned]
        found.append((Run(0, 0, size),) if owned is None else tuple(_runs(owned)))
    local = local_of(tensor).detach()
    assert tuple(local.shape) == tuple(sum(run.length for run in dim) for dim in found), (tensor.shape, local.shape)
    return Slices(local, tensor.shape, tuple(found), _is_first(tensor))


def _positions(tensor: Tensor, dim: int) -> Tensor | None:
    """The stored indices along ``dim`` that this rank holds; None for all."""
    if not isinstance(tensor, DTensor):
        return None
    here, mesh = tensor.device_mesh.get_coordinate(), tensor.device_mesh
    assert here is not None, "this process is not on the mesh of the tensor"
    owning = [axis for axis, one in enumerate(tensor.placements) if isinstance(one, Shard | Pieces) and one.dim == dim]
    if not owning:
        return None
    return owned_positions(tensor.shape[dim], [here[axis] for axis in owning], [mesh.size(axis) for axis in owning])


def _is_first(tensor: Tensor) -> bool:
    if not isinstance(tensor, DTensor):
        return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return is_first(tensor)


def _runs(owned: Tensor) -> Iterator[Run]:
    """``owned`` (int64, 1-D, in local order) as runs of neighbours."""
    local = 0
    for first, length in runs(owned):
        yield Run(first, local, length)
        local += length
