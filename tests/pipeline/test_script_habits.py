"""What scripts do around a pipeline beside a step: copies for an average, gradients that are asked for by name."""

from __future__ import annotations

import copy

import pytest
import torch

import autopar
from autopar import AutoparError, Mesh, Plan
from tests.against_one_process import difference, float64
from tests.launch import run_ranks
from tests.pipeline.test_buffers import Scaled

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


def _gradients(parallel: autopar.ParallelModule, reference: torch.nn.Module) -> float:
    found = parallel.full_grads()
    return max(difference(found[name], parameter.grad) for name, parameter in reference.named_parameters())


def copied() -> list[float]:
    """Errors of a copy and of the module, which then learns on; a buffer of the root is on the last stage only."""
    model = float64(Scaled)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(pp=2), Plan(microbatches=2, timeout=20.0))
    parallel.prepare(x=X)
    average = copy.deepcopy(parallel)
    parallel.train_step(x=X)
    reference(X).backward()
    torch.optim.SGD(parallel.parameters(), lr=1.0).step()
    errors = [_gradients(parallel, reference)]
    parallel.zero_grad()
    average.load_state_dict(average.state_dict())
    average.train_step(x=X)
    return [*errors, _gradients(average, reference), difference(average(X), reference(X))]


def test_a_copy_where_a_tensor_of_the_root_is_elsewhere() -> None:
    assert all(max(errors) < 1e-12 for errors in run_ranks(copied, 2))


def asked_by_name() -> list[str]:
    parallel = autopar.parallelize(float64(Scaled), Mesh(pp=2), Plan(microbatches=2, timeout=20.0))
    parallel.prepare(x=X)
    own, said = list(parallel.parameters()), []
    for ask in (
        lambda loss: torch.autograd.grad(loss, own, allow_unused=True),
        lambda loss: loss.backward(inputs=own),
    ):
        with pytest.raises(AutoparError) as caught:
            ask(parallel(X))
        said.append(str(caught.value))
    assert all(parameter.grad is None for parameter in own)
    own[0].requires_grad_(False)
    own[1].register_hook(lambda grad: grad * 2)  # type: ignore[no-untyped-call]
    parallel(X).backward()
    assert own[0].grad is None and own[1].grad is not None
    return said


def test_gradients_by_name_are_refused() -> None:
    for said in run_ranks(asked_by_name, 2):
        assert all("by name (autograd.grad, backward(inputs=)), and a pipeline adds" in one for one in said)
