"""Unequal segments: their sizes are numbers of a family, where a ratio in lowest terms would be other ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.families.ratios import ratio_of, segments
from autopar.families.walk import unequal_segments
from tests.families.test_family import compiled, family_of

TABLE = 64


class Positions(nn.Module):
    """Takes the beginning of a buffer of positions, which a split of the sequence cuts into two segments."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(64, 16), nn.Embedding(TABLE, 16)
        self.mix, self.out = nn.Linear(16, 48), nn.Linear(16, 64)
        self.register_buffer("position_ids", torch.arange(TABLE)[None])

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.tokens(input_ids) + self.places(self.position_ids[:, : input_ids.shape[1]])
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.mix(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return {"loss": functional.cross_entropy(self.out(x + y).flatten(0, 1), labels.flatten())}


def test_segments_are_the_ratio_in_elements() -> None:
    assert segments((7, 9), 64) == (28, 36)
    assert ratio_of((28, 36)) == (7, 9)
    assert segments((1,), 64) == ratio_of((1,)) == (1,)


def test_members_with_unequal_segments() -> None:
    torch.manual_seed(0)
    model = Positions()
    family = family_of(model, "sp=2", {}, ((4, 28), (4, 40), (8, 12)))
    assert [str(parts) for parts in unequal_segments(family.template)] == [f"(s, {TABLE} - s)"]
    assert f"ratio=[s, {TABLE} - s]" in str(family.template) and f"i64[1,s+({TABLE} - s)@sp]" in str(family.template)
    program = compiled(model, "sp=2", {}, family.template, b=12, s=24)
    assert family.agrees(program, {"b": 12, "s": 24})
    assert str(family.extended(program, {"b": 12, "s": 24}).member({"b": 12, "s": 24})) == str(program)
    assert not family.could_hold({"b": 4, "s": TABLE // 2})  # the segments are equal: two blocks, and no ratio
