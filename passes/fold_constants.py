"""Evaluates what depends on no parameter, buffer or input, once, and makes a constant of it.

A dim along which all slices are equal is cut to size 1 (a mask that is the same for every row of the batch), so that a
split of that dim leaves the constant alone; users that do not broadcast get an ``expand``.

before:
  w       = param w                             : f32[4,8]
  arange  = aten.arange(8)                      : i64[8]
  ge      = aten.ge(arange, 3)                  : b[8]
  expand  = aten.expand(ge, [4, 8])             : b[4,8]
  masked  = aten.masked_fill(w, expand, 0)      : f32[4,8]
  return masked
after:
  w        = param w                            : f32[4,8]
  c_expand = const expand                       : b[1,8]
  masked   = aten.masked_fill(w, c_expand, 0)   : f32[4,8]
  return masked
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from autopar.evaluate import Evaluator, is_pointwise, is_pure
from autopar.layout import Layout
from autopar.program import InputKind, Program, Value, origin, value, values
from autopar.rewrite import add_constants, drop_unused_constants, insert_before, remove_unused

aten = torch.ops.aten

LARGEST = 256 * 2**20  # bytes of one constant; what is larger stays computed
MASK = 3  # position of the mask among the arguments of attention


def fold_constants(program: Program) -> Program:
    program = program.clone()
    known = _known(program)
    folded = _evaluate(program, known)
    owners: dict[str, fx.Node] = {}  # content -> the first node that has it
    merged = {node: owners.setdefault(_content(tensor), node) for node, tensor in folded.items()}
    new = {owner.name: (folded[owner], origin(owner)) for owner in owners.values()}
    program, constants = add_constants(program, new)
    for node, owner in merged.items():
        for user in list(node.users):
            if user not in known:
                user.replace_input_with(node, _as_taken(user, node, constants[owner.name]))
    remove_unused(program.graph)
    return drop_unused_constants(program)


def _known(program: Program) -> set[fx.Node]:
    """Everything that can be evaluated now: constants, and operators on nothing else."""
    known = {
        node
        for node, entry in program.placeholders(InputKind.CONSTANT)
        if not isinstance(program.constants[entry.target], FakeTensor)
    }
    for node in program.graph.nodes:
        if node.op == "call_function" and is_pure(node) and known.issuperset(node.all_input_nodes):
            known.add(node)
    return known


def _evaluate(program: Program, known: set[fx.Node]) -> dict[fx.Node, Tensor]:
    """Operators among ``known`` that others use, with their compact values."""
    constants = {node: entry for node, entry in program.placeholders(InputKind.CONSTANT) if node in known}
    operators = [node for node in program.graph.nodes if node in known and node not in constants]
    edge = [node for node in operators if len(values(node)) == 1 and not known.issuperset(node.users)]
    tensors = {node: program.constants[entry.target] for node, entry in constants.items()}
    evaluator = Evaluator(tensors, set(operators), set(edge))
    for node in operators:
        evaluator.compute(node)
    results = {node: evaluator.result(node) for node in edge}
    return {node: tensor.contiguous() for node, tensor in results.items() if tensor.nbytes <= LARGEST}


def _content(tensor: Tensor) -> str:
    digest = hashlib.blake2b(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest.hexdigest()}"


def _as_taken(user: fx.Node, node: fx.Node, constant: fx.Node) -> fx.Node:
    """The compact ``constant`` in the shape in which ``user`` takes it in the place of ``node``."""
    shape, compact = value(node).shape, value(constant).shape
    if is_pointwise(user):
        others = [value(other).shape for other in user.all_input_nodes if other is not node]
        if torch.broadcast_shapes(compact, *others) == value(user).shape:
            return constant
    elif user.target is aten.scaled_dot_product_attention.default and node in user.args[MASK:]:
        shape = (*compact[:-2], *shape[-2:])
    if shape == compact:
        return constant
    kind = Value(value(node).dtype, Layout.whole(shape))
    return insert_before(user, aten.expand.default, (constant, list(shape)), {}, kind)
