"""The memory table: optimizer states are torch's own, what is at the peak adds up, devices and what would help."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autopar.compiler import compile_program
from autopar.ir.program import Program
from autopar.memory.device import Device, helps, read_size
from autopar.memory.optimizers import OPTIMIZERS
from autopar.memory.table import UPDATE, memory_of
from autopar.mesh import Mesh
from autopar.plan import Plan

SHAPES = [(), (7,), (4, 6), (3, 4, 5), (1, 8), (8, 1)]
TORCHS = {
    "adamw": lambda given: torch.optim.AdamW(given),
    "adam": lambda given: torch.optim.Adam(given),
    "adam-amsgrad": lambda given: torch.optim.Adam(given, amsgrad=True),
    "adafactor": lambda given: torch.optim.Adafactor(given),
    "adagrad": lambda given: torch.optim.Adagrad(given),
    "rmsprop": lambda given: torch.optim.RMSprop(given),
    "sgd": lambda given: torch.optim.SGD(given, lr=0.1),
    "sgd-momentum": lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9),
}


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down, self.frozen = nn.Linear(8, width), nn.Linear(width, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.down(torch.relu(self.up(x)))).square().mean()


def program_of(mesh: Mesh, rows: int = 8, width: int = 16, **choices: object) -> Program:
    plan = Plan(check_numerics=False, **choices)  # type: ignore[arg-type]
    found = compile_program(Net(width), mesh, plan, (), {"x": torch.randn(rows, 8)})
    assert isinstance(found, Program)
    return found


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_states_are_those_that_torch_holds(name: str) -> None:
    if name not in TORCHS:
        assert name == "adam8bit"
        states = OPTIMIZERS[name].states
        assert states((64, 64), torch.float32) == 2 * (4096 + 4 * 16 + 4 * 256) + 4
        assert states((100, 100), torch.float32) == OPTIMIZERS["adamw"].states((100, 100), torch.float32)
        return
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            parameter = nn.Parameter(torch.ones(shape, dtype=dtype))
            optimizer = TORCHS[name]([parameter])
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            held = [x for x in optimizer.state[parameter].values() if isinstance(x, Tensor)]
            assert OPTIMIZERS[name].states(shape, dtype) == sum(x.nbytes for x in held), (shape, dtype)


def test_an_optimizer_that_cannot_update_split_parameters_is_refused_there_alone() -> None:
    whole = memory_of(program_of(Mesh(dp=2)), "adafactor").largest
    assert 0 < whole.optimizer < whole.parameters
    for program in (program_of(Mesh(dp=2), zero=1), program_of(Mesh(dp=2), zero=3), program_of(Mesh(tp=2), width=4096)):
        with pytest.raises(ValueError, match="cannot update parameters that are split") as refused:
            memory_of(program, "adafactor")
        assert "Way out" in str(refused.value) and "zero=0" in str(refused.value)
        assert memory_of(program, "adamw").largest.optimizer


def test_what_is_held_between_steps_is_read_off_the_layouts() -> None:
    for zero in (0, 3):
        found = memory_of(program_of(Mesh(dp=2), zero=zero)).largest
        learned, frozen = 4 * (8 * 16 + 16 + 16 * 8 + 8), 4 * (8 * 8 + 8)
        ways = 2 if zero else 1
        assert found.parameters * ways == learned + frozen
        assert found.gradients * ways == learned
        assert found.optimizer == 2 * learned // ways + 4 * 4  # a counter for each of four parameters


def test_what_is_at_the_peak_adds_up_and_names_its_time() -> None:
    program = program_of(Mesh(dp=2), rows=512)
    found = memory_of(program, "sgd").largest
    assert found.peak == sum(found.at_peak.values()) == found.step_peak
    assert found.phase == "backward" and found.where
    small = memory_of(program_of(Mesh(dp=1), rows=2, width=512), "adamw").largest
    assert small.phase == UPDATE and small.peak > small.step_peak + small.optimizer


def test_gradients_that_wait_for_other_microbatches_are_held_beside_the_next_one() -> None:
    one = memory_of(program_of(Mesh(dp=2), rows=512), "sgd").largest
    several = memory_of(program_of(Mesh(dp=2), rows=512, microbatches=4), "sgd").largest
    assert abs(several.step_peak - one.step_peak - one.gradients) <= 16  # the loss, the share of the rows


def test_a_table_is_plain_json() -> None:
    table = program_of(Mesh(dp=2)).memory("sgd-momentum")
    document = json.loads(json.dumps(table.to_json()))
    assert document["ranks"][0]["peak"] == table.largest.peak
    assert document["optimizer"] == "sgd-momentum"
    with pytest.raises(ValueError, match="no rank 2"):
        table.of(2)
    with pytest.raises(ValueError, match="there are adamw"):
        program_of(Mesh(dp=2)).memory("adamv")


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("80 GiB", 80 * 2**30), ("141e9", 141 * 10**9), ("1.5t", 15 * 10**11)]
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80 bananas", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="80GB"):
        read_size(text)


def test_a_device_has_an_allowance() -> None:
    device = Device(100, fixed=10, share=0.5)
    assert device.over(60) == 0 and device.over(62) == 3 and device.over(40) == -30


def test_what_would_help_does() -> None:
    mesh, plan = Mesh(dp=4), Plan()
    wide = memory_of(program_of(mesh, rows=8, width=512)).largest
    best = helps(mesh, plan, wide)[0]
    assert "zero=3" in best.change
    less = memory_of(program_of(mesh, rows=8, width=512, zero=3)).largest
    assert wide.peak - less.peak == pytest.approx(best.saves, rel=0.25)
    long = memory_of(program_of(mesh, rows=4096)).largest
    assert helps(mesh, plan, long)[0].change.startswith(("recompute", "microbatches", "tp"))
    assert not any("zero" in one.change for one in helps(mesh, replace(plan, zero=3), wide))
