"""Fused sums: the same numbers in float64, fewer operators, and the sums that have to stay as they are."""

from __future__ import annotations

import pytest
import torch

from autopar.frontend.numerics import run_graph
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.ir.text import operator_name
from autopar.passes.fuse_arithmetic import NEAR, fuse_arithmetic


def program(inputs: str, *lines: str, result: str = "y") -> Program:
    """A program whose backward graph has ``inputs`` (``a: f64[4,8]; ...``) and ``lines``."""
    given = "".join("  {} = saved : {}\n".format(*entry.split(": ")) for entry in inputs.split("; "))
    body = "".join(f"  {line}\n" for line in lines)
    empty = "  return\n\n"
    return parse(
        f"program mesh()\n{empty}forward:\n{empty}backward:\n{given}{body}  return w={result}\n\ninference:\n{empty}"
    )


def operators(program: Program) -> list[str]:
    assert program.role is not None and program.role.backward is not None
    return [operator_name(node.target) for node in program.role.backward.nodes if node.op == "call_function"]


def same_numbers(before: Program, after: Program, *shapes: tuple[int, ...]) -> bool:
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    results = []
    for each in (before, after):
        assert each.role is not None and each.role.backward is not None
        results += run_graph(each.role.backward, tensors)
    return bool((results[0] - results[1]).abs().max() < 1e-13)


PRODUCT = ("m = aten.mul.Tensor(p, q) : f64[4,8]", "y = aten.add.Tensor(a, m) : f64[4,8]")
THREE = "a: f64[4,8]; p: f64[4,8]; q: f64[4,8]"


def test_a_product_that_is_added() -> None:
    before = program(THREE, *PRODUCT)
    after = fuse_arithmetic(before)
    assert operators(after) == ["aten.addcmul"]
    assert same_numbers(before, after, (4, 8), (4, 8), (4, 8))


def test_numbers_and_expansions_of_factors_become_the_scale() -> None:
    lines = ("d = aten.div.Scalar(e, 8) : f64[4,8]", "t = aten.mul.Scalar(q, 3.0) : f64[4,8]")
    product = ("m = aten.mul.Tensor(d, t) : f64[4,8]", PRODUCT[1])
    before = program("a: f64[4,8]; p: f64[]; q: f64[4,8]", "e = aten.expand(p, [4, 8]) : f64[4,8]", *lines, *product)
    after = fuse_arithmetic(before)
    assert operators(after) == ["aten.addcmul"] and "value=0.375" in str(after)
    assert same_numbers(before, after, (4, 8), (), (4, 8))


@pytest.mark.parametrize("view", [False, True])
def test_two_matrix_products(view: bool) -> None:
    lines = ["m = aten.mm(a, b) : f64[4,8]", "n = aten.mm(c, d) : f64[4,8]"]
    shape, terms = ("[2,2,8]", "u, v") if view else ("[4,8]", "m, n")
    if view:
        lines += ["u = aten.view(m, [2, 2, 8]) : f64[2,2,8]", "v = aten.view(n, [2, 2, 8]) : f64[2,2,8]"]
    inputs = "a: f64[4,3]; b: f64[3,8]; c: f64[4,5]; d: f64[5,8]"
    before = program(inputs, *lines, f"y = aten.add.Tensor({terms}) : f64{shape}")
    after = fuse_arithmetic(before)
    assert operators(after) == ["aten.mm", "aten.addmm", *["aten.view"] * view]
    assert same_numbers(before, after, (4, 3), (3, 8), (4, 5), (5, 8))


def test_gradients_of_two_halves() -> None:
    halves = [
        f"{name} = aten.slice_backward({g}, [4, 8], 1, {start}, {end}, 1) : f64[4,8]"
        for name, g, start, end in (("m", "a", 3, 8), ("n", "b", 0, 3))
    ]
    before = program("a: f64[4,5]; b: f64[4,3]", *halves, "y = aten.add.Tensor(m, n) : f64[4,8]")
    after = fuse_arithmetic(before)
    assert operators(after) == ["aten.cat"]
    assert same_numbers(before, after, (4, 5), (4, 3))


def test_parts_with_a_gap_between_them_stay() -> None:
    halves = [
        f"{name} = aten.slice_backward({g}, [4, 8], 1, {start}, {end}, 1) : f64[4,8]"
        for name, g, start, end in (("m", "a", 0, 3), ("n", "b", 4, 8))
    ]
    before = program("a: f64[4,3]; b: f64[4,4]", *halves, "y = aten.add.Tensor(m, n) : f64[4,8]")
    assert str(fuse_arithmetic(before)) == str(before)


@pytest.mark.parametrize(
    "inputs, lines",
    {
        "the product is used twice": (THREE, (*PRODUCT, "z = aten.mul.Tensor(y, m) : f64[4,8]")),
        "the product comes first": (THREE, (PRODUCT[0], "y = aten.add.Tensor(m, a) : f64[4,8]")),
        "a sum with a factor": (THREE, (PRODUCT[0], "y = aten.add.Tensor(a, m, alpha=2) : f64[4,8]")),
        "whole numbers": (THREE.replace("f64", "i64"), tuple(line.replace("f64", "i64") for line in PRODUCT)),
        "another dtype": (THREE.replace("a: f64", "a: f32"), PRODUCT),
        "what is added is broadcast": (THREE.replace("a: f64[4,8]", "a: f64[8]"), PRODUCT),
        "far away": (
            THREE,
            (PRODUCT[0], *(f"r{i} = aten.exp({f'r{i - 1}' if i else 'a'}) : f64[4,8]" for i in range(NEAR)))
            + (f"y = aten.add.Tensor(r{NEAR - 1}, m) : f64[4,8]",),
        ),
    }.values(),
    ids=lambda entry: None,
)
def test_sums_that_stay(inputs: str, lines: tuple[str, ...]) -> None:
    before = program(inputs, *lines, result=lines[-1].split(" ")[0])
    assert str(fuse_arithmetic(before)) == str(before)
