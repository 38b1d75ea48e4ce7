"""Matrix products, einsum, embeddings and attention: where weights are split."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from autopar import operators
from autopar.ir.node import Node, value
from autopar.operators.experts import EXPERT_LINEAR
from autopar.rules.factoring import ANY_SIZE, Call, Dims, Emit, Factoring, Shape, dims_of, factoring_of
from autopar.rules.pointwise import broadcast_dims

aten = torch.ops.aten


def linear(call: Call) -> Factoring:
    line = "... k, n k, n -> ... n; linear 0 2, 1 2; added 2; uneven n k; contraction"
    factoring = factoring_of(line, call)
    # padding is zero in a parameter and arbitrary elsewhere: zero times any finite number adds nothing
    return factoring if call.parameters[1:2] == (True,) else replace(factoring, uneven=frozenset())


def experts(call: Call) -> Factoring:
    """Rows times the matrix of the expert to which each was sent; a row may be sent to several experts (``k``)."""
    factoring = factoring_of("t i, e i o, (t k) -> (t k) o; whole e; linear 0, 1; uneven i o; contraction", call)
    work = call.inputs[2][0] * math.prod(call.inputs[1][1:])
    return replace(factoring, work=work, uneven=factoring.uneven if call.parameters[1] else frozenset())


def matmul(call: Call) -> Factoring:
    """``a @ b`` with broadcasting of the leading dims; vectors are treated as in torch.matmul."""
    a, b = call.inputs
    out = call.outputs[0]
    sizes: dict[str, int] = {"k": a[-1]}
    left: Dims = (("k",),) if a[-1] != 1 else ((),)
    right: Dims = left
    tail: Dims = ()
    if len(a) > 1:
        sizes["m"] = a[-2]
        left = ((("m",) if a[-2] != 1 else ()), *left)
        tail = (left[0],)
    if len(b) > 1:
        sizes["n"] = b[-1]
        right = (right[0], ("n",) if b[-1] != 1 else ())
        tail = (*tail, right[1])
    batch = out[: len(out) - len(tail)]
    for shape in (a[:-2], b[:-2], batch):
        sizes |= {f"d{len(shape) - i}": size for i, size in enumerate(shape) if size != 1}
    return Factoring(
        ((*broadcast_dims(a[:-2]), *left), (*broadcast_dims(b[:-2]), *right)),
        ((*broadcast_dims(batch), *tail),),
        sizes,
        linear=(frozenset({0}), frozenset({1})),
        contraction=True,
    )


def plus_product(line: str) -> Any:
    """Rule for ``beta * c + alpha * (a @ b)``: c is broadcast to the result."""

    def rule(call: Call) -> Factoring:
        product = replace(call, inputs=call.inputs[1:])
        factoring = factoring_of(f"{line}; contraction", product)
        shape, (result,) = call.inputs[0], factoring.outputs
        aligned = result[len(result) - len(shape) :]
        summand = tuple(factors if size != 1 else () for factors, size in zip(aligned, shape))
        both = (frozenset({0, 1}), frozenset({0, 2}))
        return replace(factoring, inputs=(summand, *factoring.inputs), linear=both, added=frozenset({0}))

    return rule


def einsum(call: Call) -> Factoring:
    """``einsum("b i d, b j d -> b i j", [x, y])``: the equation is the rule."""
    terms, result = _equation(call)
    sizes: dict[str, int] = {}
    for names, shape in zip(terms, call.inputs):
        for name, size in zip(names, shape):
            sizes[name] = max(size, sizes.get(name, 1))

    def dims(names: list[str], shape: Shape) -> Dims:
        return tuple((name,) if size != 1 else () for name, size in zip(names, shape))

    whole = frozenset(name for names in terms for name in names if names.count(name) > 1)  # a diagonal
    return Factoring(
        tuple(map(dims, terms, call.inputs)),
        (dims(result, call.outputs[0]),),
        sizes,
        whole=whole,
        linear=tuple(frozenset({i}) for i in range(len(terms))),
        contraction=len(terms) > 1,
    )


def _equation(call: Call) -> tuple[list[list[str]], list[str]]:
    """The names of the dims of each operand and of the result; those of an ellipsis are numbered from the right."""
    left, arrow, right = str(call.args[0]).replace(" ", "").partition("->")
    terms = []
    most = 0
    for text, shape in zip(left.split(","), call.inputs):
        before, dots, after = text.partition("...")
        extra = len(shape) - len(before) - len(after)
        most = max(most, extra)
        terms.append([*before, *[f"d{extra - i}" for i in range(extra)], *after])
    every = [f"d{most - i}" for i in range(most)]
    if not arrow:
        letters = sorted(name for names in terms for name in names if len(name) == 1)
        return terms, [*every, *(name for name in letters if letters.count(name) == 1)]
    before, dots, after = right.partition("...")
    return terms, [*before, *(every if dots else []), *after]


def embedding(call: Call) -> Factoring:
    """Rows of a table. Split by rows, a rank looks up the rows that it has and gives zeros for the others."""
    table, ids = call.inputs
    tokens, sizes = dims_of(ids, "t")
    sizes |= {"v": table[0], "h": table[1]}
    work = math.prod(call.outputs[0])
    factoring = Factoring(((("v",), ("h",)), tokens), ((*tokens, ("h",)),), sizes, contraction=True, work=work)
    if call.argument(3, "scale_grad_by_freq", False):  # how often a row is used, is known only to all ranks together
        return replace(factoring, whole=frozenset(sizes) - {"h"})
    return replace(
        factoring,
        linear=(frozenset({0}),),
        uneven=frozenset({"v"}),
        plain=frozenset({"v"}),
        rewrites={"v": _look_up_own_rows},
    )


def _look_up_own_rows(emit: Emit, node: Node, axis: str, ways: int) -> Node:
    rank = emit.axis_index(axis)
    padding = node.args[2] if len(node.args) > 2 else node.kwargs.get("padding_idx", -1)
    table = node.args[0]
    assert isinstance(table, Node)
    arguments = (*node.args[:2], rank, padding, value(table).shape[0])
    return emit(operators.embedding_rows, arguments, emit.partial(value(node), axis))


def bag(call: Call) -> Factoring:
    """``embedding_bag``: the columns of the table may be split; no rank alone knows where a bag begins."""
    sizes = {"h": call.inputs[0][1]}
    inputs: list[Dims] = [(("rows",), ("h",))]
    inputs += [tuple((f"in{k}_{i}",) for i in range(len(s))) for k, s in enumerate(call.inputs[1:])]
    outputs: list[Dims] = [(("bags",), ("h",))]
    outputs += [tuple((f"out{k}_{i}",) for i in range(len(s))) for k, s in enumerate(call.outputs[1:])]
    names = frozenset(f for tensor in (*inputs, *outputs) for dim in tensor for f in dim) - {"h"}
    if int(call.argument(4, "mode", 0)) == 2:  # of a maximum, the last output tells each column's place
        names |= {"h"}
    sizes |= dict.fromkeys(names, ANY_SIZE)
    same = {"h": "whole"}  # the further outputs, where the bags begin, are the same on every rank
    return Factoring(tuple(inputs), tuple(outputs), sizes, reduce=same, whole=names, contraction=True)


def attention(call: Call) -> Factoring:
    """``softmax(q k^T + mask) v``: batch and heads may be split; K/V heads may be fewer than query heads (GQA)."""
    query, key, held = call.inputs[:3]
    rank = len(query)
    sizes = {"s": query[-2], "t": key[-2], "e": query[-1], "f": held[-1]}
    sizes |= {f"b{rank - i}": max(shape[i] for shape in call.inputs[:3]) for i in range(rank - 3)}
    if rank > 2:
        sizes |= {"h": key[-3], "g": query[-3] // key[-3]}

    def lead(shape: Shape, heads: tuple[str, ...]) -> Dims:
        batch = tuple((f"b{rank - i}",) if size != 1 else () for i, size in enumerate(shape[: rank - 3]))
        return (*batch, tuple(f for f in heads if sizes[f] != 1)) if rank > 2 else ()

    grouped, single = lead(query, ("h", "g")), lead(key, ("h",))
    inputs: list[Dims] = [
        (*grouped, ("s",), ("e",)),
        (*single, ("t",), ("e",)),
        (*lead(held, ("h",)), ("t",), ("f",)),
    ]
    batches = tuple(max(shape[i] for shape in call.inputs[:3]) for i in range(max(rank - 2, 0)))
    full = lead((*batches, 0, 0), ("h", "g"))
    if len(call.inputs) > 3:
        inputs.append(_mask_dims(call.inputs[3], full))
    whole = frozenset({"s", "t", "e", "f"})
    work = math.prod(call.outputs[0][:-1]) * key[-2] * (query[-1] + held[-1])  # scores, and values weighted by them
    return Factoring(tuple(inputs), ((*full, ("s",), ("f",)),), sizes, whole=whole, contraction=True, work=work)


def masked_attention(call: Call) -> Factoring:
    """Attention under a formula: its vectors (..., positions) are split with the batch, never along the positions."""
    return _with_vectors(call, 3 if call.args[3] is None else 4)


def part_of_attention(call: Call) -> Factoring:
    """Attention of one part of a sequence: as of the whole, with the rank behind the vectors."""
    has_bias = call.target is not operators.hybrid_attention and call.args[3] is not None
    found = _with_vectors(replace(call, inputs=call.inputs[:-1]), 4 if has_bias else 3)
    return replace(found, inputs=(*found.inputs, ()))


def _with_vectors(call: Call, operands: int) -> Factoring:
    found = attention(replace(call, inputs=call.inputs[:operands]))
    lead = found.outputs[0][:-2]
    batch = lead[:-1] if len(lead) > 1 else lead
    vectors = [
        (*(factors if size != 1 else () for factors, size in zip(batch[len(batch) - len(shape) + 1 :], shape)), ("p",))
        for shape in call.inputs[operands:]
    ]
    sizes, whole = {**found.sizes, "p": ANY_SIZE}, found.whole | {"p"}
    return replace(found, inputs=(*found.inputs, *vectors), sizes=sizes, whole=whole)


def _mask_dims(mask: Shape, lead: Dims) -> Dims:
    """The mask is (..., queries, keys); its leading dims are those of the query, or 1."""
    aligned = lead[len(lead) - (len(mask) - 2) :] if len(mask) > 2 else ()
    named = tuple(factors if size != 1 else () for factors, size in zip(aligned, mask))
    return (*named, *((name,) if size != 1 else () for name, size in zip(("s", "t"), mask[-2:])))


RULES: dict[Any, Any] = {
    aten.linear.default: linear,
    EXPERT_LINEAR: experts,
    aten.mm.default: "m k, k n -> m n; linear 0, 1; contraction",
    aten.bmm.default: "b m k, b k n -> b m n; linear 0, 1; contraction",
    aten.mv.default: "m k, k -> m; linear 0, 1; contraction",
    aten.dot.default: "k, k ->; linear 0, 1; contraction",
    aten.outer.default: "m, n -> m n; linear 0, 1; contraction",
    aten.bilinear.default: "... i, ... j, n i j, n -> ... n; linear 0 3, 1 3, 2 3; added 3; contraction",
    aten.addmm.default: plus_product("m k, k n -> m n"),
    aten.addmv.default: plus_product("m k, k -> m"),
    aten.baddbmm.default: plus_product("b m k, b k n -> b m n"),
    aten.addr.default: plus_product("m, n -> m n"),
    aten.vdot.default: "k, k ->; contraction",
    aten.addbmm.default: plus_product("b m k, b k n -> m n"),
    aten.matmul.default: matmul,
    aten.einsum.default: einsum,
    aten.embedding.default: embedding,
    aten.embedding_bag.padding_idx: bag,
    aten.scaled_dot_product_attention.default: attention,
    operators.masked_attention: masked_attention,
    **dict.fromkeys(
        (operators.ring_attention, operators.rows_attention, operators.hybrid_attention), part_of_attention
    ),
}
