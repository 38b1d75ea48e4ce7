"""What all ranks would say alike is said once, by the first."""

from __future__ import annotations

import sys
import warnings
from contextlib import redirect_stderr
from io import StringIO

import pytest
import torch
from torch import nn

import autopar
from autopar import Mesh, Plan
from autopar.__main__ import _quieten
from autopar.notes import is_mute, warn
from tests.launch import run_ranks


class Single(nn.Module):
    """Its bytes have no dim that two ranks could share."""

    def __init__(self) -> None:
        super().__init__()
        self.cube = nn.Parameter(torch.randn(1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.cube.sum()).square().sum()


def lines_of_a_rank() -> list[str]:
    """What a rank prints while two programs are made: for training, and for evaluation."""
    _quieten()
    with redirect_stderr(StringIO()) as printed, warnings.catch_warnings():
        model = autopar.parallelize(Single(), Mesh(dp=2), Plan(zero=3, initial="checked"))
        for mode in (True, False):
            model.train(mode)(torch.ones(4, 7))
    return printed.getvalue().splitlines()


def test_a_warning_is_one_line_on_the_first_rank() -> None:
    first, second = run_ranks(lines_of_a_rank, 2)
    notes = [line for line in first if "'cube'" in line]
    assert len(notes) == 1 and notes[0].startswith("note: Plan(zero=3)"), first
    assert sum("making another program" in line for line in first) == 1
    assert second == []


def test_the_rank_before_there_is_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not is_mute()
    with pytest.warns(UserWarning, match="said") as caught:
        warn("said", stacklevel=1)
    assert caught[0].filename == __file__, "the line that called"
    with warnings.catch_warnings(record=True) as once:
        warnings.simplefilter("default")
        for text in ("one", "other", "one"):
            warnings.simplefilter("default")  # Python forgets what it has shown
            warn(text)
    assert [str(warning.message) for warning in once] == ["one", "other"]
    monkeypatch.setenv("RANK", "3")
    assert is_mute()
    monkeypatch.delitem(sys.modules, "torch.distributed")
    assert is_mute(), "without torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("not said")
