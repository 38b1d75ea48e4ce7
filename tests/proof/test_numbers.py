"""Numbers in a large program that was not executed: those of the reduced one, or what follows from sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.ir.node import set_values, values
from autopar.ir.program import AnyProgram
from autopar.proof.numbers import SPLIT, Number, _numbers, compare_numbers


class Blocks(nn.Module):
    """A mean over rows and columns, which dp and tp split, and numbers of the model's own."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(blocks))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs):
            x = x + down(up(x).tanh() * 3) / 7
        return self.head(x).square().mean()


PLAN = Plan(check_numerics=False)


@cache
def compiled(size: str) -> AnyProgram:
    torch.manual_seed(0)
    blocks, width, rows, mesh = {
        "large": (5, 48, 256, Mesh(dp=128, tp=8)),
        "small": (2, 12, 4, Mesh(dp=2, tp=2)),
        "single": (2, 12, 4, Mesh()),
    }[size]
    return compile_program(Blocks(blocks, width), mesh, PLAN, (torch.randn(rows, width),))


def large() -> AnyProgram:
    return compiled("large").clone()


def refused(program: AnyProgram) -> bool:
    found = compare_numbers(program, compiled("small"), compiled("single"))
    return bool(found.refusals or found.unproved)


def numbers() -> Iterator[tuple[int, Number]]:
    """Once for blocks that are equal."""
    known = set()
    for place, number in zip(count(), _numbers(compiled("large"))):
        if (number.key, number.value) not in known:
            known.add((number.key, number.value))
            yield place, number


def test_numbers_of_another_mesh_and_of_other_sizes_are_right() -> None:
    assert not refused(large())
    found = {(number.key[0], number.value) for _, number in numbers()}
    assert {(SPLIT, 128.0), ("forward", 128.0), ("backward", 128.0), (SPLIT, 8.0), ("backward", 3.0)} <= found


@pytest.mark.parametrize("factor", [128 * 8 / 128, 1 / 64, 2.0, 0.5, 8 / 128], ids=str)
def test_each_number_that_is_another_is_refused(factor: float) -> None:
    """All ranks of the mesh in place of one axis, the ranks of the reduced mesh, those of the other axis, ..."""
    for place, number in numbers():
        wrong = large()
        node = next(one.node for at, one in enumerate(_numbers(wrong)) if at == place)
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        node.update_arg(names.index(number.argument), number.value * factor)
        assert refused(wrong), (number.key, number.value, factor)


@pytest.mark.parametrize("graph", [SPLIT, "forward", "backward"])
def test_a_scale_that_is_there_twice_is_refused(graph: str) -> None:
    """One that the reduced program has nowhere: by a number of the right size, in a module of its own."""
    program = large()
    found = next(number.node for number in _numbers(program) if number.key[0] == graph and number.value == 128)
    (user, *_) = found.users
    with found.graph.inserting_before(user):
        twice = found.graph.call_function(torch.ops.aten.mul.Scalar, (found, 1 / 128))
    set_values(twice, *values(found))
    user.replace_input_with(found, twice)
    assert refused(program)


def test_the_words() -> None:
    program = large()
    number = next(one for one in _numbers(program) if one.key[0] == "forward" and one.value == 128)
    number.node.update_arg(1, 1024)
    (refusal,) = compare_numbers(program, compiled("small"), compiled("single")).refusals
    assert refusal.layer == "relations" and refusal.where.startswith("forward: div")
    assert refusal.problem.startswith("aten.div.Scalar is given 1024 as other, the reduced program 2")
    assert "no product of the sizes that meet there gives both" in refusal.problem and refusal.cause
