"""Wrong rules that the checker must catch, each in the way that such a rule goes wrong in a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from autopar.errors import WrongRuleError
from autopar.rules import RULES, Rule, rule_for
from autopar.rules.factoring import Call, Factoring, factoring_of
from autopar.rules.pointwise import broadcast
from autopar.verification.rule_check import Sample, check
from tests.rules.samples import samples_of
from tests.rules.tensors import call, ints, x

aten = torch.ops.aten


def line(text: str) -> Rule:
    return lambda call: factoring_of(text, call)


def changed(target: Any, **fields: Any) -> Rule:
    """The right rule of an operator with some fields of its factoring replaced."""
    right = rule_for(target)
    assert right is not None
    return lambda call: replace(right(call), **fields)


def partial_maximum(call: Call) -> Factoring:
    factoring = RULES[aten.amax.default](call)
    return replace(factoring, whole=frozenset(), reduce=dict.fromkeys(factoring.sizes, "max"))


inner_factor = Factoring(
    ((("c", "a"), ("b",)),),
    ((("d", "c"), ("e",)),),
    {"c": 2, "a": 3, "b": 4, "d": 2, "e": 6},
    whole=frozenset("abde"),
)

PLANTED: dict[str, tuple[Any, Rule, Sample]] = {
    "the summed dim of linear as a batch dim": (aten.linear.default, line("m k, n k -> m k"), call(x(3, 6), x(6, 6))),
    "softmax along its own dim": (aten.softmax.int, line("... n -> ... n"), call(x(3, 6), -1)),
    "a bias added on every rank": (
        aten.linear.default,
        line("... k, n k, n -> ... n; linear 0 2, 1 2"),
        call(x(3, 6), x(4, 6), x(4)),
    ),
    "a pending sum through softmax": (
        aten.softmax.int,
        changed(aten.softmax.int, linear=(frozenset({0}),)),
        call(x(6, 5), -1),
    ),
    "a pending sum through relu": (
        aten.relu.default,
        changed(aten.relu.default, linear=(frozenset({0}),)),
        call(x(5, 5)),
    ),
    "a pending sum plus one": (aten.add.Tensor, changed(aten.add.Tensor, linear=(frozenset({0}),)), call(x(5, 5), 1.0)),
    "two pending sums multiplied": (
        aten.mul.Tensor,
        changed(aten.mul.Tensor, linear=(frozenset({0, 1}),)),
        call(x(5, 5), x(5, 5)),
    ),
    "a mean that is not shared": (aten.mean.dim, changed(aten.mean.dim, rewrites={}), call(x(6, 5), [0])),
    "sizes of a reshape that are not cut": (
        aten.reshape.default,
        changed(aten.reshape.default, localize=None),
        call(x(6, 5), [2, 3, 5]),
    ),
    "rows of a table looked up by their global number": (
        aten.embedding.default,
        changed(aten.embedding.default, rewrites={}),
        call(x(6, 4), ints(2, 5)),
    ),
    "rows of a table in two blocks": (
        aten.embedding.default,
        changed(aten.embedding.default, plain=frozenset()),
        call(x(12, 4), ints(12, 5)),
    ),
    "keys of attention split": (
        aten.scaled_dot_product_attention.default,
        changed(aten.scaled_dot_product_attention.default, whole=frozenset()),
        call(x(1, 1, 5, 5), x(1, 1, 6, 5), x(1, 1, 6, 5)),
    ),
    "the normalised dim split": (
        aten.layer_norm.default,
        changed(aten.layer_norm.default, whole=frozenset()),
        call(x(5, 6), [6]),
    ),
    "the square root of padding": (
        aten.sqrt.default,
        changed(aten.sqrt.default, uneven=frozenset({"d1"})),
        call(x(5).abs()),
    ),
    "padding of two activations multiplied": (
        aten.linear.default,
        line("m k, n k -> m n; uneven k"),
        call(x(4, 5), x(4, 5)),
    ),
    "a maximum whose gradient goes to every rank": (aten.amax.default, partial_maximum, call(x(6, 5), [0])),
    "norms of parts that are added": (
        aten.linalg_vector_norm.default,
        changed(aten.linalg_vector_norm.default, rewrites={}, reduce={}),
        call(x(6, 4), 2, [1]),
    ),
    "the rank's own product for that of all": (aten.prod.default, changed(aten.prod.default, rewrites={}), call(x(12))),
    "flags of which each rank has its own": (
        aten.all.dim,
        changed(aten.all.dim, rewrites={}),
        call(torch.tensor([[True, True, True, False]] * 2), 1),
    ),
    "rows of a matrix that is inverted": (
        aten.linalg_inv.default,
        line("... n m -> ... n m; whole m"),
        call(x(2, 6, 6)),
    ),
    "a batch of matrices with a batch of right sides one dim off": (
        aten._linalg_solve_ex.default,
        line("b n m, b n -> b n, b n m, b n, b; whole m"),
        call(x(6, 6, 6), x(6, 6)),
    ),
    "the transformed dim of a Fourier transform": (
        aten._fft_c2c.default,
        changed(aten._fft_c2c.default, whole=frozenset(), sizes={"d0": 6, "d1": 4}),
        call(torch.complex(x(6, 4), x(6, 4)), [1], 0, True),
    ),
    "a window that is split with its signals": (
        aten.stft.default,
        line("b t, b -> b f n; whole t f n"),
        call(x(6, 24), 6, None, None, x(6), False, None, True),
    ),
    "slices of a norm over all other dims": (
        aten.renorm.default,
        changed(aten.renorm.default, whole=frozenset()),
        call(x(6, 4), 2, 0, 0.5),
    ),
    "sizes of a grid that are not cut": (
        aten.affine_grid_generator.default,
        changed(aten.affine_grid_generator.default, localize=None),
        call(x(6, 2, 3), [6, 1, 3, 2], False),
    ),
    "maxima of writes that are added": (
        aten.index_reduce.default,
        changed(aten.index_reduce.default, whole=frozenset({"d0"})),
        call(x(6, 4), 0, ints(6, 6), x(6, 4), "amax"),
    ),
    "an outermost factor that two shapes do not share": (
        aten.reshape.default,
        lambda call: inner_factor,
        call(x(6, 4), [4, 6]),
    ),
    "an index that is split with its table": (
        aten.index_select.default,
        line("n k, n -> n k"),
        call(x(6, 5), 0, torch.randperm(6)),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_rule_is_caught(name: str) -> None:
    target, rule, sample = PLANTED[name]
    torch.manual_seed(0)
    with pytest.raises(WrongRuleError):
        for ways in (2, 3):
            check(target, rule, sample, ways)


def test_the_message_names_operator_shapes_and_strategy() -> None:
    target, rule, sample = PLANTED["a bias added on every rank"]
    found = r"(?s)aten.linear.default is wrong: 'k' over 2 ranks.*\(\(3, 6\), .* -> P\n.*output 0: off by"
    with pytest.raises(WrongRuleError, match=found):
        check(target, rule, sample, 2)


def test_a_rule_without_a_sample_is_named() -> None:
    with pytest.raises(LookupError, match="no sample for aten.lu_solve.default: add one in tests/rules/samples.py"):
        samples_of(torch.ops.aten.lu_solve.default)
    assert rule_for(aten.exp.default) is broadcast and samples_of(aten.exp.default)
