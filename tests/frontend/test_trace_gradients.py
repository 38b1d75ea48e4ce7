"""Tracing: where gradients stop and flow is what it was in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autopar.frontend.numerics import gradient_error
from autopar.frontend.trace import trace
from autopar.ir.node import value
from tests.frontend.test_trace import UNCHECKED, Base, run

aten = torch.ops.aten


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)))


class Detach(Base):
    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.v).detach() * (x @ self.w)).sum()


class Data(Base):
    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.v).data * (x @ self.w) + x @ self.w.data).sum()


class NoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = (x @ self.v).relu()
            target.add_(1)
        return (target * (x @ self.w)).sum()


class NoGradOfActivation(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.v
        with torch.no_grad():
            scale = y.abs().amax(-1, keepdim=True)
            same = y.to(y.dtype)  # y itself: keeps its gradient
            with torch.enable_grad():
                z = y * self.w
        return (y / scale + same + z).sum()


class NoGradOfAttributes(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.v
        with torch.no_grad():
            turned, again, same = self.w.T + 1, self.v.mT, y.real  # y itself
        return (x @ turned + x @ again + same * y).sum()


class NoGradInAutocast(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ self.v
            with torch.no_grad():
                target = y @ self.w
            z = y @ self.w
        return (target * z).float().sum()


class Inference(Base):
    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ self.v, -1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x @ self.w + x @ self.v, self.target(x))


class CopyWithoutGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        kept = torch.zeros(4, 4)
        with torch.no_grad():
            kept.copy_(self.v)
        kept[0] = x[0] @ self.w
        return (kept * self.w).sum()


@pytest.mark.parametrize(
    "kind",
    [Detach, Data, NoGrad, NoGradOfActivation, NoGradOfAttributes, NoGradInAutocast, Inference, CopyWithoutGradient],
)
@pytest.mark.parametrize("under", [torch.enable_grad, torch.no_grad])
def test_gradients_stop_where_they_did(kind: type[Base], under: Any) -> None:
    model, x = kind(), torch.randn(4, 4)
    with under():
        program = trace(model, (x,), plan=UNCHECKED)
    found, expected = gradients(model, run(program, model, x)), gradients(model, model(x))
    # no gradient may be there as zeros or as None
    assert max(gradient_error(found, expected).values()) < 1e-5


def test_autocast_is_in_the_graph() -> None:
    program = trace(NoGradInAutocast(), (torch.randn(4, 4),))
    matmuls = [node for node in program.graph.nodes if "matmul" in node.name or node.target is aten.mm.default]
    assert len(matmuls) == 3 and all(value(node).dtype == torch.bfloat16 for node in matmuls)


def test_requires_grad_follows_the_values() -> None:
    class Mixed(Base):
        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            y = x @ self.w
            values, order = y.topk(2)
            return y, y.detach(), values, order, torch.zeros_like(y) + x, x * 2, y > 0, self.w[ids]

    program = trace(Mixed(), (torch.randn(4, 4), torch.arange(2)))
    needs = [value(node).requires_grad for node in program.returned]
    assert needs == [True, False, True, False, False, False, False, True]


def test_gradients_of_float_inputs_are_kept_where_asked() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    (node,) = trace(Detach(), (x,)).returned
    assert value(node).requires_grad
    frozen = Detach().requires_grad_(False)
    (node,) = trace(frozen, (x,)).returned
    assert value(node).requires_grad
    (node,) = trace(frozen, (x.detach(),)).returned
    assert not value(node).requires_grad


def test_operator_with_registered_formula_stays_whole() -> None:
    @torch.library.custom_op("autopar_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_fake(lambda x: torch.empty_like(x))
    double.register_autograd(lambda ctx, grad: grad * 123)

    class Own(Base):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = double(x @ self.w)
            return found

    model, x = Own(), torch.randn(4, 4)
    program = trace(model, (x,))
    assert torch.ops.autopar_test.double.default in [node.target for node in program.graph.nodes]
    found = gradients(model, run(program, model, x).sum())["w"]
    assert found is not None and torch.allclose(found, x.T @ torch.ones(4, 4) * 123)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_noticed(reentrant: bool) -> None:
    class Checkpointed(Base):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = checkpoint(lambda y: (y @ self.w).relu(), x @ self.v, use_reentrant=reentrant)
            return found.sum()

    model, x = Checkpointed(), torch.randn(4, 4)
    with pytest.warns(UserWarning, match="activation checkpointing"):
        program = trace(model, (x,))
    found = gradients(model, run(program, model, x))
    expected = gradients(model, ((x @ model.v) @ model.w).relu().sum())
    assert max(gradient_error(found, expected).values()) == 0
