"""Rectangles of tensors in a safetensors file: read, or written, without the bytes around them.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, the header in JSON (name ->
dtype, shape, [first byte, byte behind the last] of the data), the data, row-major. ``safetensors``' own slices are
views of a mapped file, whose pages stay in the process and cannot be counted; hence this reader.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autopar.errors import CheckpointError
from autopar.plain_files import open_plain

BLOCK = 8 << 20  # bytes that are read, or written, at a time
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
LARGEST = (1 << 63) - 1  # size or offset
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor in a file; ``start`` is its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """An existing file, for reading, or one of :func:`create`, for writing.

    Raises CheckpointError for a file that is damaged or no safetensors file.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self.path = path
        try:
            self._handle = open_plain(path, writable=writable)
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error}") from error
        try:
            self.entries = self._header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._handle)

    def sync(self) -> None:
        os.fsync(self._handle)

    def read(self, name: str, offsets: Sequence[int], into: Tensor) -> int:
        """Fill ``into`` with the rectangle of tensor ``name`` that begins at ``offsets``, in the dtype of ``into``;
        gives the number of bytes read."""
        entry, total = self.entries[name], 0
        buffer = torch.empty(BLOCK, dtype=torch.uint8)
        for block in _blocks(into, entry, offsets):
            if block.rows * block.span > len(buffer):
                buffer = torch.empty(block.rows * block.span, dtype=torch.uint8)
            data = buffer[: block.rows * block.span]
            for memory, position in block.places(_memory(data)):
                self._fill(memory, position)
            block.view.copy_(data.view(entry.dtype).view(block.view.shape))
            total += len(data)
        return total

    def write(self, name: str, offsets: Sequence[int], piece: Tensor) -> int:
        """Write ``piece`` as the rectangle of tensor ``name`` that begins at ``offsets``; gives the bytes written."""
        entry, total = self.entries[name], 0
        for block in _blocks(piece, entry, offsets):
            values = torch.empty(block.view.numel(), dtype=entry.dtype)
            values.view(block.view.shape).copy_(block.view)
            data = values.view(torch.uint8)
            for memory, position in block.places(_memory(data)):
                while memory:
                    count = os.pwrite(self._handle, memory, position)
                    memory, position = memory[count:], position + count
            total += len(data)
        return total

    def _fill(self, memory: memoryview, position: int) -> None:
        while memory:
            count = os.preadv(self._handle, [memory], position)
            if count == 0:
                raise CheckpointError(f"'{self.path}' ends before byte {position + len(memory):,}")
            memory, position = memory[count:], position + count

    def _header(self) -> dict[str, Entry]:
        size = os.fstat(self._handle).st_size
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise CheckpointError(f"'{self.path}' is cut off or no safetensors file: {size:,} bytes, header {length:,}")
        try:
            header = json.loads(os.pread(self._handle, length, 8), object_pairs_hook=_each_once)
            found = {name: _entry(name, entry) for name, entry in header.items() if name != "__metadata__"}
            end = _end_of_data(found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"'{self.path}' is damaged or no safetensors file: {error!r:.200}") from None
        if 8 + length + end > size:
            raise CheckpointError(f"'{self.path}' is cut off: {size:,} of {8 + length + end:,} bytes")
        return {name: replace(entry, start=8 + length + entry.start) for name, entry in found.items()}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in the header")
    return found


def _entry(name: str, described: Mapping[str, Any]) -> Entry:
    """The entry with its place in the data. Raises ValueError, KeyError and TypeError."""
    dtype, shape, (first, last) = DTYPES[described["dtype"]], described["shape"], described["data_offsets"]
    numbers = [*shape, first, last]
    if not all(type(number) is int and 0 <= number <= LARGEST for number in numbers):
        raise ValueError(f"'{name}' has sizes or offsets that are no whole numbers from 0 to 2^63: {numbers}")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"'{name}' has {last - first} bytes")
    return Entry(dtype, tuple(shape), first)


def _end_of_data(entries: Mapping[str, Entry]) -> int:
    """The byte behind the last tensor. Raises ValueError where tensors overlap or leave a hole, as safetensors does."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if entry.start != end:
            raise ValueError(f"'{name}' starts at byte {entry.start} of the data, the tensor before it ends at {end}")
        end += entry.bytes
    return end


def create(path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
    """A file of its full size for ``tensors`` (name -> dtype, shape), with the header written and no data yet."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):  # aligned
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"'{name}' is {dtype}, which a safetensors file cannot have")
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + start)


def _memory(data: Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array)


@dataclass(frozen=True)
class _Block:
    """``view`` is ``rows`` times ``span`` bytes in the file, the first at ``start``, each ``stride`` after the last."""

    view: Tensor
    start: int
    rows: int
    span: int
    stride: int

    def places(self, memory: memoryview) -> Iterator[tuple[memoryview, int]]:
        """(the part of ``memory``, its place in the file) of each row; rows without a gap are one."""
        if self.span == self.stride:
            yield memory, self.start
            return
        for row in range(self.rows):
            yield memory[row * self.span : (row + 1) * self.span], self.start + row * self.stride


def _blocks(view: Tensor, entry: Entry, offsets: Sequence[int]) -> Iterator[_Block]:
    """The rectangle ``view`` of a tensor in blocks of about BLOCK bytes (a row of it at least)."""
    if view.numel() == 0:
        return iter(())
    return _rows(view, entry.shape, offsets, entry.dtype.itemsize, entry.start)


def _rows(view: Tensor, shape: Sequence[int], offsets: Sequence[int], itemsize: int, start: int) -> Iterator[_Block]:
    if not shape:
        yield _Block(view, start, 1, itemsize, itemsize)
        return
    stride = math.prod(shape[1:]) * itemsize
    start += offsets[0] * stride
    span = math.prod(view.shape[1:]) * itemsize
    if tuple(view.shape[2:]) != tuple(shape[2:]) or span > BLOCK and len(shape) > 1:
        for row in range(len(view)):
            yield from _rows(view[row], shape[1:], offsets[1:], itemsize, start + row * stride)
        return
    if len(shape) > 1:
        start += offsets[1] * math.prod(shape[2:]) * itemsize
    rows = max(1, BLOCK // span)
    for row in range(0, len(view), rows):
        part = view[row : row + rows]
        yield _Block(part, start + row * stride, len(part), span, stride)
