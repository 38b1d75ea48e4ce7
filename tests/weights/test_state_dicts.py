"""``torch.save`` of a state dict with parts says what it writes; all else that is done with one stays as it was."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import autopar
from autopar import Mesh


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
