"""Blocks that are alike: what is written out for them is what tracing each of them gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from autopar.frontend import equal_blocks, exported
from autopar.frontend.block_copies import number_calls
from autopar.frontend.equal_blocks import TRACED, EqualBlocks, blocks_of
from autopar.frontend.trace import trace
from autopar.ir.node import origin, values
from autopar.ir.program import Program
from autopar.observation.observation import guards_of_traces
from autopar.plan import Plan
from tests import hugging_face

DEPTH, WIDTH = 6, 4
STAMPED = DEPTH - TRACED


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.act: Callable[[Tensor], Tensor] = partial(torch.nn.functional.gelu, approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * self.scale


class Block(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.linear, self.inner, self.dropout = nn.Linear(WIDTH, WIDTH), Inner(), nn.Dropout(0.0)
        self.register_buffer("offset", torch.ones(WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return x + self.inner(self.dropout(self.linear(x))) + self.offset


class Passing(Block):
    """Gives what it takes besides what it makes."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return super().forward(x) * mask, mask


class OfItsDict(Block):
    """Reads an attribute past what tells of attributes."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return super().forward(x) * self.__dict__["number"]


class Slotted(Block):
    __slots__ = ("kept",)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return super().forward(x) * self.kept


class ByModule:
    """A descriptor with a value for each object."""

    def __init__(self) -> None:
        self.entries: dict[int, float] = {}

    def __get__(self, owner: Any, cls: type) -> Any:
        return self.entries[id(owner)]

    def __set__(self, owner: Any, value: float) -> None:
        self.entries[id(owner)] = value


class Described(Block):
    kept = ByModule()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return super().forward(x) * self.kept


class Dunder(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return super().forward(x) * self.__kept__


class Writing(Block):
    """Writes into what it computes, and into a buffer."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = self.linear(x)
        y += x
        self.offset.mul_(0.5)
        return y.relu_() + self.offset


class Filling(Block):
    """Writes into what it makes, and into views of that."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = x.new_zeros(x.shape)
        y[:, :2].copy_(self.linear(x)[:, :2])
        y[:, 2:].add_(x[:, 2:])
        return y + self.offset


class Model(nn.Module):
    def __init__(self, block: Callable[[int], nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(number) for number in range(DEPTH))
        self.passes = block is Passing
        self.first = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x * self.first  # so that all blocks take a tensor with a gradient
        for block in self.blocks:
            if self.passes:
                x, mask = block(x, mask)
            else:
                x = block(x)
        return x.sum()


def text_of(program: Program) -> list[str]:
    """All that a graph says, line by line: names, operators, arguments, values, origins."""
    return [
        f"{node.name} {node.target if node.op == 'call_function' else node.op} {node.args} {node.kwargs} "
        + (f"{values(node)} {origin(node)}" if node.op != "output" else "")
        for node in program.graph.nodes
    ]


@contextmanager
def all_traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(equal_blocks, "FEWEST", 1000)
        yield


def stamped(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """How many calls were not traced. The program and what was read are those of a trace of all."""
    found: list[EqualBlocks] = []
    original = EqualBlocks.__init__
    with monkeypatch.context() as patch:
        patch.setattr(EqualBlocks, "__init__", lambda self, *given: (original(self, *given), found.append(self))[0])
        with guards_of_traces() as guards:
            program = trace(model, args, kwargs, plan=Plan(check_numerics=False))
    with all_traced(monkeypatch), guards_of_traces() as of_all:
        whole = trace(model, args, kwargs, plan=Plan(check_numerics=False))
    if text_of(program) != text_of(whole):  # torch numbers the calls that it leaves out in between, as it decomposes
        assert not found[-1].stamped or isinstance(model.get_submodule("blocks.0"), Filling)
        number_calls(program.graph)
        number_calls(whole.graph)
    assert text_of(program) == text_of(whole)
    assert {one.label for one in guards.readings} >= {one.label for one in of_all.readings}
    return found[-1].stamped


X = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
MASK = torch.tensor([[1.0], [0.0], [1.0]])


def changed(**attributes: Any) -> Model:
    """With ``attributes`` set on submodules (``inner__scale``) of the blocks, one value per block."""
    model = Model()
    for name, entries in attributes.items():
        for block, entry in zip(model.blocks, entries):
            path, _, key = name.rpartition("__")
            setattr(block.get_submodule(path), key, entry)
    return model


def of_kind(block: Callable[[int], nn.Module], name: str) -> Model:
    """The last block is another, by an attribute in an unusual place."""
    model = Model(block)
    for number, each in enumerate(model.blocks):
        setattr(each, name, 2.0 if number == DEPTH - 1 else 1.0)
    return model


def hooked() -> Model:
    model = Model()
    inner: Any = model.blocks[4]
    inner.inner.register_forward_hook(lambda module, args, output: output * 2)
    return model


def shared() -> Model:
    model = Model()
    blocks: Any = model.blocks
    for block in blocks[1:]:
        block.inner, block.linear.weight = blocks[0].inner, blocks[0].linear.weight
    return model


def frozen() -> Model:
    model = Model()
    for block in model.blocks[3:]:  # type: ignore[index]
        block.requires_grad_(False)
    return model


def wider() -> Model:
    model = Model()
    block: Any = model.blocks[4]
    block.linear = nn.Sequential(nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH))
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], int]] = {
    "plain": (Model, (X,), STAMPED),
    "a number that is not read differs": (lambda: changed(number=[3, 1, 4, 1, 5, 9]), (X,), STAMPED),
    "a number that is read differs": (lambda: changed(inner__scale=[1.0, 1.0, 1.0, 2.0, 1.0, 1.0]), (X,), 3),
    "each has its own": (lambda: changed(inner__scale=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), (X,), 0),
    "a kind behind another": (lambda: changed(inner__scale=[1.0, 1.0, 1.0, 2.0, 2.0, 2.0]), (X,), 2),
    "two kinds in turns": (lambda: changed(inner__scale=[1.0, 2.0] * 3), (X,), 2),
    "a function of their own": (lambda: changed(inner__act=[lambda x: x.abs() for _ in range(6)]), (X,), 0),
    "dropout": (lambda: changed(dropout__p=[0.5] * 6), (X,), STAMPED),
    "dropout in some": (lambda: changed(dropout__training=[True, False] * 3, dropout__p=[0.5] * 6), (X,), 2),
    "a hook within": (hooked, (X,), 3),
    "shared parts": (shared, (X,), STAMPED),
    "frozen blocks": (frozen, (X,), 2),
    "another module within": (wider, (X,), 3),
    "arguments passed on": (lambda: Model(Passing), (X, MASK), STAMPED),
    "writes": (lambda: Model(Writing), (X,), STAMPED),
    "what vars has": (lambda: of_kind(OfItsDict, "number"), (X,), STAMPED - 1),
    "a slot": (lambda: of_kind(Slotted, "kept"), (X,), STAMPED - 1),
    "a descriptor": (lambda: of_kind(Described, "kept"), (X,), 0),
    "a name of Python's kind": (lambda: of_kind(Dunder, "__kept__"), (X,), STAMPED - 1),
    "writes into what it makes": (lambda: Model(Filling), (X,), STAMPED),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_written_out_as_they_would_be_traced(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, args, expected = CASES[case]
    torch.manual_seed(0)
    monkeypatch.setattr(exported, "_built", None)  # which would trace all of them
    assert stamped(monkeypatch, build(), *args) == expected


@pytest.mark.parametrize(("block", "is_short"), [(Filling, True), (Writing, False), (Block, True)])
def test_the_graph_is_decomposed_while_it_is_short(
    block: type[Block], is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where blocks write into nothing but what they make."""
    found: list[bool] = []
    plain = exported.writes_within_blocks
    monkeypatch.setattr(exported, "writes_within_blocks", lambda graph: found.append(plain(graph)) or found[-1])
    trace(Model(block), (X,))
    assert found[0] is is_short


class Collecting(Model):
    """Blocks leave something in a list that they are given; it is more than what they return."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        found: list[Tensor] = []
        x = x * self.first
        for block in self.blocks:
            x = block(x, found)
        return x.sum() + torch.stack(found).sum()


class Leaving(Block):
    def forward(self, x: Tensor, mask: Any = None) -> Any:
        mask.append(self.linear(x).mean())
        return super().forward(x)


class Marking(Model):
    """Blocks that leave something on a tensor."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x * self.first
        for block in self.blocks:
            x = block(x)
            x = x * x.mark  # type: ignore[attr-defined]
        return x.sum()


class Marked(Block):
    def forward(self, x: Tensor, mask: Any = None) -> Any:
        result = super().forward(x)
        result.mark = 2.0
        return result


class Casting(Model):
    """Later blocks run in another type."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x * self.first
        for number, block in enumerate(self.blocks):
            with torch.autocast("cpu", torch.bfloat16, enabled=number >= 4):
                x = block(x).float()
        return x.sum()


class Ungraded(Model):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x * self.first
        for number, block in enumerate(self.blocks):
            with torch.set_grad_enabled(number >= 3):
                x = block(x)
        return x.sum()


@pytest.mark.parametrize(
    "model", [Collecting(Leaving), Marking(Marked), Casting(), Ungraded()], ids=lambda model: type(model).__name__
)
def test_what_blocks_do_besides_is_seen(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    stamped(monkeypatch, model, X)


class Counting(Block):
    """What it computes depends on how often it was called: no trace of two can tell."""

    calls = [0]

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        self.calls[0] += 1
        return super().forward(x) * self.calls[0]


def test_blocks_that_came_out_different_are_all_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block is taken for the first; that it is not is found in the graph."""
    monkeypatch.setattr(equal_blocks, "are_alike", lambda *given: True)
    model = changed(inner__scale=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    program = trace(model, (X,))  # compares numbers with the model
    with all_traced(monkeypatch):
        assert text_of(program) == text_of(trace(model, (X,)))


class Making(Block):
    """Makes a tensor of numbers, which all blocks share then."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return self.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_constants_of_blocks_are_the_traced_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(Making)
    program = trace(model, (X,))
    with all_traced(monkeypatch):
        assert len(program.constants) < len(trace(model, (X,)).constants) == DEPTH
    (loss,) = fx.Interpreter(fx.GraphModule(nn.Module(), program.graph)).run(*inputs_of(program, model))
    assert torch.equal(loss, model(X))


def inputs_of(program: Program, model: nn.Module) -> list[Tensor]:
    known = dict(model.named_parameters()) | dict(model.named_buffers()) | program.constants
    return [known.get(entry.target, X) for entry in program.inputs]


def test_a_count_of_calls_is_refused() -> None:
    from autopar.errors import TraceError

    with pytest.raises(TraceError, match="calls"):
        trace(Model(Counting), (X,))


def test_guards_of_a_block_that_was_not_traced() -> None:
    """A change of what would have been read makes another program."""
    model = Model()
    with guards_of_traces() as guards:
        trace(model, (X,))
    assert guards.hold()
    block: Any = model.blocks[4]
    block.inner.scale = 3.0
    assert not guards.hold()


def test_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = hugging_face.build("llama", torch.float32, num_hidden_layers=DEPTH)
    assert stamped(monkeypatch, model, **batch) == STAMPED


def test_blocks_are_the_outermost_ones() -> None:
    model = Model(lambda number: nn.Sequential(*(Block(inner) for inner in range(5))))
    assert blocks_of(model) == list(model.blocks)
    assert blocks_of(nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))) == []


def test_no_operator_of_ours_is_left() -> None:
    program = trace(Model(), (X,))
    assert isinstance(program.graph, fx.Graph)
    assert not [node for node in program.graph.nodes if "block" in str(node.target) and node.op == "call_function"]
