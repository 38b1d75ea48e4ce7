"""Write dropout as a mask drawn from the position of each element, so that any mesh draws the same; noise likewise.

before:
  x     = input                      : f32[8,4]
  y     = aten.dropout(x, 0.1, True) : f32[8,4]
  noise = aten.uniform(x, 0.9, 1.1)  : f32[8,4]
  return y, noise
after:
  c_0_to_4       = const 0_to_4                                                  : i64[4]
  c_0_to_8       = const 0_to_8                                                  : i64[8]
  x              = input                                                         : f32[8,4]
  seed           = seed                                                          : i64[]
  random_keep    = op.random_keep(seed, 0, 0.1, c_0_to_8, c_0_to_4)              : bool[8,4]
  mul            = aten.mul.Tensor(x, 1.1111111111111112)                        : f32[8,4]
  where          = aten.where.ScalarOther(random_keep, mul, 0.0)                 : f32[8,4]
  random_uniform = op.random_uniform(seed, 1, 0.9, 1.1, f32, c_0_to_8, c_0_to_4) : f32[8,4]
  return where, random_uniform

Attention with dropout is written out (scores, softmax, dropout, product), since its mask is inside the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar import operators
from autopar.errors import AutoparError
from autopar.ir.builder import Builder
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import nothing_is_placed
from autopar.ir.layout import Layout
from autopar.ir.node import Origin, Value, origin, set_values, value
from autopar.ir.program import Program
from autopar.ir.rewrite import add_constants, substitute
from autopar.ir.tables import Input, InputKind

aten = torch.ops.aten

Draw = Callable[[fx.Node, fx.Node, int, list[fx.Node]], None]  # (what draws, seed, salt, positions of each dim)


@graph_pass(requires=(nothing_is_placed,))
def draw_dropout(program: Program) -> Program:
    graph = program.graph
    attentions = [n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default and _p(n) > 0]
    for node in attentions:
        program = _write_out(program, node)
    drawn = [n for n in graph.nodes if n.target in DRAWN]
    if not drawn:
        return program
    sizes = {size for node in drawn for size in value(node).shape}
    ranges = {f"0_to_{size}": (torch.arange(size), Origin()) for size in sorted(sizes)}
    program, positions = add_constants(program, ranges)
    program, seed = _add_seed(program)
    for salt, node in enumerate(drawn):
        if not value(node).shape:
            raise AutoparError(f"{node.target} of a single number at {origin(node).source} is not supported")
        DRAWN[node.target](node, seed, salt, [positions[f"0_to_{size}"] for size in value(node).shape])
    return program


def _p(node: fx.Node) -> float:
    given: Any = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return float(given)


def _add_seed(program: Program) -> tuple[Program, fx.Node]:
    first = next(node for node in program.graph.nodes if node.op != "placeholder")
    with program.graph.inserting_before(first):
        seed = program.graph.placeholder("seed")
    set_values(seed, Value(torch.int64, Layout(())))
    entry = Input(seed.name, InputKind.SEED, seed.name)
    return replace(program, inputs=(*program.inputs, entry)), seed


def _dropout(node: fx.Node, seed: fx.Node, salt: int, positions: list[fx.Node]) -> None:
    x, p = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(p, float)
    if p >= 1.0:
        raise AutoparError(f"dropout with p={p} at {origin(node).source} is not supported")
    op = Builder(before=node)
    keep = op(operators.random_keep, seed, salt, p, *positions)
    substitute(node, op(aten.where.ScalarOther, keep, op(aten.mul.Tensor, x, 1.0 / (1.0 - p)), 0.0))


def _uniform(node: fx.Node, seed: fx.Node, salt: int, positions: list[fx.Node]) -> None:
    """``uniform(x, low, high)`` or ``rand_like(x)``, which use only the shape and the dtype of x."""
    bounds = (*node.args[1:], *(0.0, 1.0)[len(node.args) - 1 :])
    op = Builder(before=node)
    substitute(node, op(operators.random_uniform, seed, salt, *bounds, value(node).dtype, *positions))


def _exponential(node: fx.Node, seed: fx.Node, salt: int, positions: list[fx.Node]) -> None:
    """``exponential(x, rate)``: minus the logarithm of uniform numbers, which are neither 0 nor 1, over the rate."""
    rate = float(node.args[1]) if len(node.args) > 1 else 1.0  # type: ignore[arg-type]
    op = Builder(before=node)
    drawn = op(operators.random_uniform, seed, salt, 2.0**-32, 1.0, torch.float64, *positions)
    found = op(aten.mul.Tensor, op(aten.log.default, drawn), -1 / rate)
    substitute(node, op(aten._to_copy.default, found, dtype=value(node).dtype))


def _standard_uniform(node: fx.Node, seed: fx.Node, salt: int, positions: list[fx.Node]) -> None:
    op = Builder(before=node)
    substitute(node, op(operators.random_uniform, seed, salt, 0.0, 1.0, value(node).dtype, *positions))


def _normal(mean: int | None, deviation: int | None) -> Draw:
    """Two uniform numbers for each normal one (Box and Muller, 1958); where its arguments say mean and deviation."""

    def draw(node: fx.Node, seed: fx.Node, salt: int, positions: list[fx.Node]) -> None:
        op = Builder(before=node)
        radius = op(operators.random_uniform, seed, 2 * salt, 2.0**-32, 1.0, torch.float64, *positions)
        angle = op(operators.random_uniform, seed, -2 * salt - 1, 0.0, 2 * math.pi, torch.float64, *positions)
        radius = op(aten.sqrt.default, op(aten.mul.Tensor, op(aten.log.default, radius), -2.0))
        found = op(aten.mul.Tensor, radius, op(aten.cos.default, angle))
        found = op(aten._to_copy.default, found, dtype=value(node).dtype)
        for place, combine, neutral in ((deviation, aten.mul.Tensor, 1.0), (mean, aten.add.Tensor, 0.0)):
            if place is not None and len(node.args) > place and node.args[place] != neutral:
                found = op(combine, found, node.args[place])
        substitute(node, found)

    return draw


def _integers(bounds: int) -> Draw:
    """From ``low`` (0 where there is none) to below ``high``; ``bounds``: the place of the first of them."""

    def draw(node: fx.Node, seed: fx.Node, salt: int, positions: list[fx.Node]) -> None:
        given: Any = [arg for arg in node.args[bounds:] if isinstance(arg, int)]
        low, high = given if len(given) > 1 else (0, *given)
        op = Builder(before=node)
        drawn = op(operators.random_uniform, seed, salt, float(low), float(high), torch.float64, *positions)
        substitute(node, op(aten._to_copy.default, op(aten.floor.default, drawn), dtype=value(node).dtype))

    return draw


def _coins(node: fx.Node, seed: fx.Node, salt: int, positions: list[fx.Node]) -> None:
    """``bernoulli(p)`` of a tensor of probabilities, or ``bernoulli(x, p)`` with one of them."""
    op = Builder(before=node)
    drawn = op(operators.random_uniform, seed, salt, 0.0, 1.0, torch.float64, *positions)
    kept = op(aten.lt.Scalar, drawn, node.args[1]) if len(node.args) > 1 else op(aten.lt.Tensor, drawn, node.args[0])
    substitute(node, op(aten._to_copy.default, kept, dtype=value(node).dtype))


DRAWN: dict[Any, Draw] = {
    aten.dropout.default: _dropout,
    aten.uniform.default: _uniform,
    aten.rand_like.default: _uniform,
    aten.rand.default: _standard_uniform,
    aten.exponential.default: _exponential,
    aten.randn.default: _normal(None, None),
    aten.randn_like.default: _normal(None, None),
    aten.normal.float_float: _normal(0, 1),
    aten.normal.Tensor_float: _normal(0, 1),
    aten.normal.float_Tensor: _normal(0, 1),
    aten.normal.Tensor_Tensor: _normal(0, 1),
    aten.normal_functional.default: _normal(1, 2),
    aten.randint.default: _integers(0),
    aten.randint.low: _integers(0),
    aten.randint_like.default: _integers(1),
    aten.randint_like.low_dtype: _integers(1),
    aten.bernoulli.default: _coins,
    aten.bernoulli.p: _coins,
}


def _write_out(program: Program, node: fx.Node) -> Program:
    """softmax(q k^T * scale + mask), dropout, times v."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {"attn_mask": None, "is_causal": False, **dict(zip(names, node.args)), **node.kwargs}
    query, key, held = given["query"], given["key"], given["value"]
    if given.get("enable_gqa"):
        raise AutoparError(f"attention dropout together with enable_gqa at {origin(node).source} is not supported")
    q, k = value(query), value(key)
    scale = given.get("scale") or 1.0 / math.sqrt(q.shape[-1])
    mask = given["attn_mask"]
    if given["is_causal"]:
        lower = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        program, found = add_constants(program, {f"causal_{node.name}": (lower, origin(node))})
        mask = found[f"causal_{node.name}"]
    op = Builder(before=node)
    turned = op(aten.transpose.int, key, -2, -1)
    scores = op(aten.matmul.default, op(aten.mul.Tensor, query, scale), turned)
    if mask is not None and value(mask).dtype == torch.bool:
        scores = op(aten.where.ScalarOther, mask, scores, -math.inf)
    elif mask is not None:
        scores = op(aten.add.Tensor, scores, mask)
    weights = op(aten.dropout.default, op(aten.softmax.int, scores, -1), float(given["dropout_p"]), True)
    substitute(node, op(aten.matmul.default, weights, held))
    return program
