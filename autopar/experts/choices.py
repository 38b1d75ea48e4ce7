"""The experts that each token chooses, and the tensors that mark them: 1 or a weight where an expert is chosen.

``topk``, ``argmax`` and the first of a sort choose different numbers for each token. A mark is a tensor over (token,
expert), or over (token, choice, expert), that holds one constant wherever the expert is not chosen:
``zeros.scatter(1, ids, weights)``, ``one_hot(ids)``, ``ids[..., None] == arange(experts)``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autopar.experts.digits import CHOICE, EXPERT, TOKEN, Digit, Places, counted, has, joined
from autopar.ir.evaluate import FILLED, compact
from autopar.ir.node import value, values
from autopar.ir.operator_facts import is_view
from autopar.ir.program import Program
from autopar.ir.rewrite import operand

aten = torch.ops.aten

Number = float | int | bool
Constants = Mapping[fx.Node, Tensor]  # with their elements

_SORTS = {aten.sort.default, aten.sort.stable}
_IDS_OF_PAIRS = {aten.topk.default, aten.max.dim, *_SORTS}  # (values, ids)
_ORDERS = {*_SORTS, aten.argsort.default}
_IDS = {aten.argmax.default, aten.argsort.default}
_SCATTERS = {aten.scatter.src, aten.scatter.value, aten.scatter_add.default}
RESHAPES: set[Any] = {aten.reshape.default, aten._to_copy.default, aten.repeat.default}
_EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}


@dataclass(frozen=True)
class Chosen:
    """``ids``: for each token some numbers below ``width``, no two of them the same.

    ``places`` are those of its dims: the choice along one dim, and the others count tokens.
    """

    ids: fx.Node
    places: Places
    tokens: int
    choices: int
    width: int
    call: fx.Node  # what chooses: a topk, an argmax, a sort


def choices_of(program: Program) -> list[Chosen]:
    """Every choice of the program, in its order; of a sort only the first ones that are cut off it."""
    found: dict[fx.Node, Chosen] = {}
    for node in program.graph.nodes:
        chosen = _chosen(node) or _fewer(node, found)
        if chosen is not None:
            found[node] = chosen
    return [one for one in found.values() if one.choices < one.width or one.call.target not in _ORDERS]


def _chosen(node: fx.Node) -> Chosen | None:
    if node.target is operator.getitem and node.args[1] == 1 and operand(node).target in _IDS_OF_PAIRS:
        call = operand(node)
    elif node.target in _IDS:
        call = node
    else:
        return None
    source = value(operand(call)).shape
    names = [argument.name for argument in call.target._schema.arguments]  # type: ignore[union-attr]
    dim = dict(zip(names, call.args), **call.kwargs).get("dim", None if call.target is aten.argmax.default else -1)
    if dim is None or not source:
        return None
    dim = int(dim) % len(source)
    return _along(node, dim if len(value(node).shape) == len(source) else None, source[dim], call)


def _along(node: fx.Node, dim: int | None, width: int, call: fx.Node) -> Chosen:
    """The choice along one dim of ``node``; of one expert for each token where there is no such dim."""
    shape = list(value(node).shape)
    choices = shape.pop(dim) if dim is not None else 1
    places = counted(TOKEN, shape)
    if dim is not None:
        places.insert(dim, joined([Digit(CHOICE, choices)]))
    return Chosen(node, tuple(places), math.prod(shape), choices, width, call)


def _fewer(node: fx.Node, found: dict[fx.Node, Chosen]) -> Chosen | None:
    """Some of the choices, or one: ``ids[:, :k]``, ``ids[:, 0]``."""
    if node.target not in (aten.slice.Tensor, aten.select.int) or operand(node) not in found:
        return None
    known = found[operand(node)]
    dim = int(node.args[1]) % len(known.places)  # type: ignore[arg-type]
    if not has((known.places[dim],), CHOICE):
        return None
    return _along(node, dim if node.target is aten.slice.Tensor else None, known.width, known.call)


# ---------------------------------------------------------------- marks


@dataclass(frozen=True)
class Mark:
    """A tensor that holds ``off`` where the expert is not chosen.

    ``chosen``: what it holds elsewhere, a number or a tensor laid out as the ids in ``ids_places`` are.
    """

    places: Places
    off: Number
    chosen: fx.Node | Number
    ids_places: Places


def mark_of(node: fx.Node, ids: Mapping[fx.Node, Places], constants: Constants) -> Mark | None:
    """The mark that ``node`` makes of one of ``ids``, the same ids in several shapes."""
    if node.target in _SCATTERS and ids.get(operand(node, 2)):
        return _scattered(node, ids[operand(node, 2)], constants)
    if node.target is aten.index_put.default:
        return _put(node, ids, constants)
    if node.target is aten.one_hot.default and operand(node) in ids:
        places = ids[operand(node)]
        return Mark((*places, (Digit(EXPERT, value(node).shape[-1]),)), 0, 1, places)
    if node.target is aten.eq.Tensor:
        for number, other in ((0, 1), (1, 0)):
            if operand(node, number) in ids:
                return _compared(node, ids[operand(node, number)], operand(node, other), constants)
    return None


def _scattered(node: fx.Node, places: Places, constants: Constants) -> Mark | None:
    base, dim, index, source = node.args[:4]
    assert isinstance(base, fx.Node) and isinstance(dim, int) and isinstance(index, fx.Node)
    dim, off = dim % len(places), constant(base, constants)
    others = [size for i, size in enumerate(value(base).shape) if i != dim]
    fits = others == [size for i, size in enumerate(value(index).shape) if i != dim]
    if off is None or not fits or any(digit.of != CHOICE for digit in places[dim]):
        return None
    if isinstance(source, fx.Node):
        if value(source).shape != value(index).shape:
            return None
    elif not isinstance(source, (int, float)):
        return None
    if node.target is aten.scatter_add.default and off != 0:
        return None
    experts = joined([Digit(EXPERT, value(base).shape[dim])])
    return Mark((*places[:dim], experts, *places[dim + 1 :]), off, source, places)


def _put(node: fx.Node, ids: Mapping[fx.Node, Places], constants: Constants) -> Mark | None:
    """``base[arange(tokens)[:, None], ids] = weights``, as a scatter."""
    base, indices, source = node.args[:3]
    assert isinstance(base, fx.Node) and isinstance(indices, (list, tuple)) and isinstance(source, fx.Node)
    if len(indices) != 2 or len(value(base).shape) != 2 or indices[1] not in ids:
        return None
    rows, chosen = indices
    assert isinstance(chosen, fx.Node)
    tokens, places, off = value(base).shape[0], ids[chosen], constant(base, constants)
    numbers = constants.get(_below_views(rows)) if isinstance(rows, fx.Node) else None
    if numbers is None or value(rows).shape != (tokens, 1) or not torch.equal(numbers.flatten(), torch.arange(tokens)):  # type: ignore[arg-type]
        return None
    fits = value(source).shape == value(chosen).shape and len(places) == 2
    if off is None or not fits or (off != 0 and len(node.args) > 3 and node.args[3]):
        return None
    return Mark((places[0], (Digit(EXPERT, value(base).shape[1]),)), off, source, places)


def _compared(node: fx.Node, ids: Places, other: fx.Node, constants: Constants) -> Mark | None:
    """``ids[..., None] == arange(experts)``: the numbers of all experts along one dim, where the ids have size 1."""
    shape = value(other).shape
    tensor = constants.get(_below_views(other))
    if tensor is None or tensor.numel() < 2 or tensor.numel() != math.prod(shape) or tensor.numel() not in shape:
        return None
    padded = ((),) * (len(value(node).shape) - len(ids)) + tuple(ids)
    dim = len(padded) - len(shape) + list(shape).index(tensor.numel())
    if padded[dim] or not torch.equal(tensor.flatten(), torch.arange(tensor.numel(), dtype=tensor.dtype)):
        return None
    return Mark((*padded[:dim], (Digit(EXPERT, tensor.numel()),), *padded[dim + 1 :]), False, True, padded)


def constant(node: fx.Node, constants: Constants) -> Number | None:
    """The number that all elements of ``node`` are; None where they differ or depend on something."""
    node = _below_views(node)
    if node.target in FILLED and node.target not in _EMPTY:
        number = FILLED[node.target](node)
        return number if isinstance(number, (int, float)) else None
    held = constants.get(node)
    if held is None or compact(held).numel() != 1:
        return None
    return compact(held).item()


def _below_views(node: fx.Node) -> fx.Node:
    while is_view(node.target) or node.target in RESHAPES:
        node = operand(node)
    return node


def choice_of(ids: fx.Node, choices: Mapping[fx.Node, Chosen]) -> Chosen | None:
    """The choice of which ``ids`` are the numbers, in another shape or type. ``choices``: by their ids."""
    while ids not in choices and is_ids(ids):
        ids = operand(ids)
    return choices.get(ids)


def is_ids(node: fx.Node) -> bool:
    """Whether ``node`` gives the numbers of its operand in another shape or whole type."""
    kinds = values(node)
    whole = len(kinds) == 1 and not kinds[0].dtype.is_floating_point and kinds[0].dtype is not torch.bool
    return whole and (is_view(node.target) or node.target in RESHAPES)
