"""What training scripts do around a model, on real processes: evaluate first, chain models, go on after a refusal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar import Mesh, Plan
from autopar.errors import TraceError
from tests.against_one_process import compare_gradients, difference, float64, whole, worst
from tests.launch import run_ranks, try_ranks

TOLERANCE = 1e-12


class Maker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 16), nn.Linear(16, 6), nn.BatchNorm1d(16)
        self.power = 2

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x)))).pow(self.power)  # type: ignore[no-any-return]


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).square().mean()  # type: ignore[no-any-return]


class Refused(Maker):
    """Python that looks at a value of an activation."""

    strict = True

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h if self.strict and bool(torch.tensor(h.tolist()).sum() > 0) else h * 2


def habits() -> dict[str, Any]:
    found: dict[str, Any] = {}
    mesh = Mesh(dp=2)
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # another parallel module's output as an input, evaluated in inference mode before the first step
    ours, theirs = [float64(Maker), float64(Critic)], [float64(Maker), float64(Critic)]
    maker, critic = (autopar.parallelize(model, mesh) for model in ours)
    for pair in ((maker, critic), theirs):
        for model in pair:
            model.eval()
        with torch.inference_mode():
            found.setdefault("before", []).append(whole(pair[1](pair[0](x))).item())
        for model in pair:
            model.train()
        pair[1](pair[0](x)).backward()
    found["chained"] = [worst(compare_gradients(maker, theirs[0]))[0], worst(compare_gradients(critic, theirs[1]))[0]]
    # an attribute set on the parallel module, a frozen part
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (maker, theirs[0])]
    for power in (3, 3, 2):
        for model, optimizer in zip((maker, theirs[0]), optimizers):
            model.power = power
            model.norm.train(power == 2)
            optimizer.zero_grad()
            output = model(x)
            (output.full_tensor() if isinstance(output, DTensor) else output).sum().backward()
            optimizer.step()
    found["power"] = max(difference(p, q) for p, q in zip(maker.parameters(), theirs[0].parameters()))
    found["statistics"] = difference(maker.norm.running_mean, theirs[0].norm.running_mean)
    found["programs"] = len(maker._programs)
    # a refused model is as it was; mended, it is taken
    model = float64(Refused)
    expected = model(x)
    parallel = autopar.parallelize(model, mesh)
    with pytest.raises(TraceError):
        parallel(x)
    found["plain"] = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    found["refused"] = difference(model(x), expected)
    parallel.strict = False
    found["mended"] = difference(parallel(x), model_like(Refused, strict=False)(x))
    return found


def model_like(kind: type[Maker], **attributes: Any) -> nn.Module:
    model = float64(kind)
    vars(model).update(attributes)
    return model


def test_habits_on_two_processes() -> None:
    for found in run_ranks(habits, 2):
        assert found["before"][0] == pytest.approx(found["before"][1], rel=1e-12)
        assert max(found["chained"]) < TOLERANCE
        assert found["power"] < TOLERANCE and found["statistics"] < TOLERANCE
        assert found["programs"] == 3, "evaluation, power 3 with frozen statistics, power 2; that of the start is found"
        assert found["plain"] and found["refused"] == 0.0 and found["mended"] < TOLERANCE


def one_rank_differs() -> None:
    model = autopar.parallelize(float64(Maker), Mesh(dp=2), Plan(timeout=20))
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model(x)
    if torch.distributed.get_rank() == 1:
        model.power = 5
    model(x)


def test_an_attribute_that_differs_between_ranks_ends_all() -> None:
    errors = try_ranks(one_rank_differs, 2)
    assert all(isinstance(error, Exception) for error in errors)
    assert all("ranks do not do the same" in str(error) for error in errors), errors
    assert "power was 2 and is 5" in str(errors[0])


def late_parameter() -> tuple[float, float]:
    """Errors of the output and of the gradients, where the last layer becomes another one after the first call."""
    model = float64(Maker)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(dp=2), Plan(outputs="full"))
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for module in (parallel, reference):
        module(x)
    torch.manual_seed(2)
    reference.b = nn.Linear(16, 6).double()
    parallel.b = copy.deepcopy(reference.b)
    found, expected = parallel(x), reference(x)
    found.square().sum().backward()
    expected.square().sum().backward()
    return difference(found, expected), worst(compare_gradients(parallel, reference))[0]


def test_a_late_parameter_is_taken_in() -> None:
    for errors in run_ranks(late_parameter, 2):
        assert max(errors) < TOLERANCE, errors


def small_then_large() -> float:
    x = torch.randn(8, 4, dtype=torch.float64)
    autopar.parallelize(float64(Maker), Mesh(dp=1))(x).sum().backward()
    model = float64(Maker)
    step = autopar.parallelize(copy.deepcopy(model), Mesh(tp=2)).simulate(x)
    return difference(step.output, model(x))


def test_a_mesh_of_one_rank_first() -> None:
    assert small_then_large() < TOLERANCE


def copied_and_changed() -> list[float]:
    """Errors of copies in which an attribute, and a mode, are others than in the original, before and after a call."""
    model = float64(Maker)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(dp=2), Plan(outputs="full"))
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for module in (parallel, reference):
        module(x)
    copies = [copy.deepcopy(module) for module in (parallel, reference)]
    errors = []
    for power, momentum in ((3, 0.5),):
        for module in copies:
            module.power, module.norm.momentum = power, momentum
        errors.append(difference(*[module(x) for module in copies]))
        errors.append(difference(*[module.norm.running_mean for module in copies]))
    return [*errors, difference(parallel(x), reference(x))]


def test_a_copy_is_what_it_is_at_its_own_calls() -> None:
    assert max(max(errors) for errors in run_ranks(copied_and_changed, 2)) < TOLERANCE
