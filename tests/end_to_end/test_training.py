"""Training on real gloo processes against the unmodified model in one process, in float64: every number, every step."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.dtensors.dtensor import local_of
from autopar.errors import RankFailedError
from autopar.ir.loss import loss_of
from autopar.models import gpt, llama
from tests.against_one_process import (
    Errors,
    GroupedHeads,
    Tiny,
    compare_gradients,
    difference,
    float64,
    tiny_batch,
    worst,
)
from tests.launch import run_ranks, try_ranks
from tests.selection import slow_but
from tests.traffic import sent_since

TOLERANCE = 1e-12
# Adam divides by the size of each gradient: where that is zero in exact arithmetic (a key bias under softmax) it
# makes a step out of rounding. SGD does not, and is held to the tolerance in every step (see the two rows below).
AFTER = {"sgd": TOLERANCE, "adamw": 1e-9}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-2),
}


def train(
    build: Callable[[], nn.Module], batches: list[dict[str, Tensor]], mesh: Mesh, plan: Plan, optimizer_name: str
) -> Errors:
    """Three optimizer steps with clipping, the first with two accumulated batches; then an evaluation."""
    model = float64(build)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, mesh, plan)
    optimizers = [OPTIMIZERS[optimizer_name](m.parameters()) for m in (parallel, reference)]
    errors: Errors = {}
    for step, batch in enumerate(batches[1:]):
        for part in [batches[0], batch] if step == 0 else [batch]:
            losses = [loss_of(m(**part)) for m in (parallel, reference)]
            for loss in losses:
                loss.backward()
            errors[f"loss {step}"] = difference(*losses)
        errors |= {f"{name} {step}": e for name, e in compare_gradients(parallel, reference).items()}
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5) for m in (parallel, reference)]
        errors[f"norm {step}"] = difference(*norms)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, found), expected in zip(parallel.full_state_dict().items(), reference.state_dict().values()):
        errors[name] = difference(found, expected)
    with torch.no_grad():
        outputs = [m.eval()(**batches[0]) for m in (parallel, reference)]
    return errors | {f"eval {key}": difference(outputs[0][key], outputs[1][key]) for key in outputs[1]}


TRAINED = {
    "tiny": (Tiny, [tiny_batch(seed=seed) for seed in range(4)]),
    "grouped": (GroupedHeads, [tiny_batch(seed=seed) for seed in range(4)]),
    "gpt": (gpt.build, [gpt.example_batch(gpt.PRESETS["tiny"], 4, 8, seed) for seed in range(4)]),
    "llama": (llama.build, [llama.example_batch(llama.PRESETS["tiny"], 4, 8, seed) for seed in range(4)]),
}


CASES = [("tiny", "dp=2,tp=2"), ("grouped", "tp=2"), ("gpt", "dp=2,tp=2"), ("gpt", "tp=3"), ("llama", "dp=2,tp=2")]


@pytest.mark.parametrize("optimizer", slow_but([1], list(OPTIMIZERS)))
@pytest.mark.parametrize(("model", "mesh"), slow_but([3, 4], CASES))
def test_training_equals_one_process(model: str, mesh: str, optimizer: str) -> None:
    parsed = Mesh.parse(mesh)
    for errors in run_ranks(train, parsed.world_size, *TRAINED[model], parsed, Plan(check_numerics=False), optimizer):
        assert worst(errors) < (AFTER[optimizer], ""), sorted(errors.items(), key=lambda item: -item[1])[:5]
        assert worst({k: e for k, e in errors.items() if k.endswith(" 0")}) < (TOLERANCE, "")


SHARDED = [("tiny", "dp=3", 1), ("tiny", "dp=3", 3), ("grouped", "dp=2,tp=2", 2), ("llama", "dp=2,tp=2", 3)]


@pytest.mark.parametrize(("model", "mesh", "stage"), slow_but([0, 2, 3], SHARDED))
def test_training_with_sharded_parameters_equals_one_process(model: str, mesh: str, stage: int) -> None:
    build, batches = TRAINED[model]
    parsed = Mesh.parse(mesh)
    if mesh == "dp=3":
        batches = [tiny_batch(rows=6, seed=seed) for seed in range(4)]
    plan = Plan(zero=stage, check_numerics=False)
    for errors in run_ranks(train, parsed.world_size, build, batches, parsed, plan, "sgd"):
        assert worst(errors) < (TOLERANCE, ""), sorted(errors.items(), key=lambda item: -item[1])[:5]


def sent_in_a_step(plan: Plan, accumulated: int) -> dict[str, float]:
    """Bytes over those of all parameters that a rank sends in each phase of the second step."""
    model = float64(Tiny)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    parallel = autopar.parallelize(model, Mesh(dp=2), plan)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        before = parallel.traffic
        for _ in range(accumulated):
            parallel.train_step(**tiny_batch())
        optimizer.step()
        optimizer.zero_grad()
    new = sent_since(before, parallel.traffic)
    return {phase: sum(t.bytes for t in new if t.phase == phase) / size for phase in ("forward", "backward")}


@pytest.mark.parametrize(("stage", "gathered"), [(0, 0), (1, 1), (2, 1), (3, 3)])
def test_how_often_parameters_are_gathered(stage: int, gathered: int) -> None:
    """Three batches for one optimizer step, in each of them batch norm's statistics and the loss: 0.045."""
    sent = run_ranks(sent_in_a_step, 2, Plan(zero=stage, check_numerics=False), 3)[0]
    assert sent["forward"] == pytest.approx(0.5 * gathered + 3 * 0.045, abs=0.01)


class UnseenDescent(torch.optim.Optimizer):
    """Writes to the parts where neither the parameter nor the part counts it."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                local_of(parameter).data.sub_(local_of(parameter.grad).data, alpha=group["lr"])


def unseen(stage: int, way: str) -> float:
    """The largest difference of parameters, trained where nobody sees it, to those of one process after three steps."""
    reference, model = float64(Tiny), float64(Tiny)
    plan = Plan(zero=stage, check_numerics=False, bucket_mb=0)
    parallel = autopar.parallelize(model, Mesh(dp=2), plan, example_inputs=tiny_batch())
    rank = torch.distributed.get_rank()
    parameters = list(parallel.parameters())
    early = [parameter.to_local() for parameter in parameters] if way == "held from the start" else []
    optimizer = UnseenDescent(parameters, lr=0.1) if way == "optimizer" else None
    for step in range(3):
        for seed in (step, step + 7):
            parallel.train_step(**tiny_batch(seed=seed))
            reference(**tiny_batch(seed=seed))["loss"].backward()
            if way == "shown on one rank" and rank == 1:
                assert parameters[0].to_local().numel() > 0
        if optimizer is not None:
            optimizer.step()
        for number, parameter in enumerate(parameters if optimizer is None else []):
            part = early[number] if early else parameter.data if way == "data" else parameter.to_local()
            part.data.sub_(parameter.grad.data if way == "data" else local_of(parameter.grad), alpha=0.1)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
        parallel.zero_grad()
        reference.zero_grad()
    loss = difference(parallel(**tiny_batch())["loss"], reference(**tiny_batch())["loss"])
    found = parallel.full_state_dict()
    return max(loss, *(difference(found[name], one) for name, one in reference.state_dict().items()))


WAYS = ["optimizer", "data", "shown", "shown on one rank", "held from the start"]


@pytest.mark.parametrize("way", slow_but([0, 3], WAYS))
def test_an_update_that_no_counter_shows(way: str) -> None:
    for stage in (1, 2):
        assert max(run_ranks(unseen, 2, stage, way)) < TOLERANCE


def whole_parameters_hold_nothing_twice(stage: int) -> tuple[list[bool], bool]:
    """For each weight whether its part lies within the whole; whether all lie where they lay a step before."""
    model = float64(lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)))
    parallel = autopar.parallelize(model, Mesh(dp=2), Plan(zero=stage, bucket_mb=0, batch_dims={"input": 0}))
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    places = []
    for _ in range(3):
        parallel(torch.ones(4, 8)).square().sum().backward()
        weights = [parameter for parameter in parallel.parameters() if parameter.dim() == 2]
        places.append([local_of(weight).data_ptr() for weight in weights])
        optimizer.step()
    within = [local_of(weight).untyped_storage().nbytes() == weight.numel() * 8 for weight in weights]
    return within, places[0] == places[-1]


def test_a_part_lies_within_the_whole_parameter() -> None:
    for stage, within in ((1, True), (3, False)):
        assert run_ranks(whole_parameters_hold_nothing_twice, 2, stage)[0] == ([within] * 2, True)


def train_alone() -> Errors:
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    return train(*TRAINED["tiny"], Mesh(), Plan(), "sgd")


def test_a_mesh_of_one_rank_needs_no_launcher() -> None:
    assert worst(run_ranks(train_alone, 1)[0]) < (TOLERANCE, "")


def lose_a_rank(victim: int) -> str:
    rank = int(os.environ["RANK"])
    parallel = autopar.parallelize(float64(Tiny), Mesh(dp=3), Plan(check_numerics=False, timeout=20.0))
    for step in range(1000):
        try:
            loss = parallel(**tiny_batch(rows=6))["loss"]
            if rank == victim and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            loss.backward()
        except RankFailedError as problem:  # out of autograd, as it was raised
            return str(problem)
    return "no error"


def test_a_rank_killed_between_forward_and_backward() -> None:
    results = try_ranks(lose_a_rank, 3, 1, timeout=100.0)
    assert results[1] is None
    for rank in (0, 2):
        assert f"rank {rank} waited in all_reduce over axis 'dp'" in str(results[rank]), results[rank]


def run_hugging_face() -> tuple[str, list[str], float, Errors]:
    from autopar.frontend.numerics import promote_float32
    from autopar.zoo.named import named_model

    example = named_model("hf:llama", {})
    model = example.model.double()
    reference = copy.deepcopy(model)
    with promote_float32():
        parallel = autopar.parallelize(model, Mesh(dp=2, tp=2), Plan(check_numerics=False))
        outputs = [m(**example.batch) for m in (parallel, reference)]
    for output in outputs:
        output.loss.backward()
    assert parallel.config is reference.config or parallel.config.to_dict() == reference.config.to_dict()
    logits = difference(outputs[0].logits, outputs[1].logits)
    return type(outputs[0]).__name__, list(outputs[0]), logits, compare_gradients(parallel, reference)


def test_a_hugging_face_model_keeps_its_output_class() -> None:
    pytest.importorskip("transformers")
    for name, keys, logits, errors in run_ranks(run_hugging_face, 4):
        assert name == "CausalLMOutputWithPast" and keys[:2] == ["loss", "logits"]
        assert logits < TOLERANCE and worst(errors) < (TOLERANCE, "")
