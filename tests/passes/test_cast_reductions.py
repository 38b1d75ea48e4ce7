"""Gradients summed in another dtype: which sums, where casts go, and that nothing else is touched."""

from __future__ import annotations

import pytest

from autopar.ir.parse import parse
from autopar.passes.bucket_collectives import bucket_collectives
from autopar.passes.cast_reductions import cast_reductions
from autopar.plan import Plan
from autopar.precision import Precision
from tests.conftest import Golden

BACKWARD = """
program mesh(dp=2 tp=2)
  w = param w                  : f32[8@dp,4]
  v = param v                  : f32[4]
  s = param s                  : bf16[4]
  x = input                    : f32[8@dp,4]
  return out=x

forward:
  w = param w                  : f32[8@dp,4]
  v = param v                  : f32[4]
  s = param s                  : bf16[4]
  x = input                    : f32[8@dp,4]
  return out=x

backward:
  a = grad out                 : bf16[8,4]
  b = aten.sum.dim_IntList(a, [0]) : bf16[4]
  e = comm.all_reduce(a, tp)   : bf16[8,4]
  f = aten.mul.Tensor(e, e)    : bf16[8,4]
  r = comm.reduce_scatter(f, dp, dim=0) : bf16[8@dp,4]
  t = aten._to_copy(r, dtype=f32) : f32[8@dp,4]
  h = comm.all_reduce(b, tp)   : bf16[4]
  i = comm.all_reduce(h, dp)   : bf16[4]
  j = aten._to_copy(i, dtype=f32) : f32[4]
  k = comm.all_reduce(b, dp)   : bf16[4]
  return w=t, v=j, s=k

inference:
  w = param w                  : f32[8@dp,4]
  v = param v                  : f32[4]
  s = param s                  : bf16[4]
  x = input                    : f32[8@dp,4]
  return out=x
"""


def test_reductions(golden: Golden) -> None:
    """Those of gradients are in float32, that of an activation is not."""
    golden("cast_reductions", cast_reductions(parse(BACKWARD, Plan(precision=Precision(reduce="f32")))))


def test_a_cast_after_a_reduction_goes_into_the_bucket() -> None:
    text = BACKWARD.replace("s=k", "s=l").replace(
        "  return w", "  l = aten._to_copy(k, dtype=f32) : f32[4]\n  return w"
    )
    text = text.replace("comm.all_reduce(h, dp)", "comm.all_reduce(b, dp)").replace("  h =", "#  h =")
    backward = bucket_collectives(parse(text)).required_role.backward
    assert backward is not None
    counts = [str(node.target) for node in backward.nodes if node.op == "call_function"]
    assert counts.count("autopar.all_reduce.default") == 2, "of the activation, and both vectors together"
    assert counts.count("aten._to_copy.default") == 2


def test_without_a_wish_nothing_is_cast() -> None:
    program = parse(BACKWARD)
    assert str(cast_reductions(program)) == str(program)


@pytest.mark.parametrize("target", ["v", "other"])
def test_only_gradients_of_parameters_are_summed_in_it(target: str) -> None:
    """A gradient of something else (of an input, or of what another stage has sent) keeps its dtype."""
    text = BACKWARD.replace("w=t, v=j, s=k", f"{target}=j").replace("  v = param v                  : f32[4]\n", "")
    text = text.replace("  s = param s                  : bf16[4]\n", "  p = param v : f32[4]\n")
    after = cast_reductions(parse(text, Plan(precision=Precision(reduce="f32"))))
    reduced = [line for line in str(after).splitlines() if line.startswith("  i ")]
    assert reduced[0].endswith(": f32[4]" if target == "v" else ": bf16[4]")
