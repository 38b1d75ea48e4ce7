"""Buckets: what shares one and what does not, and the same numbers on every rank, uneven parts and all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.ir.tables import Role
from autopar.mesh import Mesh
from autopar.passes.bucket_collectives import bucket_collectives
from autopar.plan import Plan
from autopar.simulator.lockstep import Lockstep
from tests.passes.canonical import collectives

EMPTY = "  return\n\n"
REDUCED = """
  a = saved : f64[4,6]
  b = saved : f64[5]
  c = saved : f64[3,7]
  p = comm.all_reduce(a, dp) : f64[4,6]
  q = comm.all_reduce(b, dp) : f64[5]
  r = comm.all_reduce(c, dp) : f64[3,7]
  return u=p, v=q, w=r
"""
SCATTERED = """
  a = saved : f64[4,6]
  b = saved : f64[5]
  c = saved : f64[3,7]
  p = comm.reduce_scatter(a, dp, dim=1) : f64[4,6@dp]
  q = comm.reduce_scatter(b, dp, dim=0) : f64[5@dp]
  r = comm.reduce_scatter(c, dp, dim=1) : f64[3,7@dp]
  return u=p, v=q, w=r
"""
GATHERED = """
  a = param a : f64[4,6@dp]
  b = param b : f64[5@dp]
  p = comm.all_gather(a, dp, dim=1) : f64[4,6]
  q = comm.all_gather(b, dp, dim=0) : f64[5]
  y = aten.mul.Tensor(p, 2.0) : f64[4,6]
  z = aten.mul.Tensor(q, 3.0) : f64[5]
  return one=y, two=z
"""


def backward(lines: str, **plan: object) -> Program:
    text = f"program mesh(dp=2)\n{EMPTY}forward:\n{EMPTY}backward:{lines}\ninference:\n{EMPTY}"
    return parse(text, Plan(**plan))  # type: ignore[arg-type]


def forward(lines: str, **plan: object) -> Program:
    text = f"program mesh(dp=2){lines}\nforward:{lines}\ninference:{lines}"
    return parse(text, Plan(**plan))  # type: ignore[arg-type]


def role(program: Program) -> Role:
    assert program.role is not None
    return program.role


def backward_of(program: Program) -> fx.Graph:
    graph = role(program).backward
    assert graph is not None
    return graph


def on_all_ranks(graph: fx.Graph, parts: list[list[Tensor]]) -> list[list[Tensor]]:
    return Lockstep(Mesh(dp=2)).run(graph, [list(each) for each in parts])


def equal(before: fx.Graph, after: fx.Graph, *shapes: tuple[int, ...]) -> bool:
    """Whether each of two ranks gets the same numbers, bit for bit."""
    parts = [[torch.randn(shape, dtype=torch.float64) for _ in range(2)] for shape in shapes]
    pairs = zip(on_all_ranks(before, parts), on_all_ranks(after, parts))
    return all(torch.equal(a, b) for first, second in pairs for a, b in zip(first, second))


@pytest.mark.parametrize("lines, name", [(REDUCED, "all_reduce"), (SCATTERED, "reduce_scatter")])
def test_gradients_share_a_bucket_and_keep_their_numbers(lines: str, name: str) -> None:
    before = backward(lines)
    after = bucket_collectives(before)
    assert collectives(backward_of(after)) == [name]
    assert equal(backward_of(before), backward_of(after), (4, 6), (5,), (3, 7))


def test_parameters_are_gathered_together() -> None:
    before = forward(GATHERED, zero=3)
    after = bucket_collectives(before)
    assert collectives(role(after).forward) == ["all_gather"]
    assert equal(role(before).forward, role(after).forward, (4, 3), (3,))


@pytest.mark.parametrize("shape", ["4@dp", "4@dp,2", "1,4@dp", "3@dp,1"])
def test_parameters_of_one_element_a_rank_are_contiguous(shape: str) -> None:
    """Some kernels read the memory of a weight as if it were: group norm mixed up weight and bias."""
    whole = shape.replace("@dp", "")
    dim = shape.split(",").index(next(size for size in shape.split(",") if "@" in size))
    text = f"""
  a = param a : f64[{shape}]
  b = param b : f64[{shape}]
  p = comm.all_gather(a, dp, dim={dim}) : f64[{whole}]
  q = comm.all_gather(b, dp, dim={dim}) : f64[{whole}]
  return one=p, two=q
"""
    program = parse(f"program mesh(dp=4){text}\nforward:{text}\ninference:{text}", Plan(zero=3))
    after = role(bucket_collectives(program)).forward
    assert collectives(after) == ["all_gather"]
    part = [1 if "@" in size else int(size) for size in shape.split(",")]
    given = [[torch.randn(part, dtype=torch.float64) for _ in range(4)] for _ in "ab"]
    found = Lockstep(Mesh(dp=4)).run(after, given)
    expected = [torch.cat(parts, dim).narrow(dim, 0, int(whole.split(",")[dim])) for parts in given]
    for ranks, wanted in zip(found, expected):
        assert all(torch.equal(tensor, wanted) and tensor.is_contiguous() for tensor in ranks)


def test_a_bucket_is_no_larger_than_the_plan_says() -> None:
    limited = bucket_collectives(backward(REDUCED, bucket_mb=240e-6))  # the first two have 232 bytes, all three 400
    assert collectives(backward_of(limited)) == ["all_reduce", "all_reduce"]
    without = backward(REDUCED, bucket_mb=0)
    assert str(bucket_collectives(without)) == str(without)


@pytest.mark.parametrize(
    "old, new, left",
    [
        ("c = saved : f64[3,7]", "c = saved : f32[3,7]", 2),  # another dtype
        ("comm.all_reduce(c, dp)", "comm.all_reduce(c, dp, max)", 2),  # not a sum
        ("return u=p", "s = aten.mul.Tensor(p, 2.0) : f64[4,6]\n  return s=s, u=p", 2),  # backward goes on with it
    ],
    ids=["dtype", "maximum", "used"],
)
def test_what_does_not_fit_keeps_its_own_collective(old: str, new: str, left: int) -> None:
    assert old in REDUCED
    text = REDUCED.replace(old, new)
    if "f32" in new:
        text = text.replace("comm.all_reduce(c, dp) : f64", "comm.all_reduce(c, dp) : f32")
    assert collectives(backward_of(bucket_collectives(backward(text)))) == ["all_reduce"] * left


@pytest.mark.parametrize("dim, left", [(0, 2), (1, 1)])
def test_what_is_large_stays_alone_where_that_needs_no_copies(dim: int, left: int) -> None:
    split = ("400@dp,600", "400,600@dp")[dim]
    lines = f"""
  a = param a : f64[{split}]
  b = param b : f64[{split}]
  p = comm.all_gather(a, dp, dim={dim}) : f64[400,600]
  q = comm.all_gather(b, dp, dim={dim}) : f64[400,600]
  return one=p, two=q
"""
    assert collectives(role(bucket_collectives(forward(lines, zero=3))).forward) == ["all_gather"] * left


@pytest.mark.parametrize("rows, zero, left", [(4, 1, 1), (4, 2, 1), (60_000, 1, 1), (60_000, 2, 2)])
def test_where_whole_gradients_must_not_pile_up_large_blocks_have_buckets_of_their_own(
    rows: int, zero: int, left: int
) -> None:
    """Gradients that are split along dim 1, so that they need copies; 60,000 rows are 1.44 MB."""
    lines = SCATTERED.replace("[4,", f"[{rows},").splitlines()
    for number, line in enumerate(lines):
        if "comm." in line:
            lines[number] += f"  # layers.{int(not line.startswith('  p'))}; a.py:1"
    text = "\n".join(lines)
    text = f"program mesh(dp=2)\n{EMPTY}forward:\n{EMPTY}backward:{text}\n\ninference:\n{EMPTY}"
    program = bucket_collectives(parse(text, Plan(zero=zero), origins=True))
    assert collectives(backward_of(program)) == ["reduce_scatter"] * left


@pytest.mark.parametrize("megabytes, left", [(25, 1), (1, 2)])
def test_large_gradients_share_a_bucket_that_holds_them(megabytes: float, left: int) -> None:
    """1.92 MB each, in even parts of the first dim: below the size of a bucket, no copy is saved that matters."""
    lines = """
  a = saved : f64[400,600]
  b = saved : f64[400,600]
  p = comm.reduce_scatter(a, dp, dim=0) : f64[400@dp,600]
  q = comm.reduce_scatter(b, dp, dim=0) : f64[400@dp,600]
  return u=p, v=q
"""
    program = backward(lines, zero=1, bucket_mb=megabytes)
    before = backward_of(backward(lines))
    after = backward_of(bucket_collectives(program))
    assert collectives(after) == ["reduce_scatter"] * left
    assert equal(before, after, (400, 600), (400, 600))
