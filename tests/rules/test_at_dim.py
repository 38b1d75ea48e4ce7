"""Lines that stand at one dim, on shapes that the samples do not have; the operators themselves are in test_rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autopar.rules import RULES
from autopar.rules.at_dim import at_dim, at_end
from autopar.rules.factoring import Call, Factoring, Shape

aten = torch.ops.aten


def call(target: Any, args: tuple[Any, ...], inputs: list[Shape], outputs: list[Shape]) -> Call:
    return Call(target, args, {}, (), tuple(inputs), tuple(outputs))


def shown(found: Factoring) -> str:
    """``"d0 gone d2 -> d0 d2"``; a dim of size 1 has no factor and is written 1."""

    def side(tensors: tuple[Any, ...]) -> str:
        return ", ".join(" ".join(_dim(factors) for factors in dims) for dims in tensors)

    return f"{side(found.inputs)} -> {side(found.outputs)}"


def _dim(factors: tuple[str, ...]) -> str:
    return " ".join(factors) if len(factors) == 1 else f"({' '.join(factors)})" if factors else "1"


@pytest.mark.parametrize(
    ("target", "args", "inputs", "outputs", "factoring"),
    [
        (aten.select.int, (None, 1, 0), [(4, 3, 6)], [(4, 6)], "d0 gone d2 -> d0 d2"),
        (aten.select.int, (None, -3, 0), [(4, 3, 6)], [(3, 6)], "gone d1 d2 -> d1 d2"),
        (aten.select.int, (None, 0, 0), [(4,)], [()], "gone -> "),
        (aten.unbind.int, (None,), [(2, 6)], [(6,), (6,)], "gone d1 -> d1, d1"),
        (aten.unbind.int, (None,), [(2,)], [(), ()], "gone -> , "),
        (aten.stack.default, (None, -1), [(4, 6), (4, 6)], [(4, 6, 2)], "d0 d1, d0 d1 -> d0 d1 new"),
        (aten.stack.default, (None,), [(), ()], [(2,)], ",  -> new"),
        (aten.stack.default, (None,), [()], [(1,)], " -> 1"),
        (aten.glu.default, (None,), [(4, 6)], [(4, 3)], "d0 (half d) -> d0 d"),
        (aten.glu.default, (None, 0), [(2, 6)], [(1, 6)], "(half d) d1 -> 1 d1"),
        (aten.unfold.default, (None, 0, 2, 2), [(8, 6)], [(4, 6, 2)], "along d1 -> windows d1 inside"),
        (aten.view_as_real.default, (None,), [()], [(2,)], " -> parts"),
        (aten.view_as_complex.default, (None,), [(4, 2)], [(4,)], "d0 parts -> d0"),
        (aten.tril.default, (None,), [(4, 3, 3)], [(4, 3, 3)], "d0 row column -> d0 row column"),
        (aten.one_hot.default, (None, 5), [(4, 1)], [(4, 1, 5)], "d0 1 -> d0 1 classes"),
    ],
)
def test_a_line_at_a_dim(
    target: Any, args: tuple[Any, ...], inputs: list[Shape], outputs: list[Shape], factoring: str
) -> None:
    found = RULES[target](call(target, args, inputs, outputs))
    assert shown(found) == factoring
    assert all(name == "d" or name[1:].isdigit() for name in found.factors), "what the line names whole is not split"


def test_linear_is_all_operands_together() -> None:
    sample = call(aten.stack.default, (None,), [(4,), (4,)], [(2, 4)])
    assert at_dim("dim", " -> new", linear=True)(sample).linear == (frozenset({0, 1}),)
    assert at_dim("dim", " -> new")(sample).linear == ()


def test_a_line_that_does_not_fit_the_shapes_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit a tensor of shape"):
        at_end("parts -> ")(call(aten.view_as_complex.default, (None,), [(4, 2)], [(4, 2)]))
