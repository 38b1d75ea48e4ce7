"""``accelerate`` around a parallel module: parameters after five steps against one device, and what is refused."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import autopar
from autopar import LaunchError, Mesh, Plan, Precision
from tests.frameworks.steps import BATCHES, RATE, expected, model_of
from tests.launch import run_ranks
from tests.selection import slow_but

pytest.importorskip("accelerate", reason="pip install accelerate")


def trained(mesh: str, inputs: str, prepares_loader: bool, accumulation: int) -> dict[str, Tensor]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model: Any = autopar.parallelize(model_of(), Mesh.parse(mesh), Plan(inputs=inputs, check_numerics=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    parallel, optimizer = accelerator.prepare(model, optimizer)
    assert parallel is model
    loader: Any = BATCHES
    if prepares_loader:
        rows = [dict(zip(BATCHES[0], row)) for batch in BATCHES for row in zip(*batch.values())]
        size = len(BATCHES[0]["ids"]) // accelerator.num_processes
        loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=size))  # type: ignore[arg-type]
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    found: dict[str, Tensor] = model.full_state_dict()
    return found


CASES = [
    ("dp=2", "global", False, 1),
    ("dp=2", "local", True, 1),
    ("tp=2", "global", False, 1),
    ("dp=2", "global", False, 5),
]


@pytest.mark.parametrize(("mesh", "inputs", "prepares_loader", "accumulation"), slow_but([], CASES))
def test_parameters_after_five_steps(mesh: str, inputs: str, prepares_loader: bool, accumulation: int) -> None:
    wanted = expected(accumulation=accumulation, max_norm=1.0)
    for found in run_ranks(trained, 2, mesh, inputs, prepares_loader, accumulation):
        worst = max(float((found[name] - value).abs().max()) for name, value in wanted.items())
        print(f"accelerate on {mesh}, inputs {inputs}, {accumulation} batches a step: {worst:.1e}")
        assert worst < 1e-12


def measured(mesh: str) -> tuple[list[float], list[str]]:
    """The rates of a prepared scheduler after each of three steps, and why what is gathered is refused."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model: Any = autopar.parallelize(model_of(), Mesh.parse(mesh), Plan(check_numerics=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    rates, refusals = [], []
    for batch in BATCHES[:3]:
        output = model(**batch)
        accelerator.backward(output["loss"])
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert float(accelerator.gather(output["loss"].detach()).mean()) == float(output["loss"])
    own = torch.tensor([accelerator.process_index, 5])
    assert accelerator.gather(own).tolist() == [0, 5, 1, 5]
    for gather in (accelerator.gather_for_metrics, accelerator.gather):
        with pytest.raises(LaunchError) as refused:
            gather((output["logits"], batch["ids"]))
        refusals.append(str(refused.value))
    with tempfile.TemporaryDirectory() as directory:
        for save in (accelerator.save_state, accelerator.load_state):
            with pytest.raises(LaunchError, match="(?s)parts.*Way out: autopar.Checkpoints"):
                save(directory)
        accelerator.save_model(model, directory)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            saved = load_file(Path(directory) / "model.safetensors")
        full = model.full_state_dict()
    if accelerator.is_main_process:
        assert saved.keys() <= full.keys() and all(torch.equal(one, full[name]) for name, one in saved.items())
        assert all(any(torch.equal(one, other) for other in saved.values()) for one in full.values())
    return rates, refusals


@pytest.mark.parametrize("mesh", slow_but([0], ["dp=2", "tp=2"]))
def test_rows_are_counted_once_and_schedulers_step_once(mesh: str) -> None:
    for rates, refusals in run_ranks(measured, 2, mesh):
        assert len(refusals) == 2
        assert rates == [RATE / 2, RATE / 4, RATE / 8]
        assert all("each of 2 processes" in one and "output.full_tensor()" in one for one in refusals)


@pytest.fixture
def states() -> Iterator[Any]:
    """The state that accelerate keeps for the whole process, as it is without an Accelerator, before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield AcceleratorState
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_would_be_ignored_is_refused(precision: str, states: Any) -> None:
    from accelerate import Accelerator

    model: Any = autopar.parallelize(model_of().float(), Mesh(dp=1))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    states._shared_state["_mixed_precision"] = precision  # of itself it wants a GPU for fp16
    with pytest.raises(LaunchError, match=rf"(?s)mixed_precision='{precision}'.*Way out: autopar.Plan\(precision="):
        accelerator.prepare(model)


def test_the_precision_of_the_plan_is_not_refused(states: Any) -> None:
    from accelerate import Accelerator

    plan = Plan(precision=Precision(param="bf16"), check_numerics=False)
    model: Any = autopar.parallelize(model_of().float(), Mesh(dp=1), plan)
    assert Accelerator(cpu=True, mixed_precision="bf16").prepare(model) is model
    assert states().mixed_precision == "bf16"
