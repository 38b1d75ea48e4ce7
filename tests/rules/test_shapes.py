"""Rules of operators whose sizes stand in their arguments, on random shapes; and how lines are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.rules import RULES, rule_for
from autopar.rules.factoring import Call, factoring_of
from autopar.rules.lines import read_rule
from autopar.verification.register_rule import register_rule
from autopar.verification.rule_check import check
from tests.rules.tensors import call, x

aten = torch.ops.aten
FACTORS = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)
quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def holds(target: Any, *args: Any) -> None:
    rule = rule_for(target)
    assert rule is not None
    torch.manual_seed(0)
    for ways in (2, 3):
        check(target, rule, call(*args), ways)


def merged(factors: list[int], cuts: list[bool]) -> list[int]:
    """A shape whose dims are products of neighbouring factors."""
    shape = [1]
    for factor, cut in zip(factors, cuts):
        if cut:
            shape.append(1)
        shape[-1] *= factor
    return shape


@quick
@given(FACTORS, st.lists(st.booleans(), min_size=4, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4))
def test_reshape(factors: list[int], before: list[bool], after: list[bool]) -> None:
    holds(aten.reshape.default, x(*merged(factors, before)), merged(factors, after))


@quick
@given(st.permutations(range(3)), FACTORS)
def test_permute(order: list[int], factors: list[int]) -> None:
    shape = (factors * 3)[:3]
    holds(aten.permute.default, x(*shape), order)


@quick
@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4), st.booleans())
def test_split_and_cat(sizes: list[int], last: bool) -> None:
    dim = 1 if last else 0
    shapes = [(2, size) if last else (size, 2) for size in sizes]
    holds(aten.split_with_sizes.default, x(*((2, sum(sizes)) if last else (sum(sizes), 2))), sizes, dim)
    holds(aten.cat.default, [x(*shape) for shape in shapes], dim)


@quick
@given(st.integers(1, 12), st.integers(0, 11), st.integers(1, 12), st.integers(1, 3))
def test_slice(size: int, start: int, length: int, step: int) -> None:
    holds(aten.slice.Tensor, x(size, 2), 0, start, start + length, step)


@quick
@given(st.sampled_from([1, 2, 6]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 6]))
def test_expand_and_repeat(size: int, copies: int, new: int) -> None:
    holds(aten.expand.default, x(size, 1), [new, size, copies])
    holds(aten.repeat.default, x(size, 2), [new, copies, 1])
    holds(aten.repeat_interleave.self_int, x(size, 2), copies, 0)


@quick
@given(st.lists(st.sampled_from([1, 2, 3, 6]), min_size=1, max_size=3), st.integers(0, 7), st.integers(0, 7))
def test_broadcasting(shape: list[int], left: int, right: int) -> None:
    narrow = [[1 if mask >> i & 1 else size for i, size in enumerate(shape)] for mask in (left, right)]
    holds(aten.mul.Tensor, x(*narrow[0]), x(*narrow[1][right % 2 :]))
    holds(aten.add.Tensor, x(*narrow[0]), x(*narrow[1]))


# ---------------------------------------------------------------- lines


def test_slices_of_a_fused_weight_agree_on_its_split() -> None:
    """q, k and v of a fused projection (12 + 6 + 6 columns) split alike, each by itself."""
    from autopar.ir.layout import Split
    from autopar.rules.segments import slice_dim

    fused = Split(1, ratio=(2, 1, 1))
    for start, stop in ((0, 12), (12, 18), (18, 24)):
        args = (None, 1, start, stop)
        rule = slice_dim(Call(aten.slice.Tensor, args, {}, (), ((3, 24),), ((3, stop - start),)))
        part = rule.part_of(rule.inputs[0], fused, 2)
        assert part is not None
        strategy = rule.strategy(part, 2)
        assert strategy is not None and (strategy.inputs, strategy.outputs) == ((fused,), (Split(1),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b m k, b k n", "expected 'inputs -> outputs'"),
        ("b (m k -> b", r"a '\(' is not closed"),
        ("b m -> b; splits m", "unknown clause 'splits'; there are whole: factors that must not be split;"),
        ("b -> b -> b", "expected 'inputs -> outputs'"),
        ("b m) -> b", r"a '\)' too many"),
        ("b ((m k)) -> b", r"a '\(' too many"),
        ("b (m 1) -> b", "inside brackets stand names of factors, not '1'"),
        ("b 2k -> b", "'2k' is no name of a factor"),
        ("... b ... -> b", r"'\.\.\.' stands twice"),
        ("b k -> b b", "factor 'b' stands twice in 'b b'"),
        ("b (k b) -> k", r"factor 'b' stands twice in 'b \(k b\)'"),
        ("b k -> b; whole m", "'whole m' names no factor; there are b k"),
        ("b k -> b; max b", "'max b', but an output has 'b': it is not combined"),
        ("b k, k -> b; linear 0, 2", "'linear 2' is no operand; they are numbered 0 to 1"),
        ("b k, k -> b; added bias", "'added bias' is no operand"),
    ],
)
def test_a_line_that_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rule(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b -> b", "does not fit a tensor of shape"),
        ("b k, b k -> b k", "has 2 inputs, the call has 1"),
        ("b b -> b b; whole b", "factor 'b' is 4 and 6"),
        ("b k -> b k, b", "has 2 outputs, the call gives 1"),
        ("(h d) k -> d", "does not fit"),
    ],
)
def test_a_line_that_does_not_fit_says_why(text: str, message: str) -> None:
    one = Call(aten.relu.default, (), {}, (), ((4, 6),), ((4, 6),))
    if "2 inputs" in message:
        text, one = "b k -> b k", Call(aten.relu.default, (), {}, (), ((4, 6), (4, 6)), ((4, 6),))
        message = "has 1 inputs, the call has 2"
    with pytest.raises(ValueError, match=message):
        factoring_of(text, one)


def test_a_user_teaches_a_rule() -> None:
    before = dict(RULES)
    try:
        register_rule("aten::cosh", "a b -> a b")
        assert RULES[aten.cosh.default] is not None
        holds(aten.cosh.default, x(6, 4))
        with pytest.raises(ValueError, match="torch knows no operator 'nolib::nothing'"):
            register_rule("nolib::nothing", "a -> a")
    finally:
        RULES.clear()
        RULES.update(before)
