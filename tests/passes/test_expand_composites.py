"""Composite operators without a rule: as the operators below them, and exact when split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.check import TOLERANCE, check
from autopar.frontend.trace import trace
from autopar.ir.node import values
from autopar.mesh import Mesh
from autopar.passes import expand_composites as expand
from autopar.plan import Plan
from autopar.rules import rule_for
from tests.selection import one_each, slow_but


class Between(nn.Module):
    """A function of a hidden state (8 features) and of the input, between two linear layers."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(8, 8), nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x), x)).square().mean()


def _square(x: Tensor) -> Tensor:
    return x.transpose(1, 2) @ x + 2 * torch.eye(8)


def _numbers(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1)


BATCHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tensordot": lambda h, x: torch.tensordot(h, torch.ones(8, 8), ([2], [0])),
    "kron": lambda h, x: torch.kron(h, torch.ones(1, 1, 1)),
    "inner": lambda h, x: torch.inner(h, torch.ones(8, 8)),
    "vecdot": lambda h, x: h * torch.linalg.vecdot(h, x).unsqueeze(-1),
    "pairwise_distance": lambda h, x: h + F.pairwise_distance(h, x).unsqueeze(-1),
    "triplet_margin_loss": lambda h, x: h * F.triplet_margin_loss(h, x, x * 2),
    "cosine_embedding_loss": lambda h, x: h * F.cosine_embedding_loss(h.flatten(0, 1), x.flatten(0, 1), torch.ones(30)),
    "take_along_dim": lambda h, x: torch.take_along_dim(h, h.argsort(-1), -1),
    "nanquantile": lambda h, x: h * torch.nanquantile(h, 0.5, dim=-1, keepdim=True),
    "linalg.norm": lambda h, x: h / torch.linalg.norm(h, dim=-1, keepdim=True),
    "linalg.matrix_norm": lambda h, x: h / _numbers(torch.linalg.matrix_norm(h)),
    "linalg.solve": lambda h, x: torch.linalg.solve(_square(x), h.transpose(1, 2)).transpose(1, 2),
    "linalg.svdvals": lambda h, x: h * _numbers(torch.linalg.svdvals(h).sum(-1)),
    "linalg.eigvalsh": lambda h, x: h * _numbers(torch.linalg.eigvalsh(_square(h)).sum(-1)),
    "linalg.slogdet": lambda h, x: h * _numbers(torch.linalg.slogdet(_square(h))[1]),
    "linalg.qr": lambda h, x: h @ torch.linalg.qr(_square(x))[1],
    "linalg.pinv": lambda h, x: h @ torch.linalg.pinv(_square(x)),
    "linalg.cholesky": lambda h, x: h @ torch.linalg.cholesky(_square(x)),
    "linalg.matrix_exp": lambda h, x: h @ torch.matrix_exp(0.1 * _square(x)),
    "linalg.matrix_power": lambda h, x: h @ torch.linalg.matrix_power(_square(x), 3),
    "logdet": lambda h, x: h * _numbers(torch.logdet(_square(x))),
    "fft.fftn": lambda h, x: torch.fft.fftn(h, dim=(-1, -2)).real,
    "fft.fftshift": lambda h, x: torch.fft.fftshift(h, dim=-1),
    "stft": lambda h, x: h
    + _numbers(torch.stft(h.flatten(1), 16, window=torch.ones(16), return_complex=True).abs().mean((1, 2))),
    "trapezoid": lambda h, x: h * torch.trapezoid(h, dim=-1).unsqueeze(-1),
    "gradient": lambda h, x: torch.gradient(h, dim=-1)[0],
    "renorm": lambda h, x: torch.renorm(h, 2, 0, 1.0),
    "greater": lambda h, x: h * torch.greater(h, 0.0),
    "special.logit": lambda h, x: torch.special.logit(torch.sigmoid(h)),
    "grid_sample": lambda h, x: F.grid_sample(
        h.unsqueeze(1), F.affine_grid(h[:, :2, :3], [6, 1, 5, 8], align_corners=False), align_corners=False
    ).squeeze(1),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(range(0, len(BATCHED), 3), BATCHED))
@pytest.mark.parametrize("mesh", slow_but([1], ["dp=2", "dp=3,tp=2"]))
def test_what_lies_below_is_split_by_batch(name: str, mesh: str) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        report = check(Between(BATCHED[name]), {"x": torch.randn(6, 5, 8)}, Mesh.parse(mesh))
    finally:
        torch.set_default_dtype(before)
    assert report.worst <= TOLERANCE, report
    on_dp = {transfer.name for transfer in report.step.traffic if transfer.axis == "dp"}
    assert on_dp <= {"all_reduce"}, f"{name} gathers the batch: {report.step.traffic}"


def test_all_of_it_has_rules_and_types() -> None:
    """Also where torch's decomposition writes in place."""
    model = Between(lambda h, x: h * torch.nanquantile(h, 0.5, dim=-1, keepdim=True))
    program = expand(trace(model, (torch.randn(2, 3, 8),)))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert all(rule_for(node.target) or node.target.__name__ == "getitem" for node in calls), program
    assert all(values(node) for node in calls)
    assert "squeeze" in str(program) and "_(" not in str(program)


def test_a_composite_with_a_rule_stays() -> None:
    model = Between(lambda h, x: F.softmax(h, -1))
    before = trace(model, (torch.randn(2, 3, 8),))
    assert str(expand(before)) == str(before)


class Steps(nn.Module):
    """A cell in a Python loop over time."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.tokens, self.cell, self.head = nn.Embedding(11, 8), kind(8, 8), nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        state: tuple[Tensor, ...] = (self.head.weight.new_zeros(len(x), 8),) * 2
        for step in self.tokens(x).unbind(1):
            found = self.cell(step, state if isinstance(self.cell, nn.LSTMCell) else state[0])
            state = found if isinstance(found, tuple) else (found,)
        loss: Tensor = self.head(state[0]).square().mean()
        return loss


@pytest.mark.parametrize(
    "mesh, kind", one_each(["dp=1", "dp=2", "pp=2", "tp=2"], [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
)
def test_cells_of_recurrent_layers(kind: type[nn.Module], mesh: str) -> None:
    """torch's own kernels write into parts of a product, whose gradient must not get lost."""
    torch.manual_seed(0)
    plan = Plan(microbatches=2 if mesh == "pp=2" else 1, on_indivisible="replicate")
    report = check(Steps(kind), {"x": torch.randint(11, (4, 3))}, Mesh.parse(mesh), plan)
    assert report.worst <= TOLERANCE, report


@pytest.mark.parametrize("name", ["cumulative_trapezoid", "gradient", "norm of another order"])
def test_what_lies_below_is_canonical(name: str) -> None:
    """Passes along positions read all arguments of a slice; torch's own code leaves some out."""
    torch.manual_seed(0)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cumulative_trapezoid": lambda h, x: F.pad(torch.cumulative_trapezoid(h, dim=1), (0, 0, 1, 0)),
        "gradient": lambda h, x: torch.gradient(h, dim=1)[0],
        "norm of another order": lambda h, x: h / (h.norm(p=3, dim=2, keepdim=True) + 1),  # backward: in place
    }
    report = check(Between(functions[name]), {"x": torch.randn(2, 8, 8)}, Mesh(sp=2))
    assert report.worst <= TOLERANCE, report
