"""One long row of tokens in batches: the same for every mesh, with the place of a run for its checkpoints."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autopar.data.batch_source import Batch, Counts
from autopar.data.parts import Share

Documents = Literal["joined", "separate"]
IGNORED = -100  # a label that counts for nothing
LOOKED_AT = 1 << 20  # tokens at each end of a file that are looked at as a whole


@dataclass(frozen=True)
class Tokens:
    """Tokens of documents one after the other, perhaps a file mapped into memory.

    Attributes:
        numbers: whole numbers, one dim.
        vocabulary: how many tokens there are: no number is as large.
        end: the token after each document; None where documents are not told apart.
        unit: what messages call them: ``bytes`` or ``tokens``.
        is_bounded: whether all were looked at for ``vocabulary``; else later ones may be larger.
    """

    numbers: npt.NDArray[Any]
    vocabulary: int
    end: int | None = None
    unit: str = "tokens"
    is_bounded: bool = True

    def __len__(self) -> int:
        return len(self.numbers)

    def checksum(self) -> int:
        """Of both ends, and of tokens spread over what lies between: files may be large."""
        spread = self.numbers[:: max(1, len(self) // LOOKED_AT)]
        parts = (self.numbers[:LOOKED_AT], self.numbers[-LOOKED_AT:], spread)
        return zlib.crc32(b"".join(np.ascontiguousarray(part, dtype="<i8").tobytes() for part in parts))


class TokenStream:
    """Batches of tokens. Row b of step s continues row b of step s - 1: B readers at B places.

    ``documents="separate"``: a batch has ``position_ids`` too, which start again at 0 with each document, by which a
    Hugging Face model keeps documents apart; the first token of a document is no label. A row may start in the middle
    of one. Raises ValueError for fewer tokens than one batch has, and where documents cannot be told apart.
    """

    def __init__(self, tokens: Tokens, batch: int, length: int, documents: Documents = "joined") -> None:
        if len(tokens) < batch * length:
            raise ValueError(
                f"the data has {len(tokens):,} {tokens.unit}; a batch of {batch} rows takes {batch} x {length}\n"
                "Way out: more data, or a smaller --batch or --length."
            )
        if documents == "separate" and tokens.end is None:
            raise ValueError(
                "documents are to be kept separate, and nothing says where one ends\n"
                "Way out: --end-token ID, the token that ends a document; or JSON lines, a document each."
            )
        self.tokens, self.batch, self.length = tokens, batch, length
        self.is_separate = documents == "separate"
        self._checksum = tokens.checksum()
        self.limit: int | None = None  # tokens from this one on are refused, by all ranks in the same batch

    def __call__(self, step: int, share: Share | None = None) -> dict[str, Any]:
        """``input_ids`` and ``labels`` (batch, length) of a step, or a share; it starts over at the end."""
        rows = range(self.batch) if share is None else share.rows(self.batch)
        positions = range(self.length) if share is None else share.positions(self.length)
        whole = range(self.length) if self.is_separate else positions  # where documents begin is seen in whole rows
        places = self._places(step, rows, whole)
        self._refuse_unknown(step, places)
        found = torch.from_numpy(self.tokens.numbers[places.numpy()].astype(np.int64))
        if not self.is_separate:
            return {"input_ids": found, "labels": found.clone()}
        assert self.tokens.end is not None
        batch = separated(found, self.tokens.end)
        own = slice(positions.start, positions.stop)
        return {name: tensor[:, own].contiguous() for name, tensor in batch.items()}

    def _places(self, step: int, rows: range, positions: range) -> Tensor:
        """Where the tokens of these rows and positions of a step are (rows, positions)."""
        starts = torch.tensor(rows) * (len(self.tokens) // self.batch) + step * self.length
        return (starts[:, None] + torch.tensor(positions)) % len(self.tokens)

    def _refuse_unknown(self, step: int, own: Tensor) -> None:
        """Raise ValueError for a token that the model has not, in any row of the step: every rank then raises it.

        Whole batches are read for that, so only where tokens were not all looked at when they were opened.
        """
        if self.limit is None or self.tokens.is_bounded:
            return
        whole = range(self.batch), range(self.length)
        places = own if own.numel() == self.batch * self.length else self._places(step, *whole)
        numbers = self.tokens.numbers[places.numpy()]
        if not len(numbers) or numbers.max() < self.limit and numbers.min() >= 0:
            return
        bad = (numbers < 0) | (numbers >= self.limit)
        place, token = int(places.numpy()[bad][0]), int(numbers[bad][0])
        raise ValueError(
            f"the token at place {place:,} of the data is {token}, in batch {step + 1}; the model has a vocabulary of "
            f"{self.limit}\nWay out: a vocabulary of {token + 1} or more (--config vocab_size=...), another "
            "--token-dtype, or data without it."
        )

    def first(self, share: Share | None = None) -> Batch:
        """The batch 0, or a share of it."""
        return self(0, share)

    def once(self, most: int | None, share: Share | None = None) -> Iterator[Batch]:
        """The whole batches of the text, or a share of each, at most so many."""
        every = len(self.tokens) // (self.batch * self.length)
        return (self(number, share) for number in range(every if most is None else min(most, every)))

    def counts(self, batch: Batch) -> Counts:
        """Of a whole batch: all are alike."""
        return Counts(self.batch, self.batch * self.length)

    def place(self, batches: int) -> dict[str, int]:
        """The position of a run after so many batches, for its checkpoints."""
        sizes = {"batch": self.batch, "length": self.length}
        return {"batches": batches, **sizes, "tokens": len(self.tokens), "checksum": self._checksum}

    def batches_before(self, place: Any) -> int:
        """The number of batches that were read when ``place`` was saved.

        Raises ValueError if ``place`` is none of these tokens and batches.
        """
        if isinstance(place, dict) and place.keys() == {*self.place(0), "bytes"} - {"tokens"}:
            place = self._of_bytes(place)
        if not isinstance(place, dict) or place.keys() != self.place(0).keys():
            raise ValueError(
                "the checkpoint has no place in a text: it is not one of autopar train on a text\n"
                "Way out: --data with what the run was started with, or another directory of checkpoints."
            )
        here, unit = self.place(place["batches"]), self.tokens.unit
        if any(place[key] != here[key] for key in ("tokens", "checksum")):
            raise ValueError(
                f"the checkpoint was made on another text, of {place['tokens']:,} {unit}; this has {here['tokens']:,}\n"
                "Way out: --data with that one, or another directory of checkpoints."
            )
        if place != here:
            raise ValueError(
                f"the checkpoint was made on batches of {place['batch']} x {place['length']} {unit}, and these have "
                f"{self.batch} x {self.length}: its place in the text is none of theirs\n"
                f"Way out: --batch {place['batch']} --length {place['length']}"
            )
        return int(place["batches"])

    def _of_bytes(self, place: dict[str, Any]) -> dict[str, Any]:
        """The place of a checkpoint of autopar up to 0.1, which knew bytes only and had the checksum of them all.

        Raises ValueError where tokens are no bytes.
        """
        numbers = self.tokens.numbers
        if numbers.dtype != np.uint8 or self.is_separate:
            raise ValueError(
                f"the checkpoint was made by an older autopar, on the bytes of a text of {place['bytes']:,}; this is "
                f"another kind of data\nWay out: --data with that text, --tokenizer bytes, --documents joined."
            )
        same = place["bytes"] == len(numbers) and place["checksum"] == zlib.crc32(numbers.tobytes())
        rest = {key: found for key, found in place.items() if key != "bytes"}
        return {**rest, "tokens": place["bytes"], "checksum": self._checksum if same else -1}


def separated(tokens: Tensor, end: int) -> dict[str, Tensor]:
    """A batch of ``tokens`` (B, T) whose documents end with the token ``end``, for models that keep them apart."""
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == end
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    first = torch.where(starts, positions, 0).cummax(1).values  # of the document of each token
    labels = tokens.masked_fill(starts, IGNORED)
    return {"input_ids": tokens, "labels": labels, "position_ids": positions - first}
