"""Parameters keep who they are: optimizers, marks, hooks and data of the time before go on with a parallel module."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autopar
from autopar import Mesh, Plan
from autopar.errors import AutoparError, InvariantError
from tests.against_one_process import difference, float64, whole
from tests.launch import run_ranks
from tests.selection import slow_but

MESHES = [{"dp": 2}, {"tp": 2}, {"pp": 2}]
ids = ["-".join(axes) for axes in MESHES]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up = nn.Embedding(12, 8), nn.Linear(8, 16)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.tokens(x)
        h = h + self.down(torch.relu(self.up(h)))
        return functional.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


def batch(number: int) -> dict[str, Tensor]:
    torch.manual_seed(100 + number)
    return {"x": torch.randint(12, (4, 6)), "y": torch.randint(12, (4, 6))}


def plan_for(axes: dict[str, int], **choices: Any) -> Plan:
    return Plan(timeout=60.0, microbatches=2 if "pp" in axes else 1, **choices)


def worst(module: Any, reference: nn.Module) -> float:
    found = module.full_state_dict()
    return max(difference(found[name], tensor) for name, tensor in reference.state_dict().items())


# ---------------------------------------------------------------- optimizers and hooks


def train_with_what_was_there(axes: dict[str, int], zero: int, started: bool) -> tuple[float, list[Any]]:
    """An optimizer (with ``started``: with states), marks and a hook from before ``parallelize``."""
    model = float64(Net)
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.05) for each in (model, reference)]
    for each, optimizer in zip((model, reference), optimizers):
        each.tokens.weight.register_hook(lambda grad: 0.1 * grad)
        each.up.bias._no_weight_decay = True
        if started:
            each(**batch(9)).backward()
            optimizer.step()
            optimizer.zero_grad()
    module = autopar.parallelize(model, Mesh(**axes), plan_for(axes, zero=zero))
    for number in range(3):
        module.train_step(**batch(number))
        reference(**batch(number)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    marks = [name for name, p in module.named_parameters() if hasattr(p, "_no_weight_decay")]
    return worst(module, reference), marks


@pytest.mark.parametrize("started", slow_but([1], [False, True]), ids=["fresh", "started"])
@pytest.mark.parametrize(("axes", "zero"), [({"dp": 2}, 2), ({"tp": 2}, 0), ({"pp": 2}, 0)], ids=ids)
def test_an_optimizer_from_before(axes: dict[str, int], zero: int, started: bool) -> None:
    results = run_ranks(train_with_what_was_there, 2, axes, zero, started)
    assert max(error for error, _ in results) < 1e-12
    assert {"up.bias"} == {name for _, marks in results for name in marks}


def scale_with_a_scaler() -> float:
    """``GradScaler.unscale_`` reads the groups of the optimizer before its first step."""
    model = float64(Net)
    reference = copy.deepcopy(model)
    optimizer, other = (torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, reference))
    module = autopar.parallelize(model, Mesh(dp=2), plan_for({}))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(module(**batch(0))).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
    scaler.step(optimizer)
    reference(**batch(0)).backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    other.step()
    return worst(module, reference)


def test_a_scaler_and_an_optimizer_from_before() -> None:
    assert max(run_ranks(scale_with_a_scaler, 2)) < 1e-12


def attach_late() -> list[float]:
    """An adapter between ``parallelize`` and the first call, and a new head after a step."""
    model = float64(Net)
    module = autopar.parallelize(model, Mesh(tp=2), plan_for({}))
    module.up = nn.Sequential(model.up, nn.Linear(16, 16).double())
    reference = float64(Net)
    reference.up = nn.Sequential(reference.up, copy.deepcopy(module.up[1]))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (module, reference)]
    errors = []
    for number in range(4):
        if number == 2:
            torch.manual_seed(7)
            head = nn.Linear(8, 12).double()
            module.head, reference.head = copy.deepcopy(head), head
            module._programs.clear()
            optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (module, reference)]
        module(**batch(number)).backward()
        reference(**batch(number)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        errors.append(worst(module, reference))
    return errors


def test_parameters_that_come_late() -> None:
    for errors in run_ranks(attach_late, 2):
        assert max(errors) < 1e-12


# ---------------------------------------------------------------- data


def write_data(axes: dict[str, int], zero: int) -> list[float]:
    model = float64(Net)
    reference = copy.deepcopy(model)
    module = autopar.parallelize(model, Mesh(**axes), plan_for(axes, zero=zero))
    module.train_step(**batch(0))
    errors = []
    for p in module.parameters():
        p.data = 0.5 * p.data
    for p in reference.parameters():
        p.data = 0.5 * p.data
    errors.append(difference(module.train_step(**batch(1)), reference(**batch(1))))
    for p in module.parameters():
        p.data.clamp_(-0.1, 0.1)
    for p in reference.parameters():
        p.data.clamp_(-0.1, 0.1)
    errors.append(difference(module.train_step(**batch(2)), reference(**batch(2))))
    for p in module.parameters():
        p.to_local().data.mul_(0.9)
    for p in reference.parameters():
        p.data.mul_(0.9)
    errors.append(difference(module.train_step(**batch(3)), reference(**batch(3))))
    if "pp" not in axes:
        for p, q in zip(module.parameters(), reference.parameters()):
            p.data = torch.full_like(q, 0.25)  # a whole tensor
            q.data = torch.full_like(q, 0.25)
    errors.append(worst(module, reference))
    with pytest.raises(InvariantError, match="another shape"):
        next(module.parameters()).data = torch.zeros(3)
    return errors


WRITTEN = [*(({"dp": 2}, zero) for zero in range(4)), ({"tp": 2}, 0), ({"pp": 2}, 0)]


@pytest.mark.parametrize(("axes", "zero"), slow_but([0, 2, 5], WRITTEN))
def test_data_is_written(axes: dict[str, int], zero: int) -> None:
    for errors in run_ranks(write_data, 2, axes, zero):
        assert max(errors) < 1e-12, errors


# ---------------------------------------------------------------- numbers and copies


def read_numbers(axes: dict[str, int], zero: int) -> list[float]:
    model = float64(Net)
    reference = copy.deepcopy(model)
    module = autopar.parallelize(model, Mesh(**axes), plan_for(axes, zero=zero))
    module(**batch(0)).backward()
    reference(**batch(0)).backward()
    errors = []
    for (_, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        errors += [abs(p.grad.norm().item() - q.grad.norm().item()), abs(float(p.sum()) - float(q.sum()))]
        errors.append(float(abs(p.detach().numpy() - q.detach().numpy()).max()))
        errors.append(float(torch.tensor(p.grad.tolist()).sub(torch.tensor(q.grad.tolist())).abs().max()))
    return errors


@pytest.mark.parametrize(("axes", "zero"), [({"tp": 2}, 0), ({"dp": 2}, 3)], ids=["tp", "zero3"])
def test_numbers_are_of_the_whole(axes: dict[str, int], zero: int) -> None:
    for errors in run_ranks(read_numbers, 2, axes, zero):
        assert max(errors) < 1e-12


def average(axes: dict[str, int]) -> list[float]:
    model = float64(Net)
    reference = copy.deepcopy(model)
    module = autopar.parallelize(model, Mesh(**axes), plan_for(axes))
    errors, averages = [], []
    for number in range(3):
        for each in (module, reference):
            if number == 1:
                averages.append(torch.optim.swa_utils.AveragedModel(each))
            loss = each.train_step(**batch(number)) if each is module else each(**batch(number))
            if each is reference:
                loss.backward()
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            each.zero_grad()
        if averages:
            ours, theirs = averages
            ours.update_parameters(module)
            theirs.update_parameters(reference)
            errors.append(worst(ours.module, theirs.module))
    errors.append(worst(module, reference))
    with torch.no_grad():
        errors.append(difference(whole(averages[0](**batch(5))), averages[1](**batch(5))))
    fresh = copy.deepcopy(autopar.parallelize(float64(Net), Mesh(**axes), plan_for(axes)))  # before any program
    errors.append(difference(fresh.train_step(**batch(0)), float64(Net)(**batch(0))))
    with pytest.raises(InvariantError, match="full_state_dict"):
        pickle.dumps(module)
    return errors


@pytest.mark.parametrize("axes", slow_but([1], MESHES), ids=ids)
def test_an_average_of_models(axes: dict[str, int]) -> None:
    for errors in run_ranks(average, 2, axes):
        assert max(errors) < 1e-12, errors


# ---------------------------------------------------------------- losses outside, pipelines


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.tokens(x)))


def loss_outside(axes: dict[str, int]) -> list[float]:
    model = float64(Logits)
    reference = copy.deepcopy(model)
    module = autopar.parallelize(model, Mesh(**axes), plan_for(axes))
    x, y = batch(0)["x"], batch(1)["y"]
    y[0, :4] = -100
    errors = []
    for each in (module, reference):
        logits = each(x)
        loss = functional.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=0.1)
        (loss + 1e-2 * logits.logsumexp(-1).square().mean()).backward()
        errors.append(float(loss.detach()))
        errors.append((logits.argmax(-1) == y).double().mean().item())
    grads = module.full_grads()
    found = [difference(grads[name], p.grad) for name, p in reference.named_parameters()]
    return [abs(errors[0] - errors[2]), abs(errors[1] - errors[3]), *found]


@pytest.mark.parametrize("axes", [{"dp": 2}, {"tp": 2}, {"dp": 1}], ids=["dp", "tp", "one"])
def test_a_loss_outside_of_the_model(axes: dict[str, int]) -> None:
    for errors in run_ranks(loss_outside, Mesh(**axes).world_size, axes):
        assert max(errors) < 1e-12, errors


def unfreeze() -> list[float]:
    model = float64(Net)
    reference = copy.deepcopy(model)
    module = autopar.parallelize(model, Mesh(pp=2), plan_for({"pp": 2}))
    errors = []
    for number, frozen in enumerate([("tokens", "up"), (), ("head",), ()]):
        for each in (module, reference):
            for name, p in each.named_parameters():
                p.requires_grad_(not name.startswith(frozen or "-"))
            each.zero_grad()
        errors.append(difference(module.train_step(**batch(number)), reference(**batch(number))))
        reference(**batch(number)).backward()
        grads = module.full_grads()
        assert set(grads) == {name for name, p in reference.named_parameters() if p.requires_grad}
        errors += [difference(grads[name], p.grad) for name, p in reference.named_parameters() if name in grads]
    return errors


def test_layers_are_frozen_and_unfrozen_on_a_pipeline() -> None:
    for errors in run_ranks(unfreeze, 2):
        assert max(errors) < 1e-12, errors


def refuse_on_a_pipeline() -> list[str]:
    module = autopar.parallelize(float64(Net), Mesh(pp=2), plan_for({"pp": 2}))
    loss = module(**batch(0))
    loss.backward(retain_graph=True)
    said = []
    own, norms = list(module.parameters()), torch.nn.utils
    for wrong in (loss.backward, lambda: norms.clip_grad_norm_(own, 1.0), lambda: norms.get_total_norm(own)):
        try:
            wrong()
        except AutoparError as problem:
            said.append(str(problem))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler.scale(torch.ones(()))  # makes its tensors
    if os.environ["RANK"] == "1":
        next(p for p in module.parameters() if p.grad is not None).grad.to_local().fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()
    return [*said, str(scaler.get_scale())]


def test_helpers_of_torch_on_a_pipeline() -> None:
    for backward, clipping, norm, scale in run_ranks(refuse_on_a_pipeline, 2):
        assert "retain_graph" in backward and "model.clip_grad_norm_" in clipping and norm == clipping
        assert scale == "2.0", "both stages have skipped the step"


# ---------------------------------------------------------------- optimizers


class Lamb(torch.optim.Optimizer):
    """Steps as long as the parameter is, by norms of whole tensors. (You et al. 2020, without the second moment.)"""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            state["mean"] = state.get("mean", torch.zeros_like(parameter)).mul(0.9).add(parameter.grad, alpha=0.1)
            parameter.add_(state["mean"] * (parameter.norm() / state["mean"].norm().clamp(min=1e-9)), alpha=-0.01)


OPTIMIZERS = {
    "lamb": Lamb,
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, 0.1, max_iter=3, line_search_fn="strong_wolfe"),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.01),
}


def optimize(axes: dict[str, int], zero: int) -> dict[str, float | str]:
    """Optimizers of earlier models live on: one that cannot step says so at its step, and hinders no other model."""
    found: dict[str, float | str] = {}
    alive = []
    for name, make in OPTIMIZERS.items():
        model = float64(Net)
        reference = copy.deepcopy(model)
        module = autopar.parallelize(model, Mesh(**axes), plan_for(axes, zero=zero))
        try:
            for each in (module, reference):
                alive.append(make(each.parameters()))
                _train(each, each is module, alive[-1])
            found[name] = worst(module, reference)
        except AutoparError as problem:
            found[name] = str(problem)
    return found


def _train(model: Any, is_parallel: bool, optimizer: torch.optim.Optimizer) -> None:
    for number in range(2):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            if is_parallel:
                return model.train_step(**batch(number))
            loss = model(**batch(number))
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize(
    ("axes", "zero", "refused"),
    [
        pytest.param({"dp": 2}, 0, (), marks=pytest.mark.slow),
        ({"dp": 2}, 3, ("adafactor",)),
        pytest.param({"tp": 2}, 0, ("adafactor",), marks=pytest.mark.slow),
        ({"pp": 2}, 0, ("lbfgs",)),
    ],
    ids=["dp", "zero3", "tp", "pp"],
)
def test_optimizers_are_right_or_refused(axes: dict[str, int], zero: int, refused: tuple[str, ...]) -> None:
    for found in run_ranks(optimize, 2, axes, zero):
        assert {name for name, result in found.items() if isinstance(result, str)} == set(refused), found
        assert all("torch.optim" in str(found[name]) for name in refused)
        assert max(result for result in found.values() if isinstance(result, float)) < 1e-12
