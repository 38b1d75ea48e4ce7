"""One attention call of a program, whichever of its two operators it uses, and how much of it is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from autopar.operators import masked_attention
from autopar.operators.attention_blocks import tile_pairs
from autopar.rules.factoring import Call

CAUSAL = "j<=i"


@dataclass(frozen=True)
class AttentionCall:
    """The operands of an attention.

    ``bias``: a tensor over the scores, bool or added. ``where``: the scores that take part, as a formula over positions
    (:mod:`autopar.operators.predicates`) that looks up ``vectors``.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    bias: fx.Node | None = None
    vectors: tuple[fx.Node, ...] = ()
    where: str = ""
    scale: float | None = None

    @classmethod
    def of(cls, call: fx.Node | Call) -> AttentionCall:
        """Of a node or call of one of ``operators.ATTENTIONS``, in the form in which ``canonicalize`` writes them."""
        given: tuple[Any, ...] = tuple(call.args)
        if call.target is masked_attention:
            query, key, value, bias, vectors, where, *scale = given
            return cls(query, key, value, bias, tuple(vectors), where, _scale(scale, call.kwargs))
        query, key, value, mask, _, causal = given
        return cls(query, key, value, mask, (), CAUSAL if causal else "", _scale([], call.kwargs))


def _scale(given: list[Any], kwargs: Mapping[str, Any]) -> float | None:
    found: float | None = given[0] if given else kwargs.get("scale")
    return found


@dataclass(frozen=True)
class Work:
    """The scores that each rank of an axis computes of an attention split along the sequence.

    ``pairs``: (row, column) pairs of each rank and distance on the ring. Vectors count as hiding nothing.
    """

    pairs: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, where: str, ways: int, mirrored: bool, queries: int, keys: int) -> Work:
        """``queries``, ``keys``: the whole lengths, which the parts divide."""
        return cls(
            tuple(
                tuple(tile_pairs(where, rank, step, ways, mirrored, queries, keys) for step in range(ways))
                for rank in range(ways)
            )
        )

    @property
    def steps(self) -> tuple[int, ...]:
        """The distances, but 0, at which some rank has a score to compute."""
        return tuple(step for step in range(1, len(self.pairs)) if any(own[step] for own in self.pairs))

    @property
    def total(self) -> int:
        return sum(map(sum, self.pairs))

    @property
    def imbalance(self) -> float:
        """The largest work of a rank over the mean."""
        return max(map(sum, self.pairs)) * len(self.pairs) / self.total if self.total else 1.0
