"""Experts of a list on real gloo processes with ep: held as one parameter, and in files under the model's names."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.dtensors.dtensor import local_of
from autopar.errors import InvariantError
from tests.against_one_process import Errors, compare_gradients, difference, float64, worst
from tests.launch import run_ranks
from tests.loops_over_experts import EXPERTS, WIDTH, Mixture
from tests.selection import slow_but

TOLERANCE = 1e-12
STACK = "experts.*.0.weight"


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixture = Mixture()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.mixture(x)}


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(4, 3, WIDTH, generator=generator, dtype=torch.float64)} for _ in range(count)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = model(**batch)["loss"]
    loss.backward()
    optimizer.step()
    return loss.detach()


def compare(parallel: autopar.module.ParallelModule, reference: nn.Module) -> Errors:
    found, expected = parallel.full_state_dict(), reference.state_dict()
    assert list(found) == list(expected)
    return {name: difference(found[name], expected[name]) for name in expected}


def train_and_save(text: str, zero: int, directory: str) -> tuple[Errors, dict[str, tuple[int, ...]]]:
    """Two steps, a checkpoint, a third step; the checkpoint into another module, the third step there, too."""
    mesh, plan = Mesh.parse(text), Plan(zero=zero)
    data = batches(3)
    model = float64(Loss)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, mesh, plan, example_inputs=data[0])
    optimizers = sgd(parallel), sgd(reference)
    errors: Errors = {}
    for number, batch in enumerate(data):
        losses = [step(m, optimizer, batch) for m, optimizer in zip((parallel, reference), optimizers)]
        errors |= {f"loss {number}": difference(*losses)}
        errors |= {f"{name} {number}": error for name, error in compare_gradients(parallel, reference).items()}
        if number == 1:
            autopar.Checkpoints(directory).save(2, parallel, optimizers[0])
            autopar.save_safetensors(parallel, f"{directory}/files")
            between = copy.deepcopy(reference)
    errors |= compare(parallel, reference)
    with torch.no_grad():
        errors["eval"] = difference(parallel.eval()(**data[0])["loss"], reference(**data[0])["loss"])

    resumed = autopar.parallelize(float64(Loss), mesh, Plan(zero=3 - zero), example_inputs=data[0])
    optimizer = sgd(resumed)
    autopar.Checkpoints(directory).load(resumed, optimizer)
    errors |= {f"loaded {name}": error for name, error in compare(resumed, between).items()}
    step(resumed, optimizer, data[2])
    errors |= {f"resumed {name}": error for name, error in compare(resumed, reference).items()}

    with torch.device("meta"):
        empty = Loss().double()
    filled = autopar.parallelize(empty, mesh, plan, example_inputs=data[0])
    autopar.load_safetensors(filled, f"{directory}/files")
    errors |= {f"file {name}": error for name, error in compare(filled, between).items()}
    filled.load_state_dict(reference.state_dict())
    errors |= {f"state {name}": error for name, error in compare(filled, reference).items()}
    held = {name: tuple(local_of(parameter).shape) for name, parameter in parallel.named_parameters()}
    return errors, held


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "zero"), slow_but([0], [("ep=2", 3), ("ep=2", 0)]))
def test_training_and_files(mesh: str, zero: int, tmp_path: Path) -> None:
    for errors, held in run_ranks(train_and_save, 2, mesh, zero, str(tmp_path)):
        assert worst(errors) < (TOLERANCE, "")
        assert not any(".experts.0." in name for name in held)
        assert held[f"mixture.{STACK}"][0] == EXPERTS // 2
    names = set(float64(Loss).state_dict())
    assert set(load_file(tmp_path / "files" / "model.safetensors")) == names
    plain = float64(Loss)
    autopar.Checkpoints(tmp_path).load(plain)  # the unmodified model takes the parameters
    assert set(plain.state_dict()) == names
    optimizer = sgd(plain)
    autopar.Checkpoints(tmp_path).load(plain, optimizer)  # and the optimizer's states, by the model's own names
    assert len(optimizer.state) == len(list(plain.parameters()))


def late_optimizer() -> str:
    """An optimizer of the experts' own parameters, made before the first call stacks them."""
    parallel = autopar.parallelize(float64(Loss), Mesh(ep=2))
    try:
        step(parallel, sgd(parallel), batches(1)[0])
    except InvariantError as error:
        return str(error)
    return "nothing was raised"


def test_an_optimizer_of_replaced_parameters_is_refused() -> None:
    for text in run_ranks(late_optimizer, 2):
        assert "for all of them" in text and "Way out: " in text and text.count("\n") < 15
