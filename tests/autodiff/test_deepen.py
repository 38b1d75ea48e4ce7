"""Equal blocks of which four are recorded: the program is that of recording each of them, name by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.autodiff import differentiate
from autopar.compiler import compile_program
from autopar.ir.program import AnyProgram
from tests import hugging_face
from tests.selection import slow_but

DEPTH, WIDTH = 9, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu()) * gain


class Wide(Block):
    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh()) * gain.exp()


class Dropping(Block):
    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.down(self.up(x)), 0.1)


class Model(nn.Module):
    """The gain is shared: its gradient is a sum over all blocks. ``adds``: so is the output."""

    def __init__(self, *kinds: type[Block], depth: int = DEPTH, adds: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.adds, self.gain = adds, nn.Parameter(torch.ones(WIDTH))
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(kinds[number % len(kinds)]() for number in range(depth))
        if tied:
            for block in self.blocks[1:]:  # type: ignore[index]
                block.up.weight = self.blocks[0].up.weight  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        aux = x.new_zeros(())
        for block in self.blocks:
            x = block(x, self.gain)
            aux = aux + x.square().mean()
        return x.square().mean() + (aux if self.adds else 0.0)


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.up(x).tanh(), y * self.down(y).sigmoid()


class Swapping(nn.Module):
    """One block takes what the one before it gives the other way round: the calls are equal, their places are not."""

    def __init__(self, *swapped: int, depth: int = DEPTH) -> None:
        super().__init__()
        self.swapped, self.embedding = swapped, nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Double() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        y = x * 2
        for number, block in enumerate(self.blocks):
            x, y = block(y, x) if number in self.swapped else block(x, y)
        return (x.square() + y).mean()


class Penalized(Model):
    """Uses the weights of its blocks outside of them too; ``returns``: gives one."""

    def __init__(self, *kinds: type[Block], returns: bool = False) -> None:
        super().__init__(*kinds)
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        loss = super().forward(x)
        if self.returns:
            return loss, self.blocks[4].up.weight  # type: ignore[union-attr]
        return loss + sum(weight.square().sum() for weight in self.blocks.parameters())


X = torch.linspace(-1, 1, 4 * 3 * WIDTH).view(4, 3, WIDTH)


def both(monkeypatch: pytest.MonkeyPatch, model: nn.Module, mesh: str, plan: Plan, **batch: Any) -> int:
    """How many graphs were made from those of fewer blocks; compares the program with one of all."""
    made: list[int] = []
    original = differentiate.deepened

    def counted(*given: Any) -> Any:
        found = original(*given)
        made.append(len(given[-1].dropped))
        return found

    def program() -> AnyProgram:
        return compile_program(model, Mesh.parse(mesh), plan, (), batch)

    with monkeypatch.context() as patch:
        patch.setattr(differentiate, "deepened", counted)
        deep = program()
    with monkeypatch.context() as patch:
        patch.setattr(differentiate, "repeat_of", lambda program: None)
        assert str(deep) == str(program())
    return len(made)


PLAIN = Plan(check_numerics=False)
CASES: dict[str, tuple[Callable[[], nn.Module], str, Plan, int]] = {
    "dp and tp": (lambda: Model(Block), "dp=2,tp=2", PLAIN, 1),
    "ZeRO": (lambda: Model(Block), "dp=2", Plan(zero=3, check_numerics=False), 1),
    "stages": (lambda: Model(Block, depth=18), "pp=2", Plan(microbatches=2, check_numerics=False), 2),
    "recomputed": (lambda: Model(Block), "dp=2", Plan(recompute="full", check_numerics=False), 1),
    "kinds in turns": (lambda: Model(Block, Wide, depth=18), "tp=2", PLAIN, 1),
    "a sum over blocks": (lambda: Model(Block, adds=True), "dp=2", PLAIN, 1),
    "a weight of all": (lambda: Model(Block, tied=True), "dp=2", PLAIN, 1),
    "dropout": (lambda: Model(Dropping), "dp=2", PLAIN, 0),  # each has numbers of its own
    "in another order once": (lambda: Swapping(4), "dp=2", PLAIN, 0),
    "in another order each time": (lambda: Swapping(*range(DEPTH)), "dp=2", PLAIN, 1),
    "in another order before the run": (lambda: Swapping(2, depth=12), "dp=2", PLAIN, 1),
    "a penalty on all weights": (lambda: Penalized(Block), "dp=2", PLAIN, 0),
    "a weight is returned": (lambda: Penalized(Block, returns=True), "dp=2", PLAIN, 0),
    "too few": (lambda: Model(Block, depth=5), "dp=2", PLAIN, 0),
}


@pytest.mark.parametrize("case", slow_but([1, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13], CASES))
def test_programs_are_those_of_all_blocks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, mesh, plan, expected = CASES[case]
    torch.manual_seed(0)
    assert both(monkeypatch, build(), mesh, plan, x=X) == expected


def test_stages_that_are_alike_are_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = Model(Block, depth=16), []
    original = differentiate.made_like
    plan = Plan(microbatches=2, check_numerics=False, cuts=("blocks.4", "blocks.8", "blocks.12"))

    def program() -> AnyProgram:
        return compile_program(model, Mesh.parse("pp=4,dp=2"), plan, (), {"x": X})

    with monkeypatch.context() as patch:
        patch.setattr(differentiate, "made_like", lambda *given: (found.append(original(*given)), found[-1])[1])
        alike = program()
    assert len([one for one in found if one is not None]) == 1  # the second and the third stage
    with monkeypatch.context() as patch:
        patch.setattr(differentiate, "made_like", lambda *given: None)
        assert str(alike) == str(program())


def test_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = hugging_face.build("llama", torch.float32, num_hidden_layers=DEPTH)
    assert both(monkeypatch, model, "dp=2,tp=2", PLAIN, **batch) == 1


def test_blocks_that_come_out_different_are_recorded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the forward calls are equal and the backward calls are not."""
    recorded = differentiate._recorded
    seen: list[int] = []

    def spoilt(program: Any, differentiable: Any, blocks: Any, *rest: Any) -> Any:
        found = recorded(program, differentiable, blocks, *rest)
        seen.append(len(blocks))
        middle = [node for node, block in found[0].blocks.items() if block == 2 and node not in found[1].forward]
        for node in middle[-1:] if blocks else ():
            node.args = (*node.args[:-1], 12345)
        return found

    monkeypatch.setattr(differentiate, "_recorded", spoilt)
    assert both(monkeypatch, Model(Block), "dp=2", PLAIN, x=X) == 0
    assert seen[0] > 0 and 0 in seen
