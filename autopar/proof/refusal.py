"""What a proof gives: what it has shown, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Layer(StrEnum):
    """The layers of a proof, in the order in which they are tried."""

    STRUCTURE = "structure"
    RELATIONS = "relations"
    FIELD = "field"
    FLOAT64 = "float64"


@dataclass(frozen=True)
class Refusal:
    """Why a program is not what it should be.

    Attributes:
        where: the node, the line of a rank's code, or the gradient.
        problem: what is wrong there, with the numbers.
        cause: the likely cause.
        ranks: two ranks that show it, where it takes two.
    """

    layer: Layer
    where: str
    problem: str
    cause: str = ""
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        ranks = f" [ranks {' and '.join(map(str, self.ranks))}]" if self.ranks else ""
        cause = f"\n    likely cause: {self.cause}" if self.cause else ""
        return f"{self.layer.value}: {self.where}{ranks}: {self.problem}{cause}"

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layer": self.layer.value,
            "where": self.where,
            "problem": self.problem,
            "cause": self.cause,
            "ranks": list(self.ranks),
        }


@dataclass(frozen=True)
class Shown:
    """What one layer has shown.

    ``facts``: a count for each kind of thing that was shown, in words. ``unproved``: what it could say nothing of, and
    why. ``seconds``: of this process's clock.
    """

    layer: Layer
    facts: Mapping[str, int] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    unproved: tuple[str, ...] = ()
    seconds: float = 0.0
