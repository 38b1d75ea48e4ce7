"""Rewrite attention with a constant mask that hides nothing, or just the future, to attention without a mask.

The mask is recognised by its elements (bool: True keeps; float: 0 keeps, -inf or the dtype's smallest number hides),
whatever computed it. Windows, blocks and prefixes stay masks.

before, with triangle=torch.ones(16, 16).tril().bool():
  triangle = const triangle                                                   : bool[16,16]
  q        = input                                                            : f32[2,4,16,8]
  k        = input                                                            : f32[2,4,16,8]
  v        = input                                                            : f32[2,4,16,8]
  out      = aten.scaled_dot_product_attention(q, k, v, triangle, 0.0, False) : f32[2,4,16,8]
  return out
after:
  q   = input                                                       : f32[2,4,16,8]
  k   = input                                                       : f32[2,4,16,8]
  v   = input                                                       : f32[2,4,16,8]
  out = aten.scaled_dot_product_attention(q, k, v, None, 0.0, True) : f32[2,4,16,8]
  return out
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import placeholders_match_inputs
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.rewrite import drop_unused_constants, operand, remove_unused
from autopar.ir.tables import InputKind

aten = torch.ops.aten

HIDDEN = -65504.0  # the smallest float16: exp(it - anything) is 0


@graph_pass(ensures=(placeholders_match_inputs,))
def recognise_causal_masks(program: Program) -> Program:
    constants = {node: program.constants[entry.target] for node, entry in program.placeholders(InputKind.CONSTANT)}
    kinds: dict[tuple[fx.Node, int, int], str] = {}
    for node in program.graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        query, key, val, mask, dropout, causal = node.args  # as canonicalize writes it
        if not isinstance(mask, fx.Node) or causal:
            continue
        source = operand(mask) if mask.target is aten.expand.default else mask
        if source not in constants:
            continue
        case = (source, value(operand(node, 0)).shape[-2], value(operand(node, 1)).shape[-2])
        if case not in kinds:
            kinds[case] = _kind(constants[source], *case[1:])
        if kinds[case] != "other":
            node.args = (query, key, val, None, dropout, kinds[case] == "causal")
    remove_unused(program.graph)
    return drop_unused_constants(program)


def _kind(mask: Tensor, queries: int, keys: int) -> str:
    """``"nothing"`` hidden, ``"causal"`` or ``"other"``."""
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask <= HIDDEN)).all()):
            return "other"
        mask = mask == 0
    if bool(mask.all()):
        return "nothing"
    if queries != keys:
        return "other"
    triangle = torch.ones(queries, keys, dtype=torch.bool).tril()
    return "other" if bool((mask != triangle).any()) else "causal"
