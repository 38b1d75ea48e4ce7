"""What a value is for experts that were not chosen: operator by operator, and where nothing is known."""

from __future__ import annotations

import math

import pytest

from autopar.experts.choices import Number, choices_of
from autopar.experts.digits import EXPERT, TOKEN, has
from autopar.experts.tracked import Tracked, tracked
from autopar.ir.evaluate import known_constants
from autopar.ir.parse import parse
from autopar.ir.program import Program

HEAD = """program mesh()
  w       = param w                                 : f32[4,8]
  x       = input x                                 : f32[6,4]
  h       = input h                                 : f32[6,4,8]
  topk    = aten.topk(x, 2)                         : (f32[6,2], i64[6,2])
  top     = topk[0]                                 : f32[6,2]
  ids     = topk[1]                                 : i64[6,2]
  base    = aten.full([6, 4], {base}, dtype=f32, device=device("cpu"))  : f32[6,4] nograd
  mark    = aten.scatter.src(base, 1, ids, top)     : f32[6,4]
  column  = aten.reshape(mark, [6, 4, 1])           : f32[6,4,1]
"""


def follow(lines: str, base: str = "0") -> Tracked:
    program = parse(HEAD.format(base=base) + lines + "  return y\n")
    assert isinstance(program, Program)
    (chosen,) = choices_of(program)
    return tracked(program, known_constants(program), chosen)


def off_of(lines: str, base: str = "0") -> Number | None:
    found = follow(lines, base)
    (y,) = (node for node in found.offs if node.name == "y")
    places = found.of(y)
    assert places is not None and has(places, EXPERT) and has(places, TOKEN)
    return found.offs[y]


MAP_ZERO_TO_ZERO = [
    "relu", "silu", "gelu", "tanh", "sin", "neg", "abs", "square", "sqrt", "erf", "hardswish", "elu", "leaky_relu",
]  # fmt: skip


@pytest.mark.parametrize("operator", MAP_ZERO_TO_ZERO)
def test_what_maps_zero_to_zero(operator: str) -> None:
    assert off_of(f"  y = aten.{operator}(mark) : f32[6,4]\n") == 0


OTHERS: dict[str, Number] = {"sigmoid": 0.5, "cos": 1, "exp": 1, "softplus": math.log(2), "reciprocal": math.inf}


@pytest.mark.parametrize("operator", OTHERS)
def test_what_does_not(operator: str) -> None:
    assert off_of(f"  y = aten.{operator}(mark) : f32[6,4]\n") == pytest.approx(OTHERS[operator])


CALLS: dict[str, tuple[str, Number | None]] = {  # of mark and h, with the type of the result
    "aten.mul.Tensor(h, column) : f32[6,4,8]": ("0", 0),
    "aten.div.Tensor(column, h) : f32[6,4,8]": ("0", 0),
    "aten.div.Tensor(h, column) : f32[6,4,8]": ("0", None),
    "aten.add.Tensor(h, column) : f32[6,4,8]": ("0", None),
    "aten.add.Tensor(column, column) : f32[6,4,1]": ("0", 0),
    "aten.add.Tensor(mark, 1) : f32[6,4]": ("0", 1),
    "aten.mul.Scalar(mark, 3) : f32[6,4]": ("0", 0),
    "aten.pow.Tensor_Scalar(mark, 0) : f32[6,4]": ("0", 1),
    "aten.clamp(mark, 1, 2) : f32[6,4]": ("0", 1),
    "aten.mul.Tensor(mark, mark) : f32[6,4]": ("-inf", math.inf),
    "aten.mul.Tensor(h, column) : f32[6,4,8] #": ("1", None),
    "aten.exp(mark) : f32[6,4]": ("-inf", 0),
    "aten.sub.Tensor(mark, mark) : f32[6,4]": ("-inf", None),  # NaN
    "aten.softmax.int(mark, 1) : f32[6,4]": ("-inf", 0),
    "aten.softmax.int(mark, 1) : f32[6,4] #": ("0", None),
    "aten.softmax.int(mark, 0) : f32[6,4]": ("-inf", None),
    "aten.transpose.int(mark, 0, 1) : f32[4,6]": ("0", 0),
    'aten.einsum("teh,te->the", [h, mark]) : f32[6,8,4]': ("0", 0),
    "aten.layer_norm(column, [1]) : f32[6,4,1]": ("0", None),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls(call: str) -> None:
    base, wanted = CALLS[call]
    assert off_of(f"  y = {call}\n", base) == wanted


def test_a_sum_over_experts_ends_the_walk_and_one_over_tokens_is_nothing() -> None:
    found = follow('  y = aten.einsum("te,teh->th", [mark, h]) : f32[6,8]\n')
    assert [node.name for node in found.ends] == ["y"] and not found.lost
    found = follow("  y = aten.sum.dim_IntList(mark, [0]) : f32[4]\n")
    assert not found.ends and not found.lost


def test_what_cannot_be_followed_has_a_reason() -> None:
    found = follow("  y = aten.cumsum(mark, 1) : f32[6,4]\n")
    assert {node.name: reason for node, reason in found.lost.items()} == {"y": "experts are not treated each alone"}
    found = follow("  y = aten.select.int(mark, 1, 0) : f32[6]\n")
    assert "by themselves" in next(iter(found.lost.values()))
