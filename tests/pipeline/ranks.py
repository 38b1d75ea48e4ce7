"""What each process of a pipelined run does in the tests: steps beside the unmodified model, both in float64."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor

from autopar import parallelize
from autopar.ir.loss import loss_of
from autopar.mesh import Mesh
from autopar.plan import Plan

STEPS = 3


def train(name: str, mesh: str, plan: dict[str, Any], rows: int, optimizer: str = "SGD", clip: float = 0.5) -> Any:
    """{what: worst error} after each of three steps on different batches, and this rank's observations."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    module = importlib.import_module(f"autopar.models.{name}")
    model = module.build()
    reference = copy.deepcopy(model)
    parallel = parallelize(model, Mesh.parse(mesh), Plan(check_numerics=False, **plan))
    batches = [_double(module.example_batch(reference, rows, seed=seed)) for seed in range(STEPS)]
    parallel.prepare(**batches[0])
    ours: Any = getattr(torch.optim, optimizer)(parallel.parameters(), lr=0.01)
    theirs: Any = getattr(torch.optim, optimizer)(reference.parameters(), lr=0.01)
    errors: dict[str, float] = {}
    for step, batch in enumerate(batches):
        if step == 1:  # as a user's own loop does it
            loss = loss_of(parallel(**batch))
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            loss = parallel.train_step(**batch)
        expected = loss_of(reference(**batch))
        expected.backward()  # type: ignore[no-untyped-call]
        errors[f"loss {step}"] = float(((loss - expected).abs() / expected.abs()).detach())
        wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
        largest = max(float(grad.abs().max()) for grad in wanted.values())
        found = parallel.full_grads()
        assert set(found) == set(wanted), set(found) ^ set(wanted)
        errors[f"grads {step}"] = max(float((found[n] - wanted[n]).abs().max()) / largest for n in wanted)
        norm = parallel.clip_grad_norm_(clip)
        norm_expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
        errors[f"norm {step}"] = float((norm - norm_expected).abs() / norm_expected)
        ours.step(), theirs.step()
        ours.zero_grad(), theirs.zero_grad()
    state = parallel.full_state_dict()
    for n, parameter in reference.state_dict().items():
        error = float((state[n] - parameter).abs().max() / parameter.abs().max().clamp(min=1e-30))
        errors["parameters"] = max(errors.get("parameters", 0.0), error)
    held = sorted(n for n, _ in parallel.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        output = parallel(**batches[0])
        errors["inference"] = float((loss_of(output) - loss_of(reference(**batches[0]))).abs())
    return errors, held, parallel.traffic


def _double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: tensor.double() if tensor.is_floating_point() else tensor for n, tensor in batch.items()}
