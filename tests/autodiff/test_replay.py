"""Calls that are listened to once: the joint graph is that of recording the whole program, name by name."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from autopar import Mesh, Plan
from autopar.autodiff import call_records, differentiate
from autopar.autodiff.call_records import Calls, Given, Step, Unheard
from autopar.autodiff.forward_run import ForwardRun
from autopar.autodiff.outline import Outline
from autopar.autodiff.partition import Joint
from autopar.autodiff.recorder import Recorder, fake_mode
from autopar.autodiff.replay import ReplayRun
from autopar.compiler import split_program
from autopar.ir.node import origin, values
from autopar.ir.program import Program
from autopar.models import bert, dlrm, gpt, moe, t5, vit
from tests.selection import slow_but

aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(6, 6)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight).sum()


def used_later_too(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y * y + y.sin() * y.cos() - (y / y.exp())  # gradients of y arrive from six operators, twice from one


def some_parts_unused(x: Tensor, w: Tensor) -> Tensor:
    first, _, last = (x @ w).split(2, -1)
    return first.relu() * last + (x @ w).topk(2).values


def strided(x: Tensor, w: Tensor) -> Tensor:
    y = (x @ w).t()
    return y[1:3].t().reshape(-1) * y.expand(2, 6, 4)[1].t()[:, ::3].flatten()


def numbers(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y * 0.0 + y * -0.0 + y * 1 + y * 1.0 + y.pow(2) + y.pow(2.0) + y.pow(1)


def in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    y[:, 1] = y[:, 0] * 2
    return y.cumprod(-1) + y.index_put((torch.tensor([0, 1]),), y[2:])


def stopped(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    return y * y.detach() + torch.where(y > 0, y, y.new_zeros(())) + y.argmax(-1)[:, None]


def normalised(x: Tensor, w: Tensor) -> Tensor:
    y = nn.functional.layer_norm(x @ w, (6,), w[0], w[1])
    return nn.functional.softmax(y, -1) + nn.functional.gelu(w.sum(0)) * y.var(-1, keepdim=True)


FUNCTIONS = [used_later_too, some_parts_unused, strided, numbers, in_place, stopped, normalised]


def both(program: Program) -> tuple[tuple[Joint, Recorder], tuple[Joint, Recorder]]:
    """The joint graphs by calls, and of the whole."""

    def recorder() -> Recorder:
        return Recorder(fx.Graph(), program.mesh, (node.name for node in program.graph.nodes))

    made = []
    with Calls(program.mesh) as calls:
        one = recorder()
        made.append((differentiate._run(ReplayRun(program, one, {}, calls), None)[1], one))
    with fake_mode(), recorder() as other:
        made.append((differentiate._run(ForwardRun(program, other, {}), None)[1], other))
    return made[0], made[1]


def lines(joint: Joint) -> list[tuple[Any, ...]]:
    parts = (joint.inputs, joint.tangents, joint.outputs, joint.gradients)
    tables = [(tuple(node.name for node in nodes),) for nodes in parts]
    nodes = [
        (str(node), node.target, str(node.args), str(node.kwargs), values(node), origin(node), node in joint.forward)
        for node in joint.graph.nodes
    ]
    return [*nodes, *tables]


def split(model: nn.Module, mesh: Mesh, *args: Any, plan: Plan | None = None, **kwargs: Any) -> Program:
    program = split_program(model, mesh, plan or Plan(), args, kwargs)
    assert isinstance(program, Program)
    return program


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    (replayed, _), (recorded, _) = both(split(Function(function), Mesh(), torch.randn(4, 6)))
    assert lines(replayed) == lines(recorded)


MESHES = [(Mesh(dp=2, tp=2), Plan()), (Mesh(dp=2, sp=2), Plan(zero=3)), (Mesh(dp=2, ep=2), Plan(zero=1))]
MODELS = {moe: 3, gpt: 2, t5: 2, vit: 1, bert: 2, dlrm: 1}  # on how many of them
ROWS = [(model, place) for model in MODELS for place in range(len(MESHES)) if place < MODELS[model]]


@pytest.mark.parametrize(("model", "place"), slow_but([0], ROWS))
def test_models(model: Any, place: int) -> None:
    mesh, plan = MESHES[place]
    built = model.build()
    (replayed, _), (recorded, _) = both(split(built, mesh, plan=plan, **model.example_batch(built, batch=4)))
    assert lines(replayed) == lines(recorded)


def test_alike_calls_are_listened_to_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = list[Any]()
    forward = call_records._Listening.forward

    def counted(self: Any, *rest: Any) -> Any:
        heard.append(rest)
        return forward(self, *rest)

    monkeypatch.setattr(call_records._Listening, "forward", counted)
    numbers_heard = []
    for depth in (2, 6):
        heard.clear()
        program = split(nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)]), Mesh(dp=2), torch.randn(4, 4))
        differentiate.role_of(program, (0,))
        numbers_heard.append(len(heard))
    assert numbers_heard[0] == numbers_heard[1] > 0


def test_without_records_the_program_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    program = split(Function(used_later_too), Mesh(), torch.randn(4, 6))
    expected = str(differentiate.differentiate(program))

    def unheard(*_: Any) -> Any:
        raise Unheard("for a test")

    monkeypatch.setattr(call_records._Listening, "derivative", unheard)
    assert str(differentiate.differentiate(program)) == expected


def test_parts_of_a_gradient_arrive_one_by_one() -> None:
    def thrice(recorder: Recorder, args: Any, kwargs: Any) -> Tensor:
        (x,) = args
        return x.sin() * x.cos() + x.exp()

    outline = Outline(torch.float32, torch.Size((4,)), (1,), 0, 0, True)
    heard = Calls(Mesh()).record(thrice, "thrice", (outline,), {}).derivative([outline])
    targets = [step.target for step in heard.steps if isinstance(step, Step)]
    assert [step.operand for step in heard.steps if isinstance(step, Given)] == [0, 0, 0]
    assert aten.add.Tensor not in targets


def test_an_operand_that_is_written_into_is_unheard() -> None:
    def writing(recorder: Recorder, args: Any, kwargs: Any) -> Tensor:
        (x,) = args
        return x.add_(1)

    outline = Outline(torch.float32, torch.Size((4,)), (1,), 0)
    with pytest.raises(Unheard, match="others may see"):
        Calls(Mesh()).record(writing, "writing", (outline,), {})


def test_what_torch_saved_goes() -> None:
    """Also where an operator saves its own result, and where nobody asks for a derivative."""
    outline = Outline(torch.float32, torch.Size((4,)), (1,), 0, 0, True)
    kept = list[Any]()
    for asks in (True, False):
        with Calls(Mesh()) as calls:
            record = calls.record(lambda _, args, __: args[0].exp(), "exp", (outline,), {})
            assert record.listening is not None
            kept += [weakref.ref(tensor) for tensor in record.listening.tensors]
            if asks:
                record.derivative([outline])
        del record
    gc.collect()
    assert kept and not any(tensor() is not None for tensor in kept)
