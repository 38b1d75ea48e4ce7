"""Rewrite attention with a mask to attention under a formula over positions, or to causality, or to no mask.

A mask is followed back through its graph, element by element, to positions and to vectors that depend on one position
(padding, documents): no tensor of its size is computed, and none is left in the program. Where it hides part of another
tensor, that one stays as a bias. What is found is compared with the mask's graph at some elements. A mask that is no
formula stays; ``decisions["mask"]`` says why.

before:
  q       = input                                                             : f32[2,4,16,8]
  k       = input                                                             : f32[2,4,16,8]
  v       = input                                                             : f32[2,4,16,8]
  valid   = input                                                             : bool[2,16]
  keys    = aten.reshape(valid, [2, 1, 1, 16])                                : bool[2,1,1,16]
  j       = aten.arange(16)                                                   : i64[16]
  i       = aten.reshape(j, [16, 1])                                          : i64[16,1]
  later   = aten.le.Tensor(j, i)                                              : bool[16,16]
  sub     = aten.sub.Tensor(i, j)                                             : i64[16,16]
  near    = aten.lt.Scalar(sub, 4)                                            : bool[16,16]
  window  = aten.bitwise_and.Tensor(later, near)                              : bool[16,16]
  padded  = aten.bitwise_and.Tensor(later, keys)                              : bool[2,1,16,16]
  causal  = aten.scaled_dot_product_attention(q, k, v, later, 0.0, False)     : f32[2,4,16,8]
  recent  = aten.scaled_dot_product_attention(q, k, causal, window, 0.0, False) : f32[2,4,16,8]
  some    = aten.scaled_dot_product_attention(q, k, recent, padded, 0.0, False) : f32[2,4,16,8]
  return some
after:
  q                  = input                                                       : f32[2,4,16,8]
  k                  = input                                                       : f32[2,4,16,8]
  v                  = input                                                       : f32[2,4,16,8]
  valid              = input                                                       : bool[2,16]
  causal             = aten.scaled_dot_product_attention(q, k, v, None, 0.0, True) : f32[2,4,16,8]
  masked_attention   = op.masked_attention(q, k, causal, None, [], "j<=i & i-j<4") : f32[2,4,16,8]
  masked_attention_1 = op.masked_attention(q, k, masked_attention, None, [valid], "j<=i & v0[j]") : f32[2,4,16,8]
  return masked_attention_1
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from autopar.ir.builder import Builder
from autopar.ir.evaluate import known_constants
from autopar.ir.graph_pass import graph_pass
from autopar.ir.invariants import placeholders_match_inputs
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.rewrite import drop_unused_constants, operand, remove_unused, substitute
from autopar.ir.tables import Decision
from autopar.masks.recognise import Recognised, Recogniser
from autopar.operators import masked_attention
from autopar.operators.predicates import Before, Formula

aten = torch.ops.aten

CAUSAL, NOTHING = Formula(((Before(),),)), Formula()
MASK = "mask"  # of ``Program.decisions``
DROPOUT = "attention with dropout is written out, with its scores"


@graph_pass(ensures=(placeholders_match_inputs,))
def recognise_masks(program: Program) -> Program:
    recogniser = Recogniser(known_constants(program))
    found: dict[tuple[fx.Node, tuple[int, ...], tuple[int, ...]], Recognised | str] = {}
    decisions: dict[str, Decision] = {}
    for node in list(program.graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        mask = node.args[3]  # as canonicalize writes it
        if not isinstance(mask, fx.Node):
            continue
        queries, keys = value(operand(node, 0)).shape, value(operand(node, 1)).shape
        case = (mask, queries[-2:], keys[-2:])
        if case not in found:
            found[case] = recogniser.recognise(node, mask, queries, keys)
        new, decision = _rewritten(node, mask, found[case])
        decisions[new.name] = decision
    remove_unused(program.graph)
    program = drop_unused_constants(program)
    return replace(program, decisions={**program.decisions, MASK: decisions}) if decisions else program


def _rewritten(node: fx.Node, mask: fx.Node, found: Recognised | str) -> tuple[fx.Node, Decision]:
    """The attention in place of ``node``, and what is said about its mask."""
    query, key, held, _, dropout, causal = node.args
    stays = "a tensor of " + " x ".join(map(str, value(mask).shape))
    if isinstance(found, str):
        return node, Decision(stays, {"a formula": found})
    formula = found.formula
    if causal and CAUSAL.clauses[0] not in formula.clauses:
        formula = Formula((*CAUSAL.clauses, *formula.clauses))
    square = value(operand(node, 0)).shape[-2] == value(operand(node, 1)).shape[-2]
    plain = formula == NOTHING or formula == CAUSAL and (square or bool(causal))
    if plain and (found.bias is None or formula == NOTHING):
        node.args = (query, key, held, found.bias, dropout, formula == CAUSAL)
        return node, _formula(formula, found.bias)
    if dropout:
        return node, Decision(stays, {str(formula): DROPOUT})
    op = Builder(before=node)
    scale = [node.kwargs["scale"]] if node.kwargs.get("scale") is not None else []
    new = op(masked_attention, query, key, held, found.bias, list(found.vectors), str(formula), *scale, like=node)
    substitute(node, new)
    return new, _formula(formula, found.bias)


def _formula(formula: Formula, bias: fx.Node | None) -> Decision:
    text = str(formula) or "hides nothing"
    return Decision(text if bias is None else f"{text}, with a bias of {' x '.join(map(str, value(bias).shape))}")
