"""Programs in text form that several tests use, and the check that a text reads back."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from autopar.ir.parse import parse
from autopar.ir.program import Program

MLP = """\
program mesh(dp=2 tp=2)
  p_up_weight   = param up.weight                  : f32[32@tp,8]
  p_down_weight = param down.weight                : f32[8,32@tp]
  x             = input                            : f32[4@dp,16,8]
  linear        = aten.linear(x, p_up_weight)      : f32[4@dp,16,32@tp]
  gelu          = aten.gelu(linear)                : f32[4@dp,16,32@tp]
  linear_1      = aten.linear(gelu, p_down_weight) : f32[4@dp,16,8]{sum:tp}
  all_reduce    = comm.all_reduce(linear_1, tp)    : f32[4@dp,16,8]
  return all_reduce"""

NORMALISED = """\
program mesh(dp=2)
  weight     = param bn.weight                                                                        : f32[3]
  bias       = param bn.bias                                                                          : f32[3]
  mean       = buffer bn.running_mean                                                                 : f32[3]
  var        = buffer bn.running_var                                                                  : f32[3]
  table      = const lifted.0                                                                         : i64[3]
  x          = input images                                                                           : f32[8@dp,3]
  labels     = input                                                                                  : i64[8@dp]
  seed       = seed                                                                                   : i64[]
  norm       = aten._native_batch_norm_legit_functional(x, weight, bias, mean, var, True, 0.1, 1e-05) : (f32[8@dp,3], f32[3] nograd, f32[3] nograd, f32[3] nograd, f32[3] nograd)
  y          = norm[0]                                                                                : f32[8@dp,3]
  new_mean   = norm[3]                                                                                : f32[3]
  loss       = aten.nll_loss_forward(y, labels, None, 1, -100)                                        : (f32[], f32[])
  total      = loss[0]                                                                                : f32[]{sum:dp}
  return loss=total, "past key"=y, update bn.running_mean=new_mean"""  # noqa: E501

ROLES = """\
program mesh(tp=2)
  w      = param w              : f32[4@tp,2]
  x      = input                : f32[3,2]
  linear = aten.linear(x, w)    : f32[3,4@tp]
  total  = aten.sum(linear)     : f32[]{sum:tp}
  loss   = comm.all_reduce(total, tp) : f32[]
  return loss=loss, logits=linear

forward:
  w      = param w                     : f32[4@tp,2]
  x      = input                       : f32[3,2]
  linear = aten.linear(x, w)           : f32[3,4@tp]
  total  = aten.sum(linear)            : f32[]{sum:tp}
  loss   = comm.all_reduce(total, tp) : f32[]
  return loss=loss, logits=linear, saved x

backward:
  x       = saved                        : f32[3,2]
  d_loss  = grad loss                    : f32[]
  expand  = aten.expand(d_loss, [3, 2])  : f32[3,2]
  t       = aten.t(expand)               : f32[2,3]
  mm      = aten.mm(t, x)                : f32[2,2]
  return w=mm

inference:
  w      = param w             : f32[4@tp,2]
  x      = input               : f32[3,2]
  linear = aten.linear(x, w)   : f32[3,4@tp]
  return loss=linear, logits=linear"""


def reads_back(source: str, operators: Collection[str] = ()) -> Program:
    """The program of ``source``; what it prints is its own text, and equals ``source`` but for columns."""
    program = parse(source, operators=operators)
    printed = str(program)
    assert squeezed(printed) == squeezed(source)
    assert str(parse(printed, operators=operators)) == printed
    assert printed.isascii()
    return program


def squeezed(source: str) -> list[str]:
    return [" ".join(line.split()) for line in source.splitlines() if line.strip()]


def line(expression: str, mesh: str = "tp=2", dims: str = "8") -> str:
    """A program of one operator on ``x``."""
    return f"program mesh({mesh})\n  x = input : f32[{dims}]\n  y = {expression}\n  return y"


def node_of(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if node.name == name)
