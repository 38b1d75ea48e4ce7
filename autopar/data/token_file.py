"""Rows of a file of tokens, of which each rank reads its own positions only."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autopar.data.parts import Share
from autopar.mesh import Mesh


class TokenFile(Dataset[dict[str, Tensor]]):
    """A map-style dataset: row i is the tokens i * length to (i + 1) * length of a file of whole numbers of ``dtype``.

    An item has ``input_ids`` and ``labels``, both this rank's positions of the row (int64); a model that shifts labels
    itself gets the label after its last position from its neighbour, in the program. Nothing else of the file is read.
    Worker processes of a ``DataLoader`` may share it. Raises ValueError for a file shorter than one row,
    IndivisibleError for a ``length`` that ``sp`` does not divide.
    """

    def __init__(
        self, path: str | Path, length: int, mesh: Mesh, *, dtype: torch.dtype = torch.uint16, rank: int | None = None
    ) -> None:
        self._path, self._length, self._dtype = Path(path), length, dtype
        self._own = Share.of(mesh, rank).positions(length)
        tokens = self._path.stat().st_size // dtype.itemsize
        self._rows = tokens // length
        if not self._rows:
            raise ValueError(f"{path} has {tokens} tokens of {dtype}, fewer than one row of {length}")
        self._file: int | None = None

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        tokens = self._read(row * self._length + self._own.start, len(self._own))
        return {"input_ids": tokens, "labels": tokens.clone()}

    def _read(self, first: int, count: int) -> Tensor:
        if self._file is None:
            self._file = os.open(self._path, os.O_RDONLY)
        size = self._dtype.itemsize
        # pread has no position of its own, which forked workers would share
        found = os.pread(self._file, count * size, first * size)
        if len(found) != count * size:
            raise ValueError(f"{self._path} has become shorter: {len(found)} bytes where {count * size} were")
        return torch.frombuffer(bytearray(found), dtype=self._dtype).long()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}  # a worker opens its own

    def __del__(self) -> None:
        if self.__dict__.get("_file") is not None:
            os.close(self._file)  # type: ignore[arg-type]
