"""Conversions between placements: what they pass through."""

from __future__ import annotations

import pytest

from autopar.ir.layout import INVARIANT, REPLICATED, Placement, Split
from autopar.split.conversions import plan_placements

PLAIN, BLOCKS, ZIGZAG = Split(1), Split(1, outer=3), Split(1, outer=2, mirrored=True)


@pytest.mark.parametrize("gradient", [True, False])
def test_of_one_dim_in_another_order(gradient: bool) -> None:
    """Without a gradient REPLICATED is INVARIANT, and one gather serves both the parts and the whole."""
    wanted: frozenset[Placement] = frozenset({BLOCKS, REPLICATED if gradient else INVARIANT})
    _, steps = plan_placements(PLAIN, wanted, 1 << 20, gradient, 4)
    assert [step.op for _, step in steps if step] == (
        ["all_gather", "split_replicated"] if gradient else ["all_gather_invariant", "split"]
    )


@pytest.mark.parametrize(("source", "target"), [(PLAIN, ZIGZAG), (ZIGZAG, PLAIN)])
def test_zig_zag_order_is_made_without_the_whole(source: Split, target: Split) -> None:
    cost, steps = plan_placements(source, frozenset({target}), 1 << 30, True, 4)
    assert [step.op for _, step in steps if step] == ["reorder"]
    assert cost < plan_placements(source, frozenset({REPLICATED}), 1 << 30, True, 4)[0] / 2
