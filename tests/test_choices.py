"""Choices that would do nothing are errors that say so, and those that do something are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.down(self.up(x).relu()).square().mean()
        return loss


ABOUT_AXES: list[tuple[str, dict[str, Any], str]] = [
    ("tp", {"zero": 3}, "dp, dp_shard, ep, sp"),
    ("pp", {"zero": 1}, "dp, dp_shard, ep, sp"),
    ("dp_replicate", {"zero": 2}, "dp, dp_shard, ep, sp"),
    ("dp", {"sequence": "megatron"}, "axis tp"),
    ("dp", {"tensor": {"up.weight": "row"}}, "axis tp"),
    ("dp", {"attention": "ring"}, "axis sp"),
    ("dp", {"cuts": ("down",)}, "axis pp"),
    ("tp", {"stage_memory_gb": 1.0}, "axis pp"),
    ("dp", {"virtual_stages": 1}, "axis pp"),
    ("dp", {"schedule": "gpipe"}, "axis pp"),
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("axis, choices, way_out", ABOUT_AXES, ids=lambda value: str(value))
def test_a_choice_about_an_axis_that_is_not_there(axis: str, choices: dict[str, Any], way_out: str, size: int) -> None:
    mesh = Mesh(**{axis: size})
    for made in (autopar.parallelize, autopar.compile_program):
        with pytest.raises(ValueError, match=f"{next(iter(choices))}=.* does nothing on mesh") as said:
            made(Mlp(), mesh, Plan(**choices))
        assert way_out in str(said.value) and len(str(said.value).splitlines()) < 15


@pytest.mark.parametrize("sizes", [{"dp": 1}, {"dp_shard": 1, "tp": 1}, {"ep": 1}])
def test_an_axis_of_size_1_is_enough(sizes: dict[str, int]) -> None:
    """A script is tried on one device with the plan that it has on many."""
    choices = {"sequence": "megatron", "tensor": {"up.*": "column"}} if "tp" in sizes else {}
    autopar.parallelize(Mlp(), Mesh(**sizes), Plan(zero=3, **choices), example_inputs=(torch.randn(4, 8),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "axis, choices, near",
    [
        ("tp", {"tensor": {"*upp.weight": "column"}}, "'up.weight'"),
        ("tp", {"tensor": {"up.weight": "column", "*.gate.weight": "row"}}, "weight"),
        ("dp", {"tensor": {"layers.*": "replicate"}}, "near names"),
        ("dp", {"batch_dims": {"X": 0}}, "'x'"),
        ("sp", {"sequence_dims": {"y": 1}}, "'x'"),
        ("pp", {"batch_dims": {"y": 0}}, "'x'"),
    ],
)
def test_a_name_that_is_not_there(axis: str, choices: dict[str, Any], near: str) -> None:
    with pytest.raises(ValueError, match="does nothing: no (parameter|input) of the model has that name") as said:
        autopar.compile_program(Mlp(), Mesh(**{axis: 2}), Plan(**choices), (), {"x": torch.randn(4, 8)})
    assert near in str(said.value)


def test_names_that_are_there() -> None:
    class Tied(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.up

    plan = Plan(tensor={"again.weight": "column"}, batch_dims={"x": 0})
    program = autopar.compile_program(Tied(), Mesh(tp=2), plan, (), {"x": torch.randn(4, 8)})
    assert "up.weight" in str(program)


@pytest.mark.parametrize("name", ["bucket_mb", "overlap_mb", "timeout", "stage_memory_gb", "capacity_factor"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, True, "1"])
def test_numbers_of_the_plan(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Plan\\({name}="):
        Plan(**{name: value})


@pytest.mark.parametrize(
    "choices",
    [
        {"seed": "a"},
        {"seed": 1.5},
        {"reshard_after_forward": "no"},
        {"record_load": 1},
        {"check_numerics": None},
        {"zero": True},
        {"microbatches": True},
        {"recompute": math.nan},
        {"batch_dims": {"x": "0"}},
        {"sequence_dims": {"x": True}},
    ],
    ids=str,
)
def test_values_of_another_type(choices: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Plan\\({next(iter(choices))}="):
        Plan(**choices)
