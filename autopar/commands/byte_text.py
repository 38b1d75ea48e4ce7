"""Real text as byte tokens, in the same batches for every mesh."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

BYTES = 256  # the least vocabulary of a model that reads them


class ByteText:
    """Batches of a text. Row b of step s is what follows row b of step s - 1: B readers at B places of the text.

    Raises ValueError for a text that is shorter than one batch.
    """

    def __init__(self, text: bytes, batch: int, length: int) -> None:
        if len(text) < batch * length:
            raise ValueError(f"the text has {len(text)} bytes; a batch of {batch} rows takes {batch} x {length}")
        self._tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.batch, self.length = batch, length

    def __call__(self, step: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` (batch, length) of a step; the text starts over at its end."""
        starts = torch.arange(self.batch) * (len(self._tokens) // self.batch) + step * self.length
        places = (starts[:, None] + torch.arange(self.length)) % len(self._tokens)
        tokens = self._tokens[places]
        return {"input_ids": tokens, "labels": tokens.clone()}


def read_text(path: Path | None) -> bytes:
    """The bytes of a file; without one, the language reference that every Python carries for its ``help()``."""
    if path is not None:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"--text {path}: {error.strerror}") from error
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()).encode()
