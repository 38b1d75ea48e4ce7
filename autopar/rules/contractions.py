"""Matrix products, convolutions, embeddings and attention: where weights are split."""

from __future__ import annotations

from typing import Any

import torch

from autopar import operators
from autopar.program import Node, value
from autopar.rules.factoring import Call, Dims, Emit, Factoring, Shape, factoring_of
from autopar.rules.pointwise import broadcast_dims

aten = torch.ops.aten


def matmul(call: Call) -> Factoring:
    """``a @ b`` with broadcasting of the leading dims; vectors as torch.matmul takes them."""
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
    rank = len(batch)
    return Factoring(
        ((*broadcast_dims(a[:-2], rank), *left), (*broadcast_dims(b[:-2], rank), *right)),
        ((*broadcast_dims(batch, rank), *tail),),
        sizes,
        linear=(frozenset({0}), frozenset({1})),
        contraction=True,
    )


def embedding(call: Call) -> Factoring:
    """Rows of a table. Split by rows, a rank looks up the rows that it has and gives zeros for the others."""
    table, ids = call.inputs
    names = [f"t{i}" for i in range(len(ids))]
    tokens = tuple((name,) if size != 1 else () for name, size in zip(names, ids))
    sizes = dict(zip(names, ids)) | {"v": table[0], "h": table[1]}
    return Factoring(
        ((("v",), ("h",)), tokens),
        ((*tokens, ("h",)),),
        sizes,
        linear=(frozenset({0}),),
        uneven=frozenset({"v"}),
        rewrites={"v": _look_up_own_rows},
        contraction=True,
    )


def _look_up_own_rows(emit: Emit, node: Node, axis: str, ways: int) -> Node:
    rank = emit.axis_index(axis)
    padding = node.args[2] if len(node.args) > 2 else -1
    return emit(operators.embedding_rows, (*node.args[:2], rank, padding), emit.partial(value(node), axis))


def attention(call: Call) -> Factoring:
    """``softmax(q k^T + mask) v``: batch and heads may be split; K/V heads may be fewer than query heads (GQA)."""
    query, key = call.inputs[0], call.inputs[1]
    value_dim = call.inputs[2][-1]
    lead = [f"b{i}" for i in range(len(query) - 3)]
    sizes = dict(zip(lead, query)) | {"s": query[-2], "t": key[-2], "e": query[-1], "f": value_dim}
    batch = tuple((name,) if sizes[name] != 1 else () for name in lead)
    heads: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if len(query) > 2:
        groups = query[-3] // key[-3]
        sizes |= {"h": key[-3], "g": groups}
        kv = ("h",) if key[-3] != 1 else ()
        heads = ((*kv, "g") if groups != 1 else kv, kv)
    with_heads = [(heads[i],) if len(query) > 2 else () for i in range(2)]
    inputs: list[Dims] = [
        (*batch, *with_heads[0], ("s",), ("e",)),
        (*batch, *with_heads[1], ("t",), ("e",)),
        (*batch, *with_heads[1], ("t",), ("f",)),
    ]
    if len(call.inputs) > 3:
        inputs.append(_mask_dims(call.inputs[3], inputs[0][:-1]))
    return Factoring(
        tuple(inputs),
        ((*batch, *with_heads[0], ("s",), ("f",)),),
        sizes,
        whole=frozenset({"s", "t", "e", "f"}),
        contraction=True,
    )


def _mask_dims(mask: Shape, query: Dims) -> Dims:
    """The mask is (..., queries, keys); its leading dims are those of the query, or 1."""
    lead = query[:-1][len(query) - 1 - (len(mask) - 2) :] if len(mask) > 2 else ()
    named = tuple(factors if size != 1 else () for factors, size in zip(lead, mask))
    return (*named, ("s",) if mask[-2] != 1 else (), ("t",) if mask[-1] != 1 else ())


def convolution(call: Call) -> Factoring:
    """``conv1d/2d/3d``: batch, output channels and input channels may be split, positions not. Groups stay whole."""
    spatial = len(call.inputs[1]) - 2
    groups = call.argument(6, "groups", 1)
    space = " ".join(f"x{i}" for i in range(spatial))
    taps = " ".join(f"w{i}" for i in range(spatial))
    moved = " ".join(f"y{i}" for i in range(spatial))
    whole = f"{space} {taps} {moved}"
    if groups == 1:
        line = f"b c {space}, o c {taps}, o -> b o {moved}; whole {whole}; linear 0 2, 1 2; added 2; contraction"
    else:
        line = f"b C {space}, o c {taps}, o -> b o {moved}; whole {whole} C o c; linear 0 2, 1 2; added 2"
    if len(call.inputs) == 2:
        line = line.replace(", o ->", " ->").replace("linear 0 2, 1 2", "linear 0, 1")
    return factoring_of(line, call)


RULES: dict[Any, Any] = {
    aten.linear.default: "... k, n k, n -> ... n; linear 0 2, 1 2; added 2; uneven n k; contraction",
    aten.mm.default: "m k, k n -> m n; linear 0, 1; contraction",
    aten.bmm.default: "b m k, b k n -> b m n; linear 0, 1; contraction",
    aten.addmm.default: "n, m k, k n -> m n; linear 0 1, 0 2; added 0; contraction",
    aten.matmul.default: matmul,
    aten.embedding.default: embedding,
    aten.scaled_dot_product_attention.default: attention,
    aten.conv1d.default: convolution,
    aten.conv2d.default: convolution,
    aten.conv3d.default: convolution,
}
