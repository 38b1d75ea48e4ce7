"""A model that asks for a switch of torch, or for all of the environment, gets the answer of the call."""

from __future__ import annotations

import datetime
import os
import random
import secrets
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import autopar
from autopar import Mesh
from autopar.errors import TraceError
from autopar.frontend.trace import trace
from autopar.observation.observation import guards_of_traces
from autopar.observation.torch_switches import SWITCHES, switches
from tests.observation.test_gradient_mode import Asks

cuda: Any = torch.backends.cuda
SWITCHED: dict[str, tuple[Callable[[Tensor], object], Callable[[], AbstractContextManager[Any]]]] = {
    "a property": (lambda h: torch.backends.cudnn.benchmark, lambda: torch.backends.cudnn.flags(benchmark=True)),
    "a function": (
        lambda h: cuda.mem_efficient_sdp_enabled(),
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ),
    "in C": (lambda h: torch.is_anomaly_enabled(), lambda: torch.autograd.set_detect_anomaly(True)),
    "the environment": (lambda h: "AUTOPAR_TEST" in dict(os.environ), lambda: pytest.MonkeyPatch.context()),
}


@pytest.mark.parametrize("name", list(SWITCHED))
def test_what_is_asked_is_asked_again(name: str) -> None:
    ask, switched = SWITCHED[name]
    with guards_of_traces() as guards:
        trace(Asks(ask), (torch.randn(2, 4),))  # type: ignore[arg-type]
    labels = {question.label for question in guards.questions}
    assert guards.hold() and labels & {SWITCHES, "the environment"}, labels
    with switched() as patch:
        if isinstance(patch, pytest.MonkeyPatch):
            patch.setenv("AUTOPAR_TEST", "1")
        assert not guards.hold()
        trace(Asks(ask), (torch.randn(2, 4),))  # type: ignore[arg-type]
    assert guards.hold() and "has changed" not in guards.change()


def test_who_asks_for_nothing_has_no_question() -> None:
    with guards_of_traces() as guards, torch.autograd.set_detect_anomaly(False):
        trace(Asks(lambda h: h.dim() > 0), (torch.randn(2, 4),))
    assert not guards.questions and switches() == switches()


def test_anomalies_are_looked_for_in_steps_alone() -> None:
    with torch.autograd.set_detect_anomaly(True):
        autopar.parallelize(Asks(lambda h: True), Mesh(dp=2), example_inputs=(torch.randn(2, 4),))


CHANGING: dict[str, Callable[[Tensor], object]] = {
    "strftime": lambda h: time.strftime("%S"),
    "datetime.now": lambda h: datetime.datetime.now().second,
    "urandom": lambda h: uuid.uuid4().int % 2,
    "_urandom": lambda h: secrets.randbelow(2),
    "seed": lambda h: torch.seed() % 2,
    "default_rng": lambda h: np.random.default_rng().random() < 0.5,
}


@pytest.mark.parametrize("name", list(CHANGING))
def test_what_changes_in_each_call_is_refused(name: str) -> None:
    with pytest.raises(TraceError, match=rf"(?s)\({name}\), which would be that of the first call.*Way out"):
        trace(Asks(CHANGING[name]), (torch.randn(2, 4),))  # type: ignore[arg-type]


def test_what_is_seeded_is_not() -> None:
    asks = Asks(lambda h: np.random.default_rng(0).random() < random.Random(0).random())
    trace(asks, (torch.randn(2, 4),))
