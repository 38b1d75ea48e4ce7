"""A graph of few blocks is decomposed without the parameters of the others, and has all of them in their places."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from autopar.frontend import exported
from autopar.frontend.equal_blocks import AGAIN, BlocksDiffer
from autopar.frontend.short_decomposition import decomposed_without_copies
from autopar.frontend.trace import trace
from autopar.ir.node import origin
from autopar.plan import Plan

DEPTH, TRACED = 7, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 6), nn.Linear(6, 4, bias=False), nn.LayerNorm(4)

    def forward(self, x: Tensor, lent: Tensor) -> Tensor:
        first, second = self.up(self.norm(x)).chunk(2, -1)  # chunk has to be decomposed
        return x + self.down(torch.cat([first.relu(), second], -1)) * lent


class Deep(nn.Module):
    """A parameter stands before the blocks, one behind them, one is of no use, one is behind what all take."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.first, self.lent = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
        self.idle, self.last = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x, lent = x * self.first, self.lent.exp()
        for block in self.blocks:
            x = block(x, lent)
        return (x * self.last).sum()


def test_only_parameters_of_traced_blocks_are_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Deep(), list[int]()
    plain = exported.decomposed

    def decompose(program: ExportedProgram) -> ExportedProgram:
        seen.append(len(program.graph_signature.input_specs))
        return plain(program)

    monkeypatch.setattr(exported, "decomposed", decompose)
    program = trace(model, (torch.randn(3, 4),), plan=Plan(check_numerics=False))
    of_block = len(list(Block().parameters()))
    assert seen == [TRACED * of_block + len(["first", "lent", "idle", "last", "x"])]
    assert [entry.target for entry in program.inputs[:-1]] == [name for name, _ in model.named_parameters()]
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    assert {entry.target for entry in program.inputs if entry.node not in used} == {"idle"}


class Turns(Block):
    """Blocks that differ in what Python reads of them, and make the same calls."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = Turns.count % 2
        Turns.count += 1

    def forward(self, x: Tensor, lent: Tensor) -> Tensor:
        return super().forward(x, lent if self.scale else lent)


@pytest.mark.parametrize(("block", "kinds"), [(Block, 1), (Turns, 2)])
def test_of_two_equal_blocks_one_is_decomposed(block: type[Block], kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = exported.decomposed, list[int]()

    def decompose(program: ExportedProgram) -> ExportedProgram:
        seen.append(sum(node.target is torch.ops.aten.chunk.default for node in program.graph.nodes))
        return plain(program)

    monkeypatch.setattr(exported, "decomposed", decompose)
    monkeypatch.setattr(exported, "_built", None)  # which would trace all of them
    program = trace(Deep(block), (torch.randn(3, 4),))  # compared with the model
    assert seen == [kinds]
    assert sum(node.target is torch.ops.aten.layer_norm.default for node in program.graph.nodes) == DEPTH
    assert {origin(node).module.split(".")[1] for node in program.graph.nodes if "blocks." in origin(node).module} == {
        str(number) for number in range(DEPTH)
    }


def renamed(program: ExportedProgram) -> ExportedProgram:
    node = next(node for node in program.graph.nodes if node.op == "placeholder")
    node.name = "elsewhere"
    return program


def occupied(program: ExportedProgram) -> ExportedProgram:
    node = next(node for node in program.graph.nodes if node.op == "call_function")
    node.name = "p_blocks_3_up_weight"
    return program


def fed(program: ExportedProgram) -> ExportedProgram:
    node = next(node for node in program.graph.nodes if node.target is AGAIN)
    node.update_arg(0, [*node.args[0], node.args[0][0]])
    return program


@pytest.mark.parametrize("torch_does", [renamed, occupied, fed])
def test_what_cannot_be_put_back_is_refused(
    torch_does: exported.Callable[[ExportedProgram], ExportedProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[BlocksDiffer] = []

    def decompose(program: ExportedProgram, _: object, traced: Collection[int]) -> ExportedProgram:
        try:
            return decomposed_without_copies(program, torch_does, traced)
        except BlocksDiffer as problem:
            refused.append(problem)
            raise

    monkeypatch.setattr(exported, "decomposed_without_copies", decompose)
    program = trace(Deep(), (torch.randn(3, 4),))  # all blocks are traced then, and compared with the model
    assert len(refused) == 1
    assert sum(node.target is torch.ops.aten.layer_norm.default for node in program.graph.nodes) == DEPTH
