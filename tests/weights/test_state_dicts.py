"""``torch.save`` of a state dict with parts says what it writes; all else that is done with one stays as it was."""

from __future__ import annotations

import copy
import os
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import autopar
from autopar import Mesh, Plan
from autopar.weights.torch_state_dicts import device_of
from tests.launch import run_ranks


def made() -> Any:
    model = autopar.parallelize(nn.Linear(4, 3), Mesh(dp=1))
    model(torch.ones(2, 4))
    return model


def test_saving_parts_warns_and_loads_again(tmp_path: Path) -> None:
    model = made()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(UserWarning, match=r"(?s)this rank's parts.*Way out: torch.save\(model.full_state_dict\(\)"):
            torch.save({"model": model.state_dict()}, tmp_path / "parts.pt")
    back = torch.load(tmp_path / "parts.pt", weights_only=True)["model"]
    assert type(back) is OrderedDict and back._metadata == model.state_dict()._metadata
    assert str(model.load_state_dict(back)) == "<All keys matched successfully>"


def test_whole_tensors_are_saved_in_silence(tmp_path: Path) -> None:
    model, plain = made(), nn.Linear(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(model.full_state_dict(), tmp_path / "whole.pt")
        torch.save(autopar.parallelize(nn.Linear(4, 3), Mesh(dp=2)).state_dict(), tmp_path / "not launched.pt")
        copied = copy.deepcopy(model.state_dict())  # the best so far, in many a loop
        shallow = copy.copy(copied)
    plain.load_state_dict(torch.load(tmp_path / "whole.pt", weights_only=True))
    assert torch.equal(plain.weight, model.weight.full_tensor())
    assert list(copied) == list(shallow) == ["weight", "bias"] and copied._metadata == shallow._metadata
    assert str(model.load_state_dict(copied)) == "<All keys matched successfully>"


def test_trees_and_nesting_see_an_ordinary_dict() -> None:
    model = made()
    doubled = pytree.tree_map(lambda value: value * 2, model.state_dict())
    assert torch.equal(doubled["bias"].full_tensor(), 2 * model.bias.full_tensor())
    outer = nn.Sequential(model)
    assert list(outer.state_dict()) == ["0.weight", "0.bias"]


def refused_on_one_stage(problem: type[Exception]) -> str:
    model = autopar.parallelize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Mesh(pp=2), Plan(microbatches=2))
    model(torch.ones(4, 4))

    def hook(*_: Any) -> None:
        if os.environ["RANK"] == "1":
            raise problem("of the hook")

    model.register_load_state_dict_pre_hook(hook)
    before = model.full_state_dict()
    with pytest.raises(problem if os.environ["RANK"] == "1" else RuntimeError) as refused:
        model.load_state_dict(model.state_dict())
    assert all(torch.equal(before[name], one) for name, one in model.full_state_dict().items())
    return str(refused.value)


def test_an_error_on_one_stage_is_heard_on_all() -> None:
    told, own = run_ranks(refused_on_one_stage, 2, KeyError, timeout=60)
    assert told == "load_state_dict on rank 1: KeyError: 'of the hook'" and own == "'of the hook'"


def test_what_another_rank_has_on_its_gpu_is_put_on_ones_own() -> None:
    own, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert device_of(torch.device("cuda", 0), own) == own and device_of(cpu, own) == cpu
