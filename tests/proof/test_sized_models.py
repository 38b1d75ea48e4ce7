"""Numbers that depend on sizes otherwise than as a product of them: right ones are accepted, and no wrong one is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.ir.operator_facts import is_overload
from autopar.ir.program import AnyProgram
from autopar.proof.numbers import Number, _numbers, compare_numbers
from tests.proof.sized_models import MODELS, Sized
from tests.selection import slow_but

PLAN = Plan(check_numerics=False)
LARGE, SMALL = Mesh(dp=64, tp=8), Mesh(dp=2, tp=2)
LONG, SHORT = Mesh(dp=16, sp=4), Mesh(dp=2, sp=2)
SIZES = {  # width, rows, tokens, heads
    LARGE: (96, 256, 36, 8), SMALL: (24, 4, 12, 4), LONG: (96, 64, 48, 8), SHORT: (24, 4, 16, 4),
}  # fmt: skip
QUICK = ("covariance_of_the_batch", "smoothed_labels", "residual_of_depth", "mean_over_pairs")
PAIRS = {"dp, tp": (LARGE, SMALL), "dp, sp": (LONG, SHORT)}
EVERY = [(name, pair) for name in MODELS for pair in PAIRS]
CHEAP = [EVERY.index(pair) for pair in zip(QUICK, ("dp, tp", "dp, sp", "dp, tp", "dp, sp"))]
LEFT = {  # where one or a few wrong numbers are another product of sizes, see docs/verify.md
    ("contrastive", "dp, tp"), ("total_variation", "dp, sp"), ("embedding_times_root_of_width", "dp, tp"),
    ("scale_of_long_contexts", "dp, sp"), ("rotary_of_a_length", "dp, sp"),
}  # fmt: skip
TRIED = [pair for pair in EVERY if pair not in LEFT and pair[0] in (*list(MODELS)[:19], *QUICK)]
FACTORS = (2.0, 0.5, 1 / 64, 64.0, 8.0, 1 / 8, 1.25)


@cache
def compiled(name: str, mesh: Mesh, on: Mesh, more_rows: int = 0) -> AnyProgram:
    """``name`` of the sizes of ``mesh``, compiled for the mesh ``on``."""
    torch.manual_seed(0)
    width, rows, tokens, heads = SIZES[mesh]
    x = torch.randn(rows + more_rows, tokens, width)
    return compile_program(Sized(MODELS[name], width, tokens, heads), on, PLAN, (x,))


def refused(name: str, pair: str, program: AnyProgram) -> bool:
    small = PAIRS[pair][1]
    found = compare_numbers(
        program, compiled(name, small, small), compiled(name, small, Mesh()), lambda: compiled(name, small, small, 2)
    )
    return bool(found.refusals or found.unproved)


@pytest.mark.parametrize("name, pair", slow_but(CHEAP, EVERY))
def test_right_numbers_are_accepted(name: str, pair: str) -> None:
    large = PAIRS[pair][0]
    assert not refused(name, pair, compiled(name, large, large))


@pytest.mark.parametrize("name, pair", slow_but([TRIED.index(EVERY[place]) for place in CHEAP], TRIED))
def test_wrong_ones_are_refused(name: str, pair: str) -> None:
    """Each number of the large program by itself, times sizes of the mesh and other factors."""
    large = PAIRS[pair][0]
    wrong = compiled(name, large, large).clone()
    every = list(_numbers(wrong))
    for place, number in numbers(compiled(name, large, large)):
        for factor in FACTORS:
            put(every[place], number.value * factor if number.value else factor)
            assert refused(name, pair, wrong), (number.key, number.value, factor)
            put(every[place], number.value)


def put(number: Number, value: float) -> None:
    """Another value in the place of a number."""
    node = number.node
    if is_overload(node.target):
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        place = names.index(number.argument)
    else:
        place = int(number.argument) if number.argument.isdigit() else len(node.args)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(number.argument, value)


def numbers(program: AnyProgram) -> Iterator[tuple[int, Number]]:
    """With their places, once for what is equal."""
    known = set()
    for place, number in enumerate(_numbers(program)):
        if (number.key, number.value) not in known:
            known.add((number.key, number.value))
            yield place, number
