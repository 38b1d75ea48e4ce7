"""Cuts against every choice that there is."""

from __future__ import annotations

import itertools
import random

import pytest

from autopar.autodiff.min_cut import Item, Region, fewest_bytes, frontier, least_work


def _random_region(seed: int) -> Region:
    """Eight values; some cannot be kept, some not be recomputed, every needed one can be had somehow."""
    draw = random.Random(seed)
    items = [Item((), draw.choice((0, 3)), None)]
    for position in range(1, 8):
        operands = tuple(sorted(draw.sample(range(position), min(position, draw.randint(1, 2)))))
        size = draw.choice((None, 1, 2, 4, 8))
        work = draw.choice((None, 0, 1, 5, 9)) if size is not None else draw.choice((0, 1, 5))
        items.append(Item(operands, size, work, needed=size is not None and draw.random() < 0.5))
    return tuple(items)


def _every_choice(region: Region) -> set[tuple[int, int]]:
    """(bytes, work) of each way to have all that is needed."""
    found = set()
    for ways in itertools.product(("", "keep", "make"), repeat=len(region)):
        allowed = all(
            way == ""
            and not item.needed
            or (way == "keep" and item.bytes is not None)
            or (way == "make" and item.work is not None and all(ways[operand] for operand in item.operands))
            for way, item in zip(ways, region)
        )
        if allowed:
            size = sum(item.bytes or 0 for way, item in zip(ways, region) if way == "keep")
            found.add((size, sum(item.work or 0 for way, item in zip(ways, region) if way == "make")))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_is_better(seed: int) -> None:
    region = _random_region(seed)
    every = _every_choice(region)
    light, cheap = fewest_bytes(region), least_work(region)
    assert (light.bytes, light.work) == min(every)
    assert (cheap.work, cheap.bytes) == min((work, size) for size, work in every)
    points = [(choice.bytes, choice.work) for choice in frontier(region)]
    assert points == sorted(points, reverse=True) and set(points) <= every
    for (more, little), (less, much) in zip(points, points[1:]):
        for size, work in every:  # nothing below the line between two neighbours
            assert (much - little) * (size - less) + (more - less) * (work - much) >= 0


def test_the_frontier_bends() -> None:
    """A chain of three: the cheap middle goes first, then the costly one."""
    region = (
        Item((), 0, None),
        Item((0,), 8, 100, needed=True),
        Item((1,), 8, 1, needed=True),
        Item((2,), 8, 2, needed=True),
    )
    assert [(choice.bytes, choice.work) for choice in frontier(region)] == [(24, 0), (16, 1), (8, 3), (0, 103)]
