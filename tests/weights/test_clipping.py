"""Clipping by the global norm, in real processes, against torch's own on one device."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.dtensors.dtensor import local_of
from autopar.errors import LaunchError
from autopar.models import llama
from autopar.module import ParallelModule
from autopar.notes import heard
from tests.against_one_process import GroupedHeads, Tiny, difference, float64, tiny_batch
from tests.launch import run_ranks
from tests.selection import slow_but
from tests.traffic import sent_since

TOLERANCE = 1e-12
ORDERS = (2.0, 1.0, 3.5, float("inf"))
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "tied": (Tiny, tiny_batch()),
    "odd": (Tiny, tiny_batch(rows=6)),  # 8 rows over 3 ranks: parts of 3, 3 and 2
    "permuted": (GroupedHeads, tiny_batch()),
    "llama": (llama.build, llama.example_batch(llama.PRESETS["tiny"], 4, 8, 0)),
}


def pair(name: str, mesh: Mesh, plan: Plan) -> tuple[ParallelModule, nn.Module]:
    """The parallel model and its reference, each with gradients; the last vector among the parameters has none."""
    build, batch = MODELS[name]
    model = float64(build)
    [parameter for parameter in model.parameters() if parameter.dim() == 1][-1].requires_grad_(False)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, mesh, plan)
    for m in (parallel, reference):
        m(**batch)["loss"].backward()
    return parallel, reference


def clip(name: str, mesh: Mesh, plan: Plan) -> dict[str, float]:
    errors = {}
    parallel, reference = pair(name, mesh, plan)
    for order in ORDERS:
        for share in (2.0, 0.5):  # of the norm: nothing is to be done, then everything is halved
            grads = [p.grad for p in reference.parameters() if p.grad is not None]
            limit = share * float(torch.nn.utils.get_total_norm(grads, order))
            expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), limit, order)
            found = parallel.clip_grad_norm_(limit, order)
            assert found.dtype == torch.float64 and found.dim() == 0
            errors[f"norm {order}"] = difference(found, expected)
            wanted = dict(reference.named_parameters())
            for key, grad in parallel.full_grads().items():
                errors[f"{key} {order} {share}"] = difference(grad, wanted[key].grad)
    return errors


CASES = [
    ("tied", "dp=2,tp=2", Plan()),
    ("tied", "dp=2,tp=2", Plan(zero=3)),
    ("odd", "dp=3", Plan(zero=1)),
    ("permuted", "dp=2,tp=2", Plan(zero=2)),
    ("llama", "dp=2,tp=2", Plan(zero=3, sequence="megatron")),
    ("llama", "dp_replicate=2,dp_shard=2", Plan(zero=2)),
    ("tied", "dp=1", Plan()),
]


@pytest.mark.parametrize(
    ("name", "mesh", "plan"), slow_but([1, 2, 6], CASES), ids=[f"{n} {m} zero {p.zero}" for n, m, p in CASES]
)
def test_equals_one_device(name: str, mesh: str, plan: Plan) -> None:
    parsed = Mesh.parse(mesh)
    for errors in run_ranks(clip, parsed.world_size, name, parsed, plan):
        assert len(errors) > 4 * len(ORDERS)
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < TOLERANCE, (worst, errors[worst])


def in_numbers_that_have_no_room() -> list[object]:
    """Per rank: the norm of huge gradients; the traffic of it; what a gradient that is no number does."""
    torch.set_default_dtype(torch.float32)
    parallel = autopar.parallelize(Tiny(), Mesh(dp=2, tp=2), Plan(zero=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty = parallel.clip_grad_norm_(1.0)
    parallel(**tiny_batch())["loss"].backward()
    for parameter in parallel.parameters():
        assert parameter.grad is not None
        local_of(parameter.grad).fill_(1e18)  # 400 squares of it are no float32
    before = parallel.traffic
    huge = parallel.clip_grad_norm_(1.0)
    new = sent_since(before, parallel.traffic)
    sent = [(transfer.phase, transfer.axis, transfer.operations, transfer.bytes) for transfer in new]
    grad = parallel.down.bias.grad
    if os.environ["RANK"] == "0":
        local_of(grad)[0] = float("nan")
    problems = []
    for order in (2.0, float("inf")):
        try:
            parallel.clip_grad_norm_(1.0, order, error_if_nonfinite=True)
        except RuntimeError as problem:
            problems.append(str(problem).splitlines()[0])
    return [float(empty), float(huge), sent, problems]


def test_numbers_that_are_none_and_traffic() -> None:
    elements = sum(parameter.numel() for parameter in Tiny().parameters())
    for empty, huge, sent, problems in run_ranks(in_numbers_that_have_no_room, 4):
        assert empty == 0.0
        assert huge == pytest.approx(1e18 * elements**0.5, rel=1e-6)
        assert sent == [("clipping", "dp", 1, 8), ("clipping", "tp", 1, 8)]
        assert problems == [
            "the norm of order 2 of all gradients is nan, so they cannot be clipped",
            "the norm of order inf of all gradients is inf, so they cannot be clipped",
        ]


def without_parameters() -> tuple[float, str]:
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    parallel = autopar.parallelize(nn.Identity(), Mesh())
    try:
        parallel.clip_grad_norm_(1.0, -1.0)
    except ValueError as problem:
        return float(parallel.clip_grad_norm_(1.0)), str(problem)
    return 1.0, "no error"


def test_a_model_without_parameters() -> None:
    assert run_ranks(without_parameters, 1) == [
        (0.0, "clip_grad_norm_(norm_type=-1.0): it is a number above 0, or inf")
    ]


def test_a_process_without_peers() -> None:
    with pytest.raises(LaunchError, match="needs 2 processes"):
        autopar.parallelize(Tiny(), Mesh(dp=2)).clip_grad_norm_(1.0)


def add_up_by_hand() -> list[str]:
    build, batch = MODELS["tied"]
    model = autopar.parallelize(float64(build), Mesh(pp=2), Plan(timeout=30.0))
    model.train_step(**batch)
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with heard() as notes:
        torch.stack([grad.norm() for grad in grads])
        grads[0].norm().item()
    return notes


def test_norms_of_a_stage_that_a_script_adds_up() -> None:
    for notes in run_ranks(add_up_by_hand, 2):
        assert sum("is that of this stage and not of the model" in note for note in notes) == 2, notes
