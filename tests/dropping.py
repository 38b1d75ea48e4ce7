"""Layers of experts that drop rows by GShard's rule, written plainly, without any rank."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from autopar.check import Reference
from tests.passes.test_route_experts import Experts, NoAuxiliary


def ranks_of_tokens(rows: int, length: int, batch: int = 1, sequence: int = 1, shared: int = 1) -> Tensor:
    """For each of ``rows * length`` tokens the number of its rank.

    Rows are split over ``batch`` ranks, each row over ``sequence`` ones, and what these have over ``shared`` ones.
    """
    found, places = torch.empty(rows * length, dtype=torch.int64), torch.arange(rows * length).view(rows, length)
    blocks = [part for block in places.chunk(batch, 0) for part in block.chunk(sequence, 1)]
    for rank, part in enumerate(part for block in blocks for part in block.reshape(-1).chunk(shared)):
        found[part] = rank
    return found


def kept(chosen: Tensor, ranks: Tensor, experts: int, factor: float) -> Tensor:
    """Which choices (T, k) of tokens find a seat: those of a rank's tokens, first all first ones, token by token."""
    found = torch.zeros_like(chosen, dtype=torch.bool)
    for rank in ranks.unique():
        tokens = (ranks == rank).nonzero().flatten().tolist()
        seats = math.ceil(Fraction(str(factor)) * len(tokens) * chosen.shape[1] / experts)
        left = [seats] * experts
        for choice in range(chosen.shape[1]):
            for token in tokens:
                expert = int(chosen[token, choice])
                if left[expert]:
                    left[expert] -= 1
                    found[token, choice] = True
    return found


class Dropping(Experts):
    """As :class:`Experts`, without the results of choices that find no seat."""

    ranks: Tensor
    factor: float
    dropped = 0

    def _routed(self, rows: Tensor, chosen: Tensor) -> Tensor:
        seated = kept(chosen, self.ranks, self.experts, self.factor)
        self.dropped = int((~seated).sum())
        return super()._routed(rows, chosen) * seated.reshape(-1, 1)


class DroppingWithoutAuxiliary(NoAuxiliary, Dropping):
    pass


def limited(given: Reference, ranks: Tensor, factor: float) -> tuple[Reference, int]:
    """``given``, to compare with a model that drops by the rule; and how many choices that one drops."""
    plain = given.model
    assert isinstance(plain, Experts)
    made = DroppingWithoutAuxiliary if isinstance(plain, NoAuxiliary) else Dropping
    model = made(plain.experts, biased=plain.bias is not None, shared=plain.shared is not None).double()
    model.load_state_dict(plain.state_dict())
    model.ranks, model.factor = ranks, factor
    return given.stepping_as(model), model.dropped
