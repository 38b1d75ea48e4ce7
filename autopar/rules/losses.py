"""Losses: sums over elements or tokens, means as shares; classes may be split by vocabulary-parallel cross-entropy."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch

from autopar import operators
from autopar.ir.layout import Layout
from autopar.ir.node import Node, Value, value
from autopar.rules.factoring import Call, Dims, Emit, Factoring, Shape, dims_of
from autopar.rules.pointwise import broadcast_dims
from autopar.rules.reductions import share_of_mean

aten = torch.ops.aten
NONE, MEAN, SUM = range(3)  # torch's numbers for ``reduction``


def cross_entropy_sums(call: Call) -> Factoring:
    """logits (N, C, d...), target (N, d...) -> two scalars, sums over all; C may be split as a vocabulary."""
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
    arguments = (logits, maximum, target, rank, classes, smoothing, ignore_index)
    third = part if smoothing else emit.partial(replace(rows, layout=Layout(()), requires_grad=False), axis)
    sums = emit(operators.vocabulary_sums, arguments, part, part, third)
    reduced = [emit.all_reduce(emit(operator.getitem, (sums, i), part), axis) for i in range(3 if smoothing else 2)]
    summed = reduced[2] if smoothing else None
    wide = torch.promote_types(source.dtype, torch.float32)
    scalar, count = Value(wide, Layout(()), source.requires_grad), Value(wide, Layout(()), False)
    reductions = (reduced[0], reduced[1], summed, target, classes, ignore_index, smoothing)
    return emit(operators.cross_entropy_from_parts, reductions, scalar, count)


def elementwise(position: int) -> Any:
    """Rule for a loss of each element, then their mean, their sum or nothing (``reduction`` at ``position``)."""

    def rule(call: Call) -> Factoring:
        full = tuple(max(sizes) for sizes in _aligned(call.inputs))
        sizes = {f"d{len(full) - i}": size for i, size in enumerate(full)}
        inputs = tuple(map(broadcast_dims, call.inputs))
        reduction = int(call.argument(position, "reduction", MEAN))
        if reduction == NONE:
            return Factoring(inputs, (broadcast_dims(full),), sizes)
        rewrites = dict.fromkeys(sizes, share_of_mean) if reduction == MEAN else {}
        return Factoring(inputs, ((),), sizes, rewrites=rewrites)

    return rule


def _aligned(shapes: tuple[Shape, ...]) -> list[list[int]]:
    """For each dim of the result, the sizes that broadcasting aligns."""
    rank = max(map(len, shapes))
    return [[shape[i - rank] for shape in shapes if i - rank + len(shape) >= 0] for i in range(rank)]


def class_loss(position: int) -> Any:
    """Rule for a loss of scores (N, C, d...) against class numbers (N, d...): C stays whole."""

    def rule(call: Call) -> Factoring:
        scores, target = call.inputs[:2]
        class_dim = 0 if len(scores) == 1 else 1
        dims, sizes = dims_of(scores)
        tokens = dims[:class_dim] + dims[class_dim + 1 :]
        name = f"d{class_dim}"
        chances = len(target) == len(scores) and call.target is aten.cross_entropy_loss.default
        inputs = (dims, dims if chances else tokens, *[((name,),)] * (len(call.inputs) - 2))
        reduction = int(call.argument(position, "reduction", MEAN))
        if reduction == NONE:
            return Factoring(inputs, (tokens,), sizes, whole=frozenset({name}))
        if reduction == MEAN and len(inputs) > 2 and not chances:  # a mean weighted by the classes that occur
            return Factoring(inputs, ((),), sizes, whole=frozenset(sizes))
        share = share_of_mean if chances or call.target is aten.multi_margin_loss.default else _share_of_counted_mean
        rewrites = dict.fromkeys(sizes, share) if reduction == MEAN else {}
        return Factoring(inputs, ((),), sizes, whole=frozenset({name}), rewrites=rewrites)

    return rule


def _share_of_counted_mean(emit: Emit, node: Node, axis: str, ways: int) -> Node:
    """The sum of this rank's losses, over the number of targets that count on all ranks."""
    names = ("self", "target", "weight", "reduction", "ignore_index", "label_smoothing")
    given = {**dict(zip(names, node.args)), **node.kwargs}
    scores, target, ignored = given["self"], given["target"], given.get("ignore_index", -100)
    assert isinstance(scores, Node) and isinstance(target, Node)
    part = emit.partial(value(node), axis)
    smoothing = {name: setting for name, setting in node.kwargs.items() if name == "label_smoothing"}
    total = emit(node.target, (scores, target, None, SUM, ignored, *node.args[5:]), part, kwargs=smoothing)
    counted = emit(aten.ne.Scalar, (target, ignored), Value(torch.bool, value(target).layout))
    here = Value(torch.int64, part.layout)
    count = emit.all_reduce(emit(aten.sum.default, (counted,), here), axis)
    return emit(aten.div.Tensor, (total, count), part)


def vocabulary_part(call: Call) -> Factoring:
    """``vocabulary_maximum, vocabulary_sums (logits, ..., rank, classes)``: an earlier axis splits the classes."""
    logits, *others = call.inputs
    class_dim = 1 if len(logits) > 1 else 0
    dims, sizes = dims_of(logits)
    tokens = dims[:class_dim] + dims[class_dim + 1 :]
    inputs = (dims, *[tokens] * (len(others) - 1), ())
    outputs = tuple(tokens if shape or not tokens else () for shape in call.outputs)  # a scalar stands for a sum of 0
    return Factoring(inputs, outputs, sizes, whole=frozenset({f"d{class_dim}"}))


def from_parts(call: Call) -> Factoring:
    """``cross_entropy_from_parts``: each token gives a summand of the loss and one of the count."""
    tokens, sizes = dims_of(call.inputs[0])
    return Factoring((tokens,) * len(call.inputs), ((),) * len(call.outputs), sizes)


ELEMENTWISE: dict[Any, int] = {
    aten.binary_cross_entropy_with_logits.default: 4,
    aten.binary_cross_entropy.default: 3,
    aten.poisson_nll_loss.default: 5,
    aten.hinge_embedding_loss.default: 3,
    aten.margin_ranking_loss.default: 4,
    **dict.fromkeys((aten.smooth_l1_loss.default, aten.huber_loss.default, aten.l1_loss.default), 2),
    **dict.fromkeys((aten.mse_loss.default, aten.kl_div.default, aten.soft_margin_loss.default), 2),
}

RULES: dict[Any, Any] = {
    operators.cross_entropy_sums: cross_entropy_sums,
    operators.vocabulary_maximum: vocabulary_part,
    operators.vocabulary_sums: vocabulary_part,
    operators.cross_entropy_from_parts: from_parts,
    **{target: elementwise(position) for target, position in ELEMENTWISE.items()},
    aten.nll_loss_nd.default: class_loss(3),
    aten.cross_entropy_loss.default: class_loss(3),
    aten.multi_margin_loss.default: class_loss(5),
}
