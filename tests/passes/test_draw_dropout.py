"""Noise and dropout from positions: the same numbers on any mesh, spread as they should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.compiler import compile_program
from autopar.errors import UnknownOperatorError
from autopar.mesh import Mesh
from autopar.operators.random import random_uniform
from autopar.plan import Plan
from autopar.simulate import simulate
from tests.selection import slow_but


class Noisy(nn.Module):
    """Jitter before a linear, as routers of experts have it, and dropout behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        jittered = x * torch.empty_like(x).uniform_(0.9, 1.1) + 0.1 * torch.rand_like(x)
        return self.down(F.dropout(self.up(jittered), 0.25)).square().mean()


def _loss(mesh: str, seed: int) -> float:
    torch.manual_seed(0)
    model, batch = Noisy().double(), {"x": torch.randn(6, 8, dtype=torch.float64)}
    program = compile_program(model, Mesh.parse(mesh), Plan(), (), batch)
    step = simulate(program, dict(model.named_parameters()), (), batch, seed=seed)
    assert step.loss is not None
    return float(step.loss)


@pytest.mark.parametrize("mesh", slow_but([2], ["dp=2", "tp=3", "dp=3,tp=2"]))
def test_any_mesh_draws_the_same(mesh: str) -> None:
    assert abs(_loss(mesh, 5) - _loss("dp=1", 5)) < 1e-14
    assert abs(_loss(mesh, 6) - _loss("dp=1", 5)) > 1e-5


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": lambda h: torch.randn_like(h),
    "randn": lambda h: torch.randn(h.shape, dtype=h.dtype),
    "normal": lambda h: torch.normal(0.0, 1.0, h.shape, dtype=h.dtype),
    "normal of tensors": lambda h: torch.normal(torch.zeros_like(h), torch.ones_like(h)),
    "normal_": lambda h: torch.empty_like(h).normal_(),
    "rand": lambda h: torch.rand(h.shape, dtype=h.dtype) * 12**0.5 - 3**0.5,
    "randint": lambda h: (torch.randint(0, 2, h.shape) * 2 - 1).to(h.dtype),
    "randint_like": lambda h: torch.randint_like(h, -1, 2) * 1.5**0.5,
    "bernoulli": lambda h: torch.bernoulli(torch.full_like(h, 0.5)) * 2 - 1,
    "bernoulli of a number": lambda h: torch.empty_like(h).bernoulli_(0.5) * 2 - 1,
}


class Drawing(nn.Module):
    def __init__(self, draw: str) -> None:
        super().__init__()
        self.up, self.draw = nn.Linear(4, 6), DRAWS[draw]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.up(x)
        drawn = self.draw(h)
        return (h * drawn).square().mean(), drawn


@pytest.mark.filterwarnings("ignore:the numerics check was skipped")
@pytest.mark.parametrize("draw", slow_but([0, 2, 3, 6, 9], DRAWS))
def test_noise_is_the_same_on_any_mesh(draw: str) -> None:
    """All have mean 0 and variance 1."""
    torch.manual_seed(0)
    model, batch = Drawing(draw).double(), {"x": torch.randn(60, 40, 4, dtype=torch.float64)}
    steps = []
    for mesh in ("dp=1", "dp=2", "tp=3", "dp=2,tp=2"):
        program = compile_program(model, Mesh.parse(mesh), Plan(check_numerics=False), (), batch)
        steps.append(simulate(program, dict(model.named_parameters()), (), batch, seed=3))
    for step in steps[1:]:
        assert torch.equal(step.output[1], steps[0].output[1])
        assert torch.allclose(step.grads["up.weight"], steps[0].grads["up.weight"], rtol=1e-12, atol=1e-14)
    drawn = steps[0].output[1]
    assert abs(float(drawn.mean())) < 0.03 and abs(float(drawn.var()) - 1) < 0.05
    assert abs(float(torch.corrcoef(torch.stack([drawn[0].flatten(), drawn[1].flatten()]))[0, 1])) < 0.25


def test_uniform_noise_is_uniform() -> None:
    drawn = random_uniform(torch.tensor(3), 1, 0.9, 1.1, torch.float32, torch.arange(200), torch.arange(500))
    assert drawn.dtype == torch.float32 and float(drawn.min()) >= 0.9 and float(drawn.max()) <= 1.1
    share = torch.histc(drawn, 10, 0.9, 1.1) / drawn.numel()
    assert float((share - 0.1).abs().max()) < 0.005
    assert abs(float(torch.corrcoef(torch.stack([drawn[0], drawn[1]]))[0, 1])) < 0.2


class Gumbel(nn.Module):
    """Sampled routing, as PhiMoE's router does it while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        drawn = torch.empty_like(x).exponential_(2.0)
        return self.up(x - drawn.log()).softmax(-1).square().mean(), drawn


@pytest.mark.parametrize("dtype", slow_but([1], [torch.float32, torch.float64]))
def test_exponential_noise_is_exponential(dtype: torch.dtype) -> None:
    model, batch = Gumbel().to(dtype), {"x": torch.randn(200, 500, 8, dtype=dtype)[:, :, :8]}
    found = []
    for mesh in (Mesh(), Mesh(dp=2)):
        program = compile_program(model, mesh, Plan(), (), batch)
        found.append(simulate(program, dict(model.named_parameters()), (), batch, seed=3).output[1])
    assert torch.equal(*found) and found[0].dtype is dtype
    drawn = found[0].double().flatten()
    assert float(drawn.min()) > 0 and float(drawn.max()) < 16
    levels = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    share = torch.stack([(drawn > level).double().mean() for level in levels])
    assert float((share - (-2 * levels).exp()).abs().max()) < 0.005


class Shuffled(nn.Module):
    """Draws by no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x[:, torch.randperm(x.shape[1])]).square().mean()


def test_ranks_do_not_draw_apart() -> None:
    """Not even where operators without a rule are to run whole on every rank; on one rank of a pipeline they may."""
    model, x = Shuffled(), torch.randn(4, 8)
    for mesh in (Mesh(tp=2), Mesh(dp=2)):
        for choice in ("error", "replicate"):
            with pytest.raises(UnknownOperatorError, match=r"randperm[\s\S]*draws random numbers[\s\S]*argsort"):
                compile_program(model, mesh, Plan(on_unknown=choice, check_numerics=False), (x,))
    compile_program(model, Mesh(pp=2), Plan(microbatches=2, check_numerics=False), (), {"x": x})
