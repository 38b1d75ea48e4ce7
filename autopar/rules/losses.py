"""Losses: sums over elements or tokens, means as shares; classes may be split by vocabulary-parallel cross-entropy."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch

from autopar import operators
from autopar.layout import Layout
from autopar.program import Node, Value, value
from autopar.rules.factoring import Call, Dims, Emit, Factoring, dims_of
from autopar.rules.pointwise import broadcast_dims
from autopar.rules.reductions import share_of_mean

aten = torch.ops.aten
NONE, MEAN, SUM = range(3)  # torch's numbers for ``reduction``


def cross_entropy_sums(call: Call) -> Factoring:
    """logits (N, C, d...), target (N, d...) -> two scalars, summed over everything; C by parts of the vocabulary."""
    logits = call.inputs[0]
    names = [f"t{i}" for i in range(len(logits))]
    class_dim = 0 if len(logits) == 1 else 1
    names[class_dim] = "c"
    sizes = dict(zip(names, logits))
    dims: Dims = tuple((name,) if sizes[name] != 1 else () for name in names)
    inputs: tuple[Dims, ...] = (dims, dims[:class_dim] + dims[class_dim + 1 :])
    if len(call.inputs) > 2:  # class weights: the vocabulary stays whole
        return Factoring((*inputs, (("c",),)), ((), ()), sizes, whole=frozenset({"c"}))
    probabilities = len(call.inputs[1]) == len(logits)
    if probabilities:
        return Factoring((dims, dims), ((), ()), sizes, whole=frozenset({"c"}))
    only = frozenset({"c"})
    return Factoring(
        inputs, ((), ()), sizes, reduce={"c": "whole"}, uneven=only, plain=only, rewrites={"c": _by_vocabulary}
    )


def cross_entropy(call: Call) -> Factoring:
    """One loss per token (reduction "none"): the classes stay whole. Means and sums are rewritten before."""
    summed = cross_entropy_sums(call)
    if len(call.outputs[0]) != len(call.inputs[0]) - 1:
        return replace(summed, outputs=((),), whole=frozenset(summed.sizes), rewrites={}, uneven=frozenset())
    rows = tuple(dim for dim in summed.inputs[0] if dim != ("c",))
    return replace(summed, outputs=(rows,), whole=frozenset({"c"}), reduce={}, rewrites={}, uneven=frozenset())


def _by_vocabulary(emit: Emit, node: Node, axis: str, ways: int) -> Node:
    logits, target, _, ignore_index, smoothing = node.args
    assert isinstance(logits, Node) and isinstance(target, Node)
    source = value(logits)
    class_dim = 0 if len(source.shape) == 1 else 1
    classes = source.shape[class_dim]
    dims = source.layout.dims
    rows = Value(source.dtype, Layout(dims[:class_dim] + dims[class_dim + 1 :]), source.requires_grad)
    still = Value(source.dtype, rows.layout, False)
    rank = emit.axis_index(axis)
    largest = emit(operators.vocabulary_maximum, (logits, target, rank, classes), emit.partial(still, axis, "max"))
    maximum = emit.all_reduce(largest, axis, "max")
    part = emit.partial(rows, axis)
    sums = emit(
        operators.vocabulary_sums, (logits, maximum, target, rank, classes, smoothing), part, part, part
    )
    reduced = [
        emit.all_reduce(emit(operator.getitem, (sums, i), part), axis) for i in range(3 if smoothing else 2)
    ]
    summed = reduced[2] if smoothing else None
    scalar = Value(source.dtype, Layout(()), source.requires_grad)
    count = Value(source.dtype, Layout(()), False)
    arguments = (reduced[0], reduced[1], summed, target, classes, ignore_index, smoothing)
    return emit(operators.cross_entropy_from_parts, arguments, scalar, count)


RULES: dict[Any, Any] = {
    aten.cross_entropy_loss.default: cross_entropy,
    operators.cross_entropy_sums: cross_entropy_sums,
}
