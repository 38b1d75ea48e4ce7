"""A parallel module that nobody has any more goes, with its program: no hook of torch holds it unseen by Python."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from autopar.api import parallelize
from autopar.mesh import Mesh
from tests.launch import run_ranks


def left_after(steps: int) -> list[str]:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(4, 4)
    parallel = parallelize(model, Mesh(dp=2), example_inputs=(x,))
    for _ in range(steps):
        parallel(x).sum().backward()
    if not steps:
        with torch.no_grad():
            parallel(x)
    held = {"the module": weakref.ref(parallel), "the program": weakref.ref(parallel.program)}
    del model, parallel
    gc.collect()
    return [name for name, reference in held.items() if reference() is not None]


def test_it_goes_with_its_last_user() -> None:
    for found in run_ranks(all_that_is_left, 2):
        assert found == ([], [])


def all_that_is_left() -> tuple[list[str], list[str]]:
    return left_after(0), left_after(2)
