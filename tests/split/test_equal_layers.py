"""Equal layers of a deep mixture come out equal where the choice of layouts is too large to be exact."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.compiler import split_program
from autopar.ir import collectives as comm
from autopar.ir.blocks import block_of
from autopar.ir.node import Node, values
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.split import solve
from autopar.split.equal_calls import equal_nodes
from autopar.zoo.named import named_model

LAYERS, DENSE = 8, 1


def _program(mesh: Mesh, **options: Any) -> Program:
    sizes = {"num_hidden_layers": LAYERS, "first_k_dense_replace": DENSE}
    named = named_model("tiny:deepseek_v3", sizes, 8, 16)
    plan = Plan(check_numerics=False)
    found = split_program(named.model, mesh, plan, (), named.batch, **options)
    assert isinstance(found, Program)
    return found


def _layers(program: Program) -> list[list[str]]:
    """Of each layer its calls, without the numbers in their names."""
    found: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and block_of(node).startswith("model.layers."):
            found.setdefault(block_of(node), []).append(_line(node))
    return list(found.values())


def _line(node: Node) -> str:
    axis = comm.arguments_of(node)["axis"] if node.target in comm.TARGETS else ""
    return f"{node.target} {axis} {', '.join(str(kind.layout) for kind in values(node))}"


def test_equal_layers_of_a_deep_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(dp=2, ep=2, tp=2)
    exact = _layers(_program(mesh))
    tied = []
    original = solve.tied
    monkeypatch.setattr(solve, "tied", lambda model, groups: tied.append(len(model.sizes)) or original(model, groups))
    monkeypatch.setattr(solve, "LARGEST_TABLE", 2000)
    found = _layers(_program(mesh))
    assert tied, "each axis was chosen exactly: lower LARGEST_TABLE further"
    assert len(found) == LAYERS
    for one, other in pairwise(found[DENSE:-1]):
        assert one == other
    assert found[DENSE] == exact[DENSE + 1], "what is chosen for all layers is what is best for one in the middle"


def test_equal_nodes_of_layers() -> None:
    """Seven layers are of one kind; each weight of theirs is in a group too."""
    program = _program(Mesh(dp=2), after="pad_rows")
    groups = equal_nodes(program.graph)
    sizes = {len(group) for group in groups}
    assert sizes == {LAYERS - DENSE}, sizes
    named = {node.name for group in groups for node in group}
    weights = [
        entry.node for entry in program.inputs if ".layers.3." in entry.target and entry.kind.name == "PARAMETER"
    ]
    assert len(weights) > 10 and named.issuperset(weights)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def test_what_a_plan_wants_of_some_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers that are to be split otherwise are, and the others are split as they would be without them."""
    model = nn.ModuleDict({"layers": nn.Sequential(*(Block() for _ in range(6)))})
    model.forward = lambda x: model["layers"](x).square().mean()

    def splits(**wanted: str) -> dict[str, str]:
        plan = Plan(check_numerics=False, tensor={f"layers.{place}.up.weight": form for place, form in wanted.items()})
        program = split_program(model, Mesh(tp=2), plan, (torch.randn(8, 64),))
        assert isinstance(program, Program)
        inputs = program.placeholders(InputKind.PARAMETER)
        return {entry.target: str(values(node)[0].layout) for node, entry in inputs if ".up.weight" in entry.target}

    exact = splits()
    monkeypatch.setattr(solve, "LARGEST_TABLE", 30)
    found = splits(**{"1": "row", "3": "replicate"})
    assert len(set(exact.values())) == 1 and splits() == exact
    for name, layout in found.items():
        row, whole = "[256,64@tp]", "[256,64]"
        assert layout == {"1": row, "3": whole}.get(name.split(".")[1], exact[name]), found
