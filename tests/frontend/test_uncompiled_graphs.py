"""Graph modules that are made without Python compute the same, get it when they are called, and keep it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, fx, nn

from autopar.frontend import exported
from autopar.frontend.trace import trace
from autopar.frontend.uncompiled_graphs import compiled_when_called
from autopar.plan import Plan


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear(x).chunk(2, -1)
        with torch.no_grad():  # a graph of its own
            scale = second.exp().mean()
        return (first * scale).sum()


def graph_module() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, 1)))
    return fx.GraphModule({}, graph)


def test_python_is_made_when_the_module_is_called() -> None:
    with compiled_when_called():
        module = graph_module()
        assert "_code" not in vars(module), "torch makes the Python of a graph module elsewhere: nothing is saved"
        torch.testing.assert_close(module(torch.ones(2)), torch.full((2,), 2.0))
        assert "torch.add" in module.code
        later = graph_module()
    torch.testing.assert_close(later(torch.ones(2)), torch.full((2,), 2.0))
    (added,) = later.graph.find_nodes(op="call_function", target=torch.add)
    added.update_arg(1, 5)
    later.recompile()
    torch.testing.assert_close(later.forward(torch.ones(2)), torch.full((2,), 6.0))


def test_code_that_is_read_is_that_of_the_graph() -> None:
    module = graph_module()
    (added,) = module.graph.find_nodes(op="call_function", target=torch.add)
    with compiled_when_called(), compiled_when_called():
        added.update_arg(1, 5)
        module.recompile()
        assert "torch.add(x, 5)" in module.code and "torch.add(x, 5)" in str(module)
        added.update_arg(1, 6)
        module.recompile()
    assert module._lineno_map is not None
    assert "torch.add(x, 6)" in module.code


def test_a_forward_around_that_of_the_class() -> None:
    with compiled_when_called():
        module = graph_module()
        own = module.forward
        module.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]
    for _ in range(2):
        torch.testing.assert_close(module(torch.ones(2)), torch.full((2,), 4.0))


def test_packed_arguments_have_their_signature_at_once() -> None:
    with compiled_when_called():
        module = fx.symbolic_trace(Small(), concrete_args={"x": (fx.PH,)})
    assert "def forward(self, x)" in module.code


def test_programs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[int]()
    at_once = fx.GraphModule.recompile
    monkeypatch.setattr(fx.GraphModule, "recompile", lambda module: made.append(1) or at_once(module))
    torch.manual_seed(0)
    model, x = Small(), torch.randn(2, 4)
    few = str(trace(model, (x,), plan=Plan(check_numerics=False)))
    count = len(made)
    made.clear()
    monkeypatch.setattr(exported, "compiled_when_called", nullcontext)
    assert str(trace(model, (x,), plan=Plan(check_numerics=False))) == few
    assert 2 * count < len(made)
