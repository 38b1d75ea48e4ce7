"""Why a value is laid out as it is, in words, for all that a name stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopar import Mesh, Plan
from autopar.analysis.layout_words import choice_words, size_words
from autopar.compiler import split_program
from autopar.ir.layout import REPLICATED, Layout, Partial, Split
from autopar.ir.node import Value
from autopar.ir.program import AnyProgram


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([*[Block(256, 1024) for _ in range(4)], Block(256, 2048)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.fixture(scope="module")
def program() -> AnyProgram:
    return split_program(Model(), Mesh(dp=2, tp=2), Plan(), (torch.randn(64, 256),))


def test_a_parameter(program: AnyProgram) -> None:
    lines = program.explain("blocks.0.down.weight").splitlines()
    assert lines[0] == "blocks.0.down.weight: [256, 1024/tp] of float32"
    assert "  dp      whole on every rank: only one way to run it" in lines
    device = "a device of 300 Tflop/s with links of 100 GB/s"
    assert f"  tp      split by columns over tp, because that costs least on {device}:" in lines
    assert any(
        line.strip().startswith("whole on every rank would cost") and line.endswith("us a step more") for line in lines
    )


def test_a_node_and_the_sum_that_follows(program: AnyProgram) -> None:
    lines = program.explain("linear_1").splitlines()
    assert lines[0] == "linear_1: [64/dp, 256] of float32, a summand on each rank of tp"
    assert "  module  blocks.0.down" in lines and "  dp      split over dp: only one way to run it" in lines
    assert any(
        line.startswith("  then    all_reduce = all_reduce over tp of [64, 256], of blocks.0.down") for line in lines
    )


@pytest.mark.parametrize("name", ["up", "blocks.0.up", "*.up.*", "up.weight", "blocks.4"])
def test_a_module_a_part_of_a_path_and_a_pattern(program: AnyProgram, name: str) -> None:
    titles = [part.splitlines()[0] for part in program.explain(name).split("\n\n")]
    if name in ("up", "*.up.*", "up.weight"):
        assert titles[0] == "blocks.0.up.weight: [1024/tp, 256] of float32  (and 3 alike, to blocks.3.up.weight)"
        assert "blocks.4.up.weight: [2048/tp, 256] of float32" in titles, "it has other sizes"
    if name in ("up", "blocks.0.up"):
        assert any(title.startswith("linear: [64/dp, 1024/tp]") for title in titles), "its product too"
    if name == "blocks.4":
        assert {title.split(":")[0] for title in titles} == {
            "blocks.4.up.weight", "blocks.4.up.bias", "blocks.4.down.weight", "blocks.4.down.bias", "linear_8",
            "linear_9",
        }  # fmt: skip


def test_a_name_that_stands_for_nothing(program: AnyProgram) -> None:
    with pytest.raises(ValueError, match="'blocks.0.upp'; near it: .*blocks.0.up.*\nWay out: a parameter, a module"):
        program.explain("blocks.0.upp")


def test_words() -> None:
    assert choice_words("S(0)", True) == "split by rows" and choice_words("S(0)", False) == "split along dim 0"
    assert choice_words("S(2)", True) == "split along dim 2", "of a stack of matrices"
    assert choice_words("S(0,outer=3)", True) == "split by rows, each of 3 blocks"
    assert (
        choice_words("S(1,outer=2,mirrored)", False) == "split along dim 1, each of 2 blocks, dealt out back and forth"
    )
    assert choice_words("S(0,ratio=4+2+2)", True) == "split by rows, in segments as 4 to 2 to 2"
    assert choice_words("P(max)", False) == "a candidate for the max on each rank"
    assert choice_words("k: S(2), S(1) -> P", False) == (
        "a part of k on each rank (operands split along dim 2, split along dim 1; result summands)"
    )
    assert choice_words("ring attention, zig-zag order", False) == "ring attention, zig-zag order"
    mesh = Mesh(dp=2, tp=2)
    kind = Value(torch.float32, Layout.whole((8, 6)))
    for axis, placement in (("dp", Split(0)), ("tp", REPLICATED)):
        kind = Value(kind.dtype, kind.layout.place(axis, placement, mesh))
    assert size_words(kind, mesh) == "[8/dp, 6] of float32"
    kind = Value(kind.dtype, kind.layout.place("tp", Partial("sum"), mesh))
    assert size_words(kind, mesh) == "[8/dp, 6] of float32, a summand on each rank of tp"
