"""Rules along positions: each in plain and in zig-zag order against the operator on the whole, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autopar import operators
from autopar.ir.layout import Split
from autopar.rules.positions import POSITIONS, RULES, rules_along
from autopar.verification.rule_check import Sample, cases, prove
from tests.rules.samples import name_of
from tests.rules.tensors import call, ints, x

aten = torch.ops.aten
ZIGZAG = Split(0, outer=2, mirrored=True)


def convolved(length: int, taps: int, before: int, after: int, stride: int = 1, dilation: int = 1) -> Sample:
    one = [stride], [0], [dilation]
    return call(x(2, 4, length), x(6, 2, taps), x(6), 2, before, after, *one, 2)


SAMPLES: dict[Any, list[Sample]] = {
    operators.padded_convolution: [
        convolved(24, 3, 1, 1),
        convolved(24, 3, 2, 0),
        convolved(24, 3, 0, 2),
        convolved(24, 2, 2, 0, dilation=2),
        convolved(48, 3, 1, 1, stride=2),
        convolved(48, 4, 1, 1, stride=2),
        convolved(48, 2, 0, 0, stride=2),
        call(x(2, 4, 24, 3), x(6, 4, 3, 2), None, 2, 2, 0, [1, 1], [0, 1], [1, 1], 1),
    ],
    aten.roll.default: [call(x(24, 3), [2], [0]), call(x(3, 24), [-1], [1]), call(x(24), [23], [0])],
    aten.cumsum.default: [call(x(3, 24), 1), call(ints(9, 24, 2), 0), call(x(24), -1)],
    aten.cumprod.default: [call(x(3, 24), 1)],
    aten.logcumsumexp.default: [call(x(24, 3), 0)],
    aten.select.int: [*(call(x(3, 24), 1, place) for place in (0, 5, 12, 23, -2)), call(ints(9, 24), 0, 7)],
    aten.gather.default: [call(x(24, 3), 0, ints(24, 5, 3)), call(x(2, 24), 1, ints(24, 2, 12))],
    aten.index_select.default: [call(x(2, 24, 3), 1, ints(24, 12)), call(x(24), 0, ints(24, 1))],
}


@pytest.mark.parametrize("split", [Split(0), ZIGZAG], ids=["plain", "zigzag"])
@pytest.mark.parametrize("target", RULES, ids=name_of)
def test_a_part_of_the_positions_equals_the_whole(target: Any, split: Split) -> None:
    torch.manual_seed(0)
    for sample in SAMPLES[target]:
        for ways in (2, 3, 4):
            tried = list(cases(target, rules_along(split)[target], sample, ways))
            for case in tried:
                prove(case)
            along = [case for case in tried if case.strategy.part and case.strategy.part.factor == POSITIONS]
            assert along, (sample.args[1:], ways)


def test_a_roll_of_all_elements_stays_whole() -> None:
    """Without dims: the elements of all dims in their order, so that no dim has positions of its own."""
    for sample in (call(x(24, 3), [2]), call(x(24), [1], [])):
        for case in cases(aten.roll.default, rules_along(Split(0))[aten.roll.default], sample, 2):
            prove(case)
            assert case.strategy.part is None or case.strategy.part.factor != POSITIONS
