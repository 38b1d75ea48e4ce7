"""Write pooled look-ups with operators that know which bags are required, so that bags can be split by batch.

before:
  w      = param w                                                                       : f32[9,8]
  ids    = input                                                                         : i64[6,4]
  flat   = aten.reshape(ids, [24])                                                       : i64[24]
  at     = aten.arange.start_step(0, 24, 4)                                              : i64[6]
  bag = aten.embedding_bag.padding_idx(w, flat, at, False, 0, False, None, False, -1)
      : (f32[6,8], i64[24], i64[6], i64[6])
  pooled = bag[0]                                                                        : f32[6,8]
  return pooled
after:
  w              = param w                                                          : f32[9,8]
  ids            = input                                                            : i64[6,4]
  embedding_bags = autopar.embedding_bags(w, ids, None, None, None, None, "sum", 8) : f32[6,8]
  return embedding_bags

Bags of other lengths keep their offsets, and are numbered. Where gradients are scaled by the number of uses of a row,
torch's operator stays: that number is known only to all ranks together.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from autopar.errors import AutoparError
from autopar.ir.builder import Builder
from autopar.ir.graph_pass import calls, graph_pass
from autopar.ir.node import origin, value, values
from autopar.ir.program import Program
from autopar.ir.rewrite import add_constants, drop_unused_constants, operand, remove_unused
from autopar.ir.tables import InputKind
from autopar.mesh import DATA_AXES
from autopar.operators.bags import EMBEDDING_BAGS

aten = torch.ops.aten
_MODES = ("sum", "mean", "max")
_NAMES = (
    "weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights",
    "include_last_offset", "padding_idx",
)  # fmt: skip


@graph_pass(when=calls(lambda target: target is aten.embedding_bag.padding_idx))
def write_bags(program: Program) -> Program:
    found = [node for node in program.graph.nodes if node.target is aten.embedding_bag.padding_idx]
    for node in found:
        program = _write(program, node)
    remove_unused(program.graph)
    return drop_unused_constants(program)


def _write(program: Program, node: fx.Node) -> Program:
    given: dict[str, Any] = {**dict.fromkeys(_NAMES), **dict(zip(_NAMES, node.args)), **node.kwargs}
    users = [user for user in node.users if user.target is operator.getitem]
    if given["scale_grad_by_freq"] or any(user.args[1] != 0 for user in users):
        return program
    table, ids, weights = given["weight"], given["indices"], given["per_sample_weights"]
    count = values(node)[0].shape[0]
    length = _common_length(program, given["offsets"], count, value(ids).shape[0])
    if length is not None:
        ids, weights = (None if flat is None else _rows(node, flat, count, length) for flat in (ids, weights))
        where: tuple[Any, ...] = (None, None)
    else:
        _refuse_parts(program, node)
        program, numbers = add_constants(program, {f"bags_{node.name}": (torch.arange(count), origin(node))})
        where = (given["offsets"], numbers[f"bags_{node.name}"])
    padding = -1 if given["padding_idx"] is None else given["padding_idx"] % value(table).shape[0]
    arguments = (table, ids, *where, weights, None, _MODES[given["mode"] or 0], padding)
    pooled = Builder(before=node)(EMBEDDING_BAGS, *arguments)
    for user in users:
        user.replace_all_uses_with(pooled)
    return program


def _common_length(program: Program, offsets: fx.Node, count: int, total: int) -> int | None:
    """The common number of rows of all bags; None where the offsets are unknown or the numbers differ."""
    if count == 0 or total % count:
        return None
    length = total // count
    known = {node.name: program.constants[entry.target] for node, entry in program.placeholders(InputKind.CONSTANT)}
    if offsets.name in known:
        regular = torch.equal(known[offsets.name][:count].cpu().long(), torch.arange(count) * length)
    else:
        regular = offsets.target is aten.arange.start_step and offsets.args == (0, total, length)
    return length if regular and length else None


def _rows(node: fx.Node, flat: fx.Node, count: int, length: int) -> fx.Node:
    """(count * length) -> (count, length)."""
    if flat.target is aten.reshape.default and value(operand(flat)).shape == (count, length):
        return operand(flat)
    return Builder(before=node).reshape(flat, count, length)


def _refuse_parts(program: Program, node: fx.Node) -> None:
    if program.plan.inputs == "local" and any(program.mesh.size(a) > 1 for a in DATA_AXES):
        raise AutoparError(
            f"the bags of {origin(node).module or node.name} have lengths of their own, so the parts of a batch differ "
            'in size from rank to rank.\nWay out: hand every rank the whole batch, Plan(inputs="global"), or pad the '
            "bags to one length (padding_idx) and pass them as a (rows, length) tensor."
        )
