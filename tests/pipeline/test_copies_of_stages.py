"""A parameter of several stages, of which a later program uses it on fewer: its copies stay equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from tests.launch import run_ranks

ROUNDS = (4, 1, 4)  # with four rounds both layers are on both stages, with one each is on one


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor, rounds: int) -> Tensor:
        for _ in range(rounds):
            x = self.second(torch.tanh(self.first(x)))
        return nn.functional.mse_loss(x, y)


def trained(mesh: str) -> tuple[list[float], dict[str, Tensor], list[str]]:
    """Losses, parameters, and the names of the gradients that this rank has after the batch with one round."""
    torch.manual_seed(0)
    plain, made = Looped().double(), torch.Generator().manual_seed(1)
    plan = Plan(microbatches=2, check_numerics=False)
    model = autopar.parallelize(plain, Mesh.parse(mesh), plan) if mesh else plain
    optimizer, losses, have = torch.optim.SGD(model.parameters(), lr=0.1), [], list[str]()
    for rounds in ROUNDS:
        x, y = torch.randn(2, 4, 8, generator=made, dtype=torch.float64)
        if mesh:
            losses.append(float(model.train_step(x=x, y=y, rounds=rounds)))  # type: ignore[operator]
        else:
            loss = model(x, y, rounds)
            loss.backward()
            losses.append(float(loss.detach()))
        if rounds == 1:
            have = [name for name, one in model.named_parameters() if one.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.full_state_dict() if mesh else dict(model.state_dict()), have  # type: ignore[operator]


def test_copies_that_a_program_does_not_use_stay_equal() -> None:
    losses, parameters, names = trained("")
    for found, ours, have in run_ranks(trained, 2, "pp=2"):
        assert max(abs(one - other) for one, other in zip(found, losses)) < 1e-12
        assert max(float((ours[name] - value).abs().max()) for name, value in parameters.items()) < 1e-12
        assert have == names
