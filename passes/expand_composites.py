"""Write composite operators that have no rule as the operators into which torch decomposes them.

before:
  x         = input x                                                  : f32[4,6]
  y         = input y                                                  : f32[6,3]
  tensordot = aten.tensordot(x, y, [1], [0])                           : f32[4,3]
  return tensordot
after:
  x  = input x               : f32[4,6]
  y  = input y               : f32[6,3]
  mm = aten.mm(x, y)         : f32[4,3]
  return mm

An operator is composite if torch decomposes it above its kernels (``CompositeImplicitAutograd``), in a user's library
too. Other operators without a rule stay: splitting one is an error that names it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from autopar.autodiff.recorder import Recorder, fake_mode
from autopar.errors import InvariantError
from autopar.frontend.trace import VIEWS
from autopar.ir import canonical_views
from autopar.ir.builder import Builder
from autopar.ir.graph_pass import calls, graph_pass
from autopar.ir.node import values
from autopar.ir.operator_facts import is_composite, writes
from autopar.ir.program import Program
from autopar.ir.rewrite import remove_unused, substitute
from autopar.rules import rule_for

aten = torch.ops.aten


def _is_unknown_composite(target: Any) -> bool:
    return is_composite(target) and not writes(target) and rule_for(target) is None


@graph_pass(when=calls(_is_unknown_composite))
def expand_composites(program: Program) -> Program:
    found = [node for node in program.graph.nodes if _is_unknown_composite(node.target)]
    for node in found:
        below = _taken_apart(node, node.all_input_nodes)
        if below is not None:
            _replace(node, _inserted(node, *below, node.all_input_nodes))
    remove_unused(program.graph)
    return program


def _taken_apart(node: fx.Node, operands: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node]] | None:
    """A graph of (operands) -> results, and the operands; None where torch cannot derive it from the shapes alone."""
    recorder = Recorder(fx.Graph())
    with fake_mode(), torch.no_grad():
        fakes = [torch.empty(values(each)[0].shape, dtype=values(each)[0].dtype) for each in operands]
        for position, fake in enumerate(fakes):
            recorder.placeholder(f"operand{position}", fake)
        args, kwargs = fx.map_arg((node.args, node.kwargs), dict(zip(operands, fakes)).__getitem__)
        try:
            with recorder:
                results = node.target.decompose(*args, **kwargs)  # type: ignore[union-attr]
        except (RuntimeError, NotImplementedError, TypeError, InvariantError):
            return None
    several = results if isinstance(results, (list, tuple)) else [results]
    return recorder.graph, [recorder.node_of(result) for result in several]


def _inserted(node: fx.Node, below: fx.Graph, results: list[fx.Node], operands: Sequence[fx.Node]) -> list[fx.Node]:
    """Put the operators of ``below`` in front of ``node``; returns its results."""
    op = Builder(before=node)
    copies = dict(zip((each for each in below.nodes if each.op == "placeholder"), operands))
    for each in below.nodes:
        if each.op != "call_function":
            continue
        args, kwargs = fx.map_arg((each.args, each.kwargs), copies.__getitem__)
        kwargs = {name: setting for name, setting in kwargs.items() if name not in ("device", "layout", "pin_memory")}
        target = each.target
        if target in VIEWS:  # valid for any strides
            target, args = aten.reshape.default, (args[0], list(values(each)[0].shape))
        copies[each] = _canonical(op(target, *args, **kwargs))
    return [copies[result] for result in results]


def _canonical(node: fx.Node) -> fx.Node:
    """As ``canonicalize`` writes it: an operator of torch's own leaves out arguments."""
    rewrite = canonical_views.REWRITES.get(node.target)
    new = rewrite(node) if rewrite else None
    return node if new is None else new


def _replace(node: fx.Node, results: list[fx.Node]) -> None:
    if len(results) == 1 and len(values(node)) == 1 and not any(u.target is operator.getitem for u in node.users):
        substitute(node, results[0])
        return
    for user in list(node.users):
        assert user.target is operator.getitem and isinstance(user.args[1], int), user.format_node()
        substitute(user, results[user.args[1]])
    node.graph.erase_node(node)
