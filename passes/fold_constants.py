"""Evaluate nodes that depend on no parameter, buffer or input, once, and replace them by constants.

A dim along which all slices are equal is cut to size 1 (a mask that is the same for every row of the batch), so that a
split of that dim leaves the constant alone; users that do not broadcast get an ``expand``.

before:
  w      = param w                              : f32[4,8]
  arange = aten.arange(8)                       : i64[8]
  ge     = aten.ge.Scalar(arange, 3)            : bool[8]
  expand = aten.expand(ge, [4, 8])              : bool[4,8]
  masked = aten.masked_fill.Scalar(w, expand, 0) : f32[4,8]
  return masked
after:
  w        = param w                                 : f32[4,8]
  c_expand = const expand                            : bool[1,8]
  masked   = aten.masked_fill.Scalar(w, c_expand, 0) : f32[4,8]
  return masked
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from autopar.ir.builder import Builder
from autopar.ir.evaluate import Evaluator, known_constants
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import every_value_has_a_layout, placeholders_match_inputs
from autopar.ir.node import origin, value, values
from autopar.ir.operator_facts import is_pointwise, is_pure
from autopar.ir.program import Program
from autopar.ir.rewrite import add_constants, drop_unused_constants, remove_unused
from autopar.operators import ATTENTIONS

aten = torch.ops.aten

LARGEST = 256 * 2**20  # bytes of one constant; a larger one stays computed, and is not evaluated
SPREADING = {
    aten.expand.default,
    aten.reshape.default,
    aten.repeat.default,
}  # a large tensor from a small one
MASK = 3  # position of the mask among the arguments of attention


@graph_pass(ensures=(every_value_has_a_layout, placeholders_match_inputs))
def fold_constants(program: Program) -> Program:
    known = _known(program)
    folded = _evaluate(known)
    owners: dict[str, fx.Node] = {}  # content -> the first node with it
    contents = {id(tensor): _content(tensor) for tensor in {id(each): each for each in folded.values()}.values()}
    merged = {node: owners.setdefault(contents[id(tensor)], node) for node, tensor in folded.items()}
    new = {owner.name.removeprefix("c_"): (folded[owner], origin(owner)) for owner in owners.values()}
    program, constants = add_constants(program, new)
    for node, owner in merged.items():
        for user in list(node.users):
            if user not in known or user.target in SPREADING:
                constant = constants[owner.name.removeprefix("c_")]
                user.replace_input_with(node, _as_taken(user, node, constant))
    remove_unused(program.graph)
    return drop_unused_constants(program)


def _known(program: Program) -> dict[fx.Node, Tensor | None]:
    """Everything that can be evaluated now, in order: constants with their tensors, and operators on nothing else."""
    known: dict[fx.Node, Tensor | None] = {**known_constants(program)}
    for node in program.graph.nodes:
        if (
            node.op == "call_function"
            and is_pure(node.target)
            and all(source in known for source in node.all_input_nodes)
        ):
            known[node] = None
    return known


def _evaluate(known: dict[fx.Node, Tensor | None]) -> dict[fx.Node, Tensor]:
    """The nodes to replace by constants, with their compact values; those too large are dropped from ``known``."""
    keep = {link for node in _edge(known) for link in _chain(node, known)}
    evaluator = Evaluator(known, keep, LARGEST)
    for node, tensor in list(known.items()):
        if tensor is None and not evaluator.compute(node):
            del known[node]
    chosen: dict[fx.Node, Tensor] = {}
    for node in _edge(known):
        links = filter(evaluator.has, _chain(node, known))
        smallest = min(links, key=lambda link: evaluator.result(link).numel())
        chosen[smallest] = evaluator.result(smallest)
    return {node: tensor.contiguous() for node, tensor in chosen.items()}


def _edge(known: Mapping[fx.Node, Tensor | None]) -> list[fx.Node]:
    """The known nodes that something unknown takes."""
    return [node for node in known if len(values(node)) == 1 and any(user not in known for user in node.users)]


def _chain(node: fx.Node, known: Mapping[fx.Node, Tensor | None]) -> list[fx.Node]:
    """``node`` and the nodes that only repeat or rearrange, back to the node that computes the value."""
    chain = [node]
    while chain[-1].target in SPREADING and chain[-1].args[0] in known:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain


def _content(tensor: Tensor) -> str:
    flat = tensor.reshape(-1).as_strided((tensor.numel(),), (1,))  # one element may have any stride
    digest = hashlib.blake2b(flat.view(torch.uint8).numpy().data)
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest.hexdigest()}"


def _as_taken(user: fx.Node, node: fx.Node, constant: fx.Node) -> fx.Node:
    """The compact ``constant`` in the shape in which ``user`` takes it in place of ``node``."""
    shape, compact = value(node).shape, value(constant).shape
    if is_pointwise(user.target):
        others = [value(other).shape for other in user.all_input_nodes if other is not node]
        if torch.broadcast_shapes(compact, *others) == value(user).shape:  # type: ignore[no-untyped-call]
            return constant
    elif user.target in ATTENTIONS:  # the mask, or a vector of its formula, may lack the batch
        kept = 2 if node in user.args[MASK:] else 1
        shape = (*compact[:-kept], *shape[-kept:]) if node not in user.args[:MASK] else shape
    if shape == compact:
        return constant
    return Builder(before=user)(aten.expand.default, constant, list(shape))
