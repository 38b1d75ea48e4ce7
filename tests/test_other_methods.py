"""What somebody asks who comes from another framework: its methods, and a model that it has wrapped already."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import autopar
from autopar import Mesh, Plan
from autopar.other_methods import WRAPPED_ELSEWHERE, WRAPPERS, refuse_wrapped

WRAPPED = nn.DataParallel(nn.Linear(2, 2))


def test_a_method_of_a_wrapper_names_the_line_that_does_it() -> None:
    model = autopar.parallelize(nn.Linear(2, 2), Mesh(dp=1))
    for name, (whose, way_out) in WRAPPED_ELSEWHERE.items():
        with pytest.raises(AttributeError) as error:
            getattr(model, name)
        assert str(error.value) == f"'{name}' is of {whose}; a parallel module has none\nWay out: {way_out}."
        assert not hasattr(model, name), "libraries that ask are told that there is none"


def test_what_the_model_has_is_its_own() -> None:
    plain = nn.Linear(2, 2)
    plain.step, plain.module = 7, nn.ReLU()
    model = autopar.parallelize(plain, Mesh(dp=1))
    assert model.step == 7 and isinstance(model.module, nn.ReLU)


def test_a_wrapped_model_is_refused_before_anything_else() -> None:
    with pytest.raises(
        ValueError, match=r"is a DataParallel already.*\nWay out: parallelize model.module; Mesh\(dp=n\)"
    ):
        autopar.parallelize(WRAPPED, Mesh(dp=2))
    with pytest.raises(ValueError, match="is a ParallelModule already"):
        autopar.parallelize(autopar.parallelize(nn.Linear(2, 2), Mesh(dp=1)), Mesh(dp=1))


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_known_by_their_class_and_its_bases(name: str) -> None:
    base = type(name, (nn.Module,), {})
    with pytest.raises(ValueError, match=f"is a {name} already, .*\nWay out: parallelize .*; .*"):
        refuse_wrapped(type("Own", (base,), {})())


def test_a_configuration_of_deepspeed_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}')
    with pytest.raises(ValueError, match="'zero_optimization' is a key of DeepSpeed's.*\nWay out: docs/coming_from.md"):
        Plan.from_file(tmp_path / "ds.json")


def test_a_module_of_the_user_whose_name_is_like_a_wrapper() -> None:
    class DataParallelNet(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

    refuse_wrapped(DataParallelNet())
