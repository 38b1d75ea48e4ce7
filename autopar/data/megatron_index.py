"""The index that Megatron-LM's ``preprocess_data`` writes beside a file of tokens, ``NAME.idx`` of ``NAME.bin``.

    9 bytes   "MMIDIDX", two zeros
    u64       version, 1
    u8        dtype of the tokens, a number of DTYPES
    u64, u64  n sequences, m entries of documents
    i32 x n   tokens of each sequence
    i64 x n   where each begins, in bytes
    i64 x m   the sequence with which each document begins

All little-endian (megatron.core.datasets.indexed_dataset).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
HEAD = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
LOOKED_AT = 10_000  # sequences whose last token is compared


@dataclass(frozen=True)
class MegatronIndex:
    """``dtype`` of the tokens; ``lengths``: how many each sequence has, in the order of the file."""

    dtype: str
    lengths: np.ndarray[Any, np.dtype[np.int32]]

    def end_token(self, numbers: np.ndarray[Any, Any]) -> int | None:
        """The token with which sequences end, as with ``--append-eod``; None where they end with several."""
        ends = np.cumsum(self.lengths[:LOOKED_AT], dtype=np.int64) - 1
        last = np.unique(numbers[ends[ends >= 0]])
        return int(last[0]) if len(last) == 1 else None


def index_of(tokens: Path) -> MegatronIndex | None:
    """The index beside a ``.bin`` file; None where there is none.

    Raises ValueError for a file that is none of Megatron-LM's, or that belongs to other tokens.
    """
    path = tokens.with_suffix(".idx")
    if not path.is_file():
        return None
    way_out = f"Way out: Megatron-LM's index of {tokens.name}, or none and --token-dtype."
    data = path.read_bytes()
    head = HEAD.unpack_from(data) if len(data) >= HEAD.size else (b"", 0, 0, 0, 0)
    magic, version, code, sequences, documents = head
    if (magic, version) != (MAGIC, VERSION) or code not in DTYPES:
        raise ValueError(f"--data {path}: no index of Megatron-LM, version 1, of whole numbers\n{way_out}")
    if len(data) != HEAD.size + 12 * sequences + 8 * documents:
        raise ValueError(
            f"--data {path}: {sequences:,} sequences, and {len(data):,} bytes, which is another number\n{way_out}"
        )
    lengths = np.frombuffer(data, dtype="<i4", count=sequences, offset=HEAD.size)
    wanted, size = int(lengths.sum(dtype=np.int64)) * np.dtype(DTYPES[code]).itemsize, tokens.stat().st_size
    if wanted != size:
        raise ValueError(f"--data {tokens}: {size:,} bytes, where {path.name} has {wanted:,}\n{way_out}")
    return MegatronIndex(DTYPES[code], lengths)
