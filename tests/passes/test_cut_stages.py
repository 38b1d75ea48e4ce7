"""Stages: where the graph is cut, who holds which parameter, what is pinned and what is warned of."""

from __future__ import annotations

from dataclasses import replace

import torch

from autopar.frontend.numerics import run_graph
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.ir.tables import InputKind, Pins
from autopar.passes.cut_stages import cut_stages
from autopar.plan import Plan

TEXT = """
program mesh(pp=2)
  x = input                     : f64[6,64]
  u = param u                   : f64[64,64]
  v = param v                   : f64[64,64]
  w = param w                   : f64[64,64]
  z = param z                   : f64[64,64]
  a = aten.linear(x, u)         : f64[6,64]
  b = aten.linear(a, v)         : f64[6,64]
  c = aten.linear(b, w)         : f64[6,64]
  d = aten.linear(c, z)         : f64[6,64]
  return d
"""


def program(text: str = TEXT, **plan: int) -> Program:
    return parse(text, Plan(**{"microbatches": 4, **plan}))


def parameters(stage: Program) -> list[str]:
    return [entry.target for _, entry in stage.placeholders(InputKind.PARAMETER)]


def test_stages_are_of_equal_cost_and_hold_what_they_use() -> None:
    first, second = cut_stages(program()).stages
    assert parameters(first) == ["u", "v"] and parameters(second) == ["w", "z"]
    assert [str(entry.target) for entry in first.outputs] == ["1.b"]


def test_the_stages_one_after_the_other_are_the_model() -> None:
    whole = program()
    first, second = cut_stages(whole).stages
    x, u, v, w, z = (
        torch.randn(shape, dtype=torch.float64) for shape in ((6, 64), (64, 64), (4, 64), (64, 4), (64, 64))
    )
    given = {"x": x, "u": u, "v": v, "w": w, "z": z}
    (sent,) = run_graph(first.graph, [given[node.name] for node in first.graph.nodes if node.op == "placeholder"])
    given["b"] = sent
    (found,) = run_graph(second.graph, [given[node.name] for node in second.graph.nodes if node.op == "placeholder"])
    assert torch.equal(found, run_graph(whole.graph, [x, u, v, w, z])[0])


def test_a_cut_that_is_pinned_is_kept() -> None:
    pinned = replace(program(), pins=Pins(stages={"a": 0, "b": 1, "c": 1, "d": 1}))
    after = cut_stages(pinned)
    assert parameters(after.stages[0]) == ["u"]
    assert {name: decision.stage for name, decision in after.decisions["pp"].items()} == pinned.pins.stages


def test_pins_of_other_nodes_pin_nothing() -> None:
    pinned = replace(program(), pins=Pins(stages={"a": 0, "e": 1}))
    assert str(cut_stages(pinned)) == str(cut_stages(program()))


def test_without_pipeline_ranks_nothing_is_cut() -> None:
    before = program(TEXT.replace("pp=2", "dp=2"))
    after = cut_stages(before)
    assert isinstance(after, Program) and str(after) == str(before)
