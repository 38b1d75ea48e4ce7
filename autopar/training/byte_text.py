"""Real text as byte tokens, in the same batches for every mesh."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autopar.data.parts import Share

BYTES = 256  # the smallest vocabulary of a model that reads them


class ByteText:
    """Batches of a text. Row b of step s continues row b of step s - 1: B readers at B places of the text.

    Raises ValueError for a text that is shorter than one batch.
    """

    def __init__(self, text: bytes, batch: int, length: int) -> None:
        if len(text) < batch * length:
            raise ValueError(f"the text has {len(text)} bytes; a batch of {batch} rows takes {batch} x {length}")
        self._tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._checksum = zlib.crc32(text)
        self.batch, self.length = batch, length

    def __call__(self, step: int, share: Share | None = None) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` (batch, length) of a step, or a share; the text starts over at its end."""
        rows = range(self.batch) if share is None else share.rows(self.batch)
        positions = range(self.length) if share is None else share.positions(self.length)
        starts = torch.tensor(rows) * (len(self._tokens) // self.batch) + step * self.length
        places = (starts[:, None] + torch.tensor(positions)) % len(self._tokens)
        tokens = self._tokens[places]
        return {"input_ids": tokens, "labels": tokens.clone()}

    def place(self, batches: int) -> dict[str, int]:
        """The position of a run after so many batches, for its checkpoints."""
        sizes = {"batch": self.batch, "length": self.length}
        return {"batches": batches, **sizes, "bytes": len(self._tokens), "checksum": self._checksum}

    def batches_before(self, place: Any) -> int:
        """The number of batches that were read when ``place`` was saved.

        Raises ValueError if ``place`` is none of this text and its batches.
        """
        if not isinstance(place, dict) or place.keys() != self.place(0).keys():
            raise ValueError("the checkpoint has no place in a text: it is not one of autopar train")
        here = self.place(place["batches"])
        if any(place[key] != here[key] for key in ("bytes", "checksum")):
            raise ValueError(
                f"the checkpoint was made on another text, of {place['bytes']:,} bytes; this has {here['bytes']:,}\n"
                "Way out: --text with that one, or another directory of checkpoints."
            )
        if place != here:
            raise ValueError(
                f"the checkpoint was made on batches of {place['batch']} x {place['length']} bytes, and these have "
                f"{self.batch} x {self.length}: its place in the text is none of theirs\n"
                f"Way out: --batch {place['batch']} --length {place['length']}"
            )
        return int(place["batches"])


def read_text(path: Path | None) -> bytes:
    """The bytes of a file; without one, the language reference that every Python carries for its ``help()``."""
    if path is not None:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"--text {path}: {error.strerror}") from error
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()).encode()
