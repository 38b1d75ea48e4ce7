"""Initialising functions on split parameters give the numbers of one device from the same seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import init

import autopar
from autopar import Mesh, Plan
from autopar.errors import InvariantError
from tests.against_one_process import difference, float64
from tests.launch import run_ranks
from tests.loops_over_experts import LOOPS, WIDTH, Mixture
from tests.runtime.fused import Fused, batch
from tests.selection import slow_but

ORTHOGONAL = init.orthogonal_  # as a script has it that imported it
Function = Callable[[Any], Any]  # of a parameter, into which it writes
ANY: dict[str, Function] = {
    "uniform": init.uniform_,
    "normal": lambda p: init.normal_(p, 0.0, 0.02),
    "its own generator": lambda p: init.normal_(p, generator=torch.Generator().manual_seed(3)),
    "truncated": lambda p: init.trunc_normal_(p, std=0.5, a=-0.7, b=0.6),
    "constant": lambda p: init.constant_(p, 3.0),
    "data": lambda p: p.data.normal_(0, 0.02).clamp_(-0.03, 0.03),
    "exponential": lambda p: p.data.exponential_(),
    "cauchy": lambda p: p.data.cauchy_(),
    "logarithmic": lambda p: p.data.log_normal_(),
    "geometric": lambda p: p.data.geometric_(0.3),
    "integers": lambda p: p.data.random_(0, 5),
    "coins": lambda p: p.data.bernoulli_(0.5),
    "noise": lambda p: p.data.add_(torch.randn_like(p)).mul_(torch.rand_like(p)).add_(torch.randint_like(p, 3)),
    "more coins": lambda p: p.data.copy_(torch.bernoulli(torch.full_like(p, 0.5)) + F.dropout(p.data, 0.5)),
    "a whole tensor": lambda p: p.data.copy_(torch.rand(p.shape)),
    "another tensor": lambda p: setattr(p, "data", torch.rand(p.shape)),
    "numpy": lambda p: p.data.copy_(torch.from_numpy(p.detach().numpy() * 2)),
    "a row": lambda p: p.data[1].zero_(),
    "a detached row": lambda p: p.detach()[1].zero_(),
    "rows": lambda p: p.data.__setitem__(slice(0, 3), 0.5),
    "some rows": lambda p: p.data.__setitem__(torch.tensor([0, 5]), 0.5),
    "a flat view": lambda p: p.data.view(-1)[:7].fill_(2.0),
    "thirds": lambda p: [init.normal_(part, std=1.0 + n) for n, part in enumerate(p.data.chunk(3))],
}
MATRICES: dict[str, Function] = {
    "xavier uniform": init.xavier_uniform_,
    "xavier normal": lambda p: init.xavier_normal_(p, gain=2.0),
    "kaiming uniform": lambda p: init.kaiming_uniform_(p, a=5**0.5),
    "kaiming normal": lambda p: init.kaiming_normal_(p, mode="fan_out"),
    "orthogonal": lambda p: init.orthogonal_(p),
    "identity": init.eye_,
    "sparse": lambda p: init.sparse_(p, 0.5),
    "a column": lambda p: p.data.t()[1].fill_(4.0),
    "rows apart": lambda p: [init.xavier_uniform_(part) for part in p.data.split(p.shape[0] // 2)],
}
LAYERS: dict[str, Function] = {  # of a module
    "reset": lambda layer: layer.reset_parameters() if isinstance(layer, nn.Linear | nn.Embedding) else None,
    "as transformers": lambda layer: as_transformers(layer),
}


def as_transformers(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear | nn.Embedding):
        layer.weight.data.normal_(mean=0.0, std=0.02)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            layer.bias.data.zero_()
        if isinstance(layer, nn.Embedding):
            layer.weight.data[1].zero_()


def initialise_each(mesh: Mesh, choices: dict[str, Any]) -> dict[str, float]:
    reference = float64(Fused)
    start = copy.deepcopy(reference.state_dict())
    model = copy.deepcopy(reference)
    parallel = autopar.parallelize(model, mesh, Plan(check_numerics=False, **choices), example_inputs=batch(0))
    found: dict[str, float] = {}
    for name, function in (ANY | MATRICES | LAYERS).items():
        after = []
        for module in (parallel, reference):
            module.load_state_dict(start)
            torch.manual_seed(7)
            with torch.no_grad():
                if name in LAYERS:
                    module.apply(function)
                for parameter in module.parameters() if name not in LAYERS else ():
                    if name in ANY or parameter.dim() == 2:
                        function(parameter)
            after.append(torch.rand(1).item())
        wanted = dict(reference.named_parameters())
        errors = [difference(parameter, wanted[key]) for key, parameter in parallel.named_parameters()]
        found[name] = max(errors) if after[0] == after[1] else float("inf")
    parallel(**batch(0)).backward()
    reference(**batch(0)).backward()
    found["step"] = difference(parallel.head.weight.grad, reference.head.weight.grad)
    return found


@pytest.mark.parametrize(
    ("mesh", "choices"),
    [
        pytest.param(Mesh(tp=2), {}, id="tp"),
        pytest.param(Mesh(dp=2), {"zero": 1}, id="zero-1", marks=pytest.mark.slow),
        pytest.param(Mesh(dp=2), {"zero": 3}, id="zero-3", marks=pytest.mark.slow),
        pytest.param(Mesh(dp=2, tp=2), {"zero": 2}, id="both", marks=pytest.mark.slow),
    ],
)
def test_numbers_of_one_device(mesh: Mesh, choices: dict[str, Any]) -> None:
    for errors in run_ranks(initialise_each, mesh.world_size, mesh, choices):
        assert all(error < 1e-12 for error in errors.values()), errors


def draw_on_stages() -> list[str]:
    model = autopar.parallelize(float64(Fused), Mesh(pp=2), Plan(check_numerics=False), example_inputs=batch(0))
    said = []
    for parameter in list(model.parameters())[:2]:
        init.ones_(parameter)
        with pytest.raises(InvariantError) as problem:
            init.normal_(parameter)
        said.append(str(problem.value))
    with pytest.raises(InvariantError, match="called by this name"):
        ORTHOGONAL(next(parameter for parameter in model.parameters() if parameter.shape == (12, 16)))
    return said


@pytest.mark.slow
def test_stages_refuse_to_draw() -> None:
    for said in run_ranks(draw_on_stages, 2):
        assert all("pipeline stage" in text and "before parallelize" in text for text in said)


def of_the_module(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        init.normal_(parameter, std=0.2)


def of_all_below(module: nn.Module) -> None:
    if isinstance(module, nn.Sequential):
        for parameter in module.parameters():
            init.uniform_(parameter, -0.3, 0.3)


def initialise_stacks(mesh: Mesh) -> list[float]:
    reference, x = Mixture(LOOPS[0]).double(), torch.randn(24, WIDTH, dtype=torch.float64)
    parallel = autopar.parallelize(copy.deepcopy(reference), mesh, Plan(check_numerics=False))
    watched = copy.deepcopy(reference)
    for parameter in watched.parameters():
        parameter.register_hook(lambda grad: grad * 0)
    with pytest.raises(InvariantError, match="the hook would not be called"):
        autopar.parallelize(watched, mesh, Plan(check_numerics=False))(x)
    found = [difference(parallel(x), reference(x))]
    assert any("*" in name for name, _ in parallel.named_parameters()), "the experts are in stacks"
    for function in (LAYERS["reset"], of_the_module, of_all_below):
        for module in (parallel, reference):
            torch.manual_seed(7)
            assert module.apply(function) is module
        found.append(difference(parallel(x), reference(x)))
    return found


@pytest.mark.parametrize("mesh", slow_but([0], [Mesh(ep=2), Mesh(ep=3), Mesh(ep=2, tp=2), Mesh(dp=2, ep=2)]), ids=str)
def test_experts_in_stacks_have_the_numbers_of_one_device(mesh: Mesh) -> None:
    for errors in run_ranks(initialise_stacks, mesh.world_size, mesh):
        assert max(errors) < 1e-12, errors
