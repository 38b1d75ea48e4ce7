"""Loops over experts written out: as one call for all, and undone where nothing was found for it."""

from __future__ import annotations

import torch

from autopar.experts.unrolled import roll, unroll_the_rest
from autopar.frontend.numerics import run_graph
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.ir.rewrite import remove_unused

SUM = """program mesh()
  w        = param w                                 : f32[2,8,8]
  x        = input x                                 : f32[6,8]
  gates    = input gates                             : f32[6,2]
  first    = aten.select.int(w, 0, 0)                : f32[8,8]
  product  = aten.matmul(x, first)                   : f32[6,8]
  act      = aten.relu(product)                      : f32[6,8]
  gate     = aten.slice.Tensor(gates, 1, 0, 1, 1)    : f32[6,1]
  one      = aten.mul.Tensor(act, gate)              : f32[6,8]
  sum_1    = aten.add.Tensor(x, one)                 : f32[6,8]
  second   = aten.select.int(w, 0, {second})         : f32[8,8]
  product2 = aten.matmul(x, second)                  : f32[6,8]
  act2     = aten.relu(product2)                     : f32[6,8]
  gate2    = aten.slice.Tensor(gates, 1, 1, 2, 1)    : f32[6,1]
  two      = aten.mul.Tensor(act2, gate2)            : f32[6,8]
  sum_2    = aten.add.Tensor(sum_1, two)             : f32[6,8]
  return sum_2
"""
STACK = """program mesh()
  a      = param a                                   : f32[8,8]
  b      = param b                                   : f32[8,8]
  x      = input x                                   : f32[6,8]
  one    = aten.linear(x, a)                         : f32[6,8]
  act    = aten.softmax.int(one, -1)                 : f32[6,8]
  two    = aten.linear(x, b)                         : f32[6,8]
  act_1  = aten.softmax.int(two, -1)                 : f32[6,8]
  stack  = aten.stack([act, act_1], 1)               : f32[6,2,8]
  return stack
"""


def program(text: str) -> Program:
    found = parse(text)
    assert isinstance(found, Program)
    return found


def rolled_and_run(text: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Program, int]:
    before, after = program(text), program(text)
    count = len(roll(after.graph, {2}))
    remove_unused(after.graph)
    (wanted,), (found,) = run_graph(before.graph, tensors), run_graph(after.graph, tensors)
    return wanted, found, after, count


def test_a_sum_over_experts() -> None:
    tensors = torch.randn(2, 8, 8), torch.randn(6, 8), torch.randn(6, 2)
    wanted, found, after, count = rolled_and_run(SUM.format(second=1), *tensors)
    torch.testing.assert_close(found, wanted)
    assert count == 1 and str(after).count("aten.matmul") == 1 and "aten.sum.dim_IntList" in str(after)


def test_a_stack_of_experts() -> None:
    wanted, found, after, count = rolled_and_run(STACK, torch.randn(8, 8), torch.randn(8, 8), torch.randn(6, 8))
    torch.testing.assert_close(found, wanted)
    assert count == 1 and str(after).count("aten.softmax") == 1 and "aten.stack([a, b], 0)" in str(after)


def test_the_same_expert_twice_is_no_loop() -> None:
    after = program(SUM.format(second=0))
    assert not roll(after.graph, {2})
    remove_unused(after.graph)
    assert str(after) == str(program(SUM.format(second=0)))


def test_a_loop_over_another_number_stays() -> None:
    assert not roll(program(SUM.format(second=1)).graph, {3, 4})


def test_what_was_rolled_for_nothing_is_undone() -> None:
    for text in (SUM.format(second=1), STACK):
        after = program(text)
        unroll_the_rest(after.graph, roll(after.graph, {2}))
        remove_unused(after.graph)
        assert str(after) == str(program(text))
