"""The part of a batch that one rank has: rows by the batch axes, one contiguous part of the positions by ``sp``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.errors import IndivisibleError, LaunchError, check_kind
from autopar.ir.batch import InputDims, input_dims
from autopar.mesh import DATA_AXES, SEQUENCE, Mesh
from autopar.plan import Plan

SEED_STRIDE = 1_000_003  # between the seeds of two epochs


@dataclass(frozen=True)
class Share:
    """An equal part of the rows of a batch, and one of the positions: each (number of the part, of how many)."""

    row_part: tuple[int, int]
    position_part: tuple[int, int]

    @classmethod
    def of(cls, mesh: Mesh, rank: int | None = None) -> Share:
        """That of ``rank``, by default of this process. Raises LaunchError in a process that is no rank of ``mesh``."""
        coordinates = mesh.coordinates(own_rank(mesh) if rank is None else rank)
        parts = []
        for axes in ([axis for axis in mesh.names if axis in DATA_AXES], [SEQUENCE]):
            group = mesh.merged(axes) if axes else SEQUENCE
            parts.append((mesh.position(group, coordinates), mesh.size(group)) if axes else (0, 1))
        return cls(*parts)

    def rows(self, count: int) -> range:
        """Its rows of a batch of ``count``. Raises IndivisibleError."""
        return _range("a batch", "rows", count, self.row_part, "a batch size that is a multiple of that")

    def positions(self, length: int) -> range:
        """Its positions of ``length``. Raises IndivisibleError."""
        return _range("a sequence", "positions", length, self.position_part, "autopar.pad_batch pads it")

    def of_tensor(self, tensor: Tensor, dims: InputDims) -> Tensor:
        """Its part of a whole tensor, in memory of its own."""
        part = tensor
        if dims.batch is not None:
            part = _narrowed(part, dims.batch, self.rows(tensor.shape[dims.batch]))
        if dims.sequence is not None:
            part = _narrowed(part, dims.sequence, self.positions(part.shape[dims.sequence]))
        return part if part is tensor else part.clone(memory_format=torch.contiguous_format)


def _narrowed(tensor: Tensor, dim: int, where: range) -> Tensor:
    return tensor if len(where) == tensor.shape[dim] else tensor.narrow(dim, where.start, len(where))


def _range(of: str, what: str, size: int, part: tuple[int, int], way_out: str) -> range:
    number, parts = part
    if size % parts:
        raise IndivisibleError(f"{of} of {size} {what} does not divide into {parts} parts\nWay out: {way_out}.")
    return range(size // parts * number, size // parts * (number + 1))


def own_rank(mesh: Mesh) -> int:
    """The rank of this process on ``mesh``; raises LaunchError where it has none."""
    if dist.is_initialized():
        return dist.get_rank()
    if "RANK" not in os.environ and mesh.world_size > 1:
        raise LaunchError(
            f"this process is not one of the {mesh.world_size} ranks of {mesh}: its part of a batch is not known\n"
            "Way out: start it with torchrun, or say rank=..."
        )
    return int(os.environ.get("RANK", "0"))


def part_of_batch(
    batch: Mapping[str, Any], mesh: Mesh, plan: Plan | None = None, *, rank: int | None = None
) -> dict[str, Any]:
    """The arguments that ``rank`` (by default this process) passes with ``Plan(inputs="local")`` of a whole ``batch``.

    Tensors are cut along the dims that ``plan.batch_dims`` and ``plan.sequence_dims`` say, or the usual guess; what is
    no tensor stays. Raises IndivisibleError for a size that does not divide.
    """
    check_kind("batch", batch, Mapping, "a dict by name, {'x': x}")
    check_kind("mesh", mesh, Mesh, "autopar.Mesh(dp=2)")
    share = Share.of(mesh, rank)
    tensors = {name: given for name, given in batch.items() if isinstance(given, Tensor)}
    dims = dict(zip(tensors, input_dims(list(tensors.items()), plan or Plan())))
    found = dict(batch)
    for name, tensor in tensors.items():
        try:
            found[name] = share.of_tensor(tensor, dims[name])
        except IndivisibleError as problem:
            raise IndivisibleError(f"input '{name}' {list(tensor.shape)} on {mesh}: {problem}") from None
    return found


class BatchesOfRank:
    """For ``DataLoader(batch_sampler=...)``: of each batch the indices of this rank's rows.

    ``indices`` are those of all ranks in one order, and are gone through again for each epoch; with ``shuffle``, which
    is a seed, in another order each time, the same on all ranks. ``rows`` is the size of the whole batch; a last one
    with fewer is left out.

    Its :meth:`state_dict` says how many epochs and batches were given: a run goes on after these, on any mesh. The
    ``StatefulDataLoader`` of torchdata saves it with its own. ``indices`` that come in another order each time must be
    brought to that of the epoch by their user; ``shuffle`` needs no such care.
    """

    def __init__(
        self, indices: Iterable[int], rows: int, mesh: Mesh, *, shuffle: int | None = None, rank: int | None = None
    ) -> None:
        self._indices, self._rows, self._shuffle = indices, rows, shuffle
        self._own = Share.of(mesh, rank).rows(rows)
        self._epoch = self._given = self._skipped = 0

    def __iter__(self) -> Iterator[list[int]]:
        self._given, self._skipped = self._skipped, 0
        for batch in islice(self._batches(), self._given, None):
            self._given += 1
            yield [batch[row] for row in self._own]
        self._epoch, self._given = self._epoch + 1, 0

    def _batches(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in self._ordered():
            batch.append(index)
            if len(batch) == self._rows:
                yield batch
                batch = []

    def _ordered(self) -> Iterable[int]:
        if self._shuffle is None:
            return self._indices
        every = list(self._indices)
        generator = torch.Generator().manual_seed(self._shuffle + self._epoch * SEED_STRIDE)
        return [every[place] for place in torch.randperm(len(every), generator=generator).tolist()]

    def __len__(self) -> int:
        return len(self._indices) // self._rows  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batches": self._given, "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after the batches of ``state``. Raises ValueError for batches of another size."""
        if state["rows"] != self._rows:
            raise ValueError(
                f"the state is of batches of {state['rows']} rows, and these have {self._rows}\n"
                f"Way out: BatchesOfRank(..., rows={state['rows']})."
            )
        self._epoch, self._skipped = state["epoch"], state["batches"]
