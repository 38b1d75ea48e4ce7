"""A model that asks for a switch of torch, or for all of the environment, gets the answer of the call."""

from __future__ import annotations

import datetime
import io
import logging
import os
import random
import secrets
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import rich.console
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh
from autopar.errors import TraceError
from autopar.frontend.trace import trace
from autopar.observation.observation import guards_of_traces
from autopar.observation.torch_switches import SWITCHES, switches
from tests.observation.test_gradient_mode import Asks

cuda: Any = torch.backends.cuda
LOG = logging.getLogger("autopar.test")
FILE = Path(tempfile.gettempdir()) / f"autopar_test_{os.getpid()}"


@contextmanager
def written(file: Path) -> Iterator[None]:
    file.write_text("1")
    yield
    file.unlink()


SWITCHED: dict[str, tuple[Callable[[Tensor], object], Callable[[], AbstractContextManager[Any]]]] = {
    "a property": (lambda h: torch.backends.cudnn.benchmark, lambda: torch.backends.cudnn.flags(benchmark=True)),
    "a function": (
        lambda h: cuda.mem_efficient_sdp_enabled(),
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ),
    "in C": (lambda h: torch.is_anomaly_enabled(), lambda: torch.autograd.set_detect_anomaly(True)),
    "the arguments of the program (sys.argv)": (
        lambda h: "--more" in sys.argv,
        lambda: mock.patch.object(sys, "argv", [*sys.argv, "--more"]),
    ),
    "the levels of logging": (
        lambda h: LOG.isEnabledFor(logging.DEBUG),
        lambda: mock.patch.object(LOG, "level", logging.DEBUG),
    ),
    "numpy's error state": (lambda h: np.geterr()["divide"] == "raise", lambda: np.errstate(divide="raise")),
    "the file": (lambda h: FILE.exists() and FILE.read_text() == "1", lambda: written(FILE)),
    "the environment": (lambda h: "AUTOPAR_TEST" in dict(os.environ), lambda: pytest.MonkeyPatch.context()),
}


@pytest.mark.parametrize("name", list(SWITCHED))
def test_what_is_asked_is_asked_again(name: str) -> None:
    ask, switched = SWITCHED[name]
    with guards_of_traces() as guards:
        trace(Asks(ask), (torch.randn(2, 4),))  # type: ignore[arg-type]
    labels = {question.label for question in guards.questions}
    assert guards.hold() and any(label == SWITCHES or label.startswith(name) for label in labels), labels
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
    "localtime": lambda h: time.localtime(None).tm_sec,
    "datetime.now": lambda h: datetime.datetime.now().second,
    "urandom": lambda h: uuid.uuid4().int % 2,
    "_urandom": lambda h: secrets.randbelow(2),
    "seed": lambda h: torch.seed() % 2,
    "get_rng_state": lambda h: torch.get_rng_state()[0] > 3,
    "default_rng": lambda h: np.random.default_rng().random() < 0.5,
}


@pytest.mark.parametrize("name", list(CHANGING))
def test_what_changes_in_each_call_is_refused(name: str) -> None:
    with pytest.raises(TraceError, match=rf"(?s)\({name}\), which would be that of the first call.*Way out"):
        trace(Asks(CHANGING[name]), (torch.randn(2, 4),))  # type: ignore[arg-type]


def kept(seed: Callable[[], object]) -> Tensor:
    with torch.random.fork_rng():
        seed()
        return torch.rand(4)


SEEDED: dict[str, Callable[[Tensor], object]] = {
    "manual_seed": lambda h: kept(lambda: torch.manual_seed(0)).sum() is None,
    "set_rng_state": lambda h: kept(lambda: torch.set_rng_state(STATE)).sum() is None,
    "a torch.Generator": lambda h: h + torch.rand(4, generator=torch.Generator().manual_seed(0)),
}
STATE = torch.get_rng_state()


class Noisy(nn.Module):
    def __init__(self, noise: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> object:
        noise = self.noise(x)
        return noise if isinstance(noise, Tensor) else x * 2


@pytest.mark.parametrize("name", list(SEEDED))
def test_a_seed_set_in_forward_is_refused(name: str) -> None:
    with pytest.raises(TraceError, match=rf"(?s){name}.*Way out: numbers that are always the same are drawn once"):
        trace(Noisy(SEEDED[name]), (torch.randn(2, 4),))


def taken() -> Tensor:
    return torch.get_rng_state()


def test_a_state_may_be_taken_and_put_back() -> None:
    def forward(h: Tensor) -> Tensor:
        state = taken()
        drawn = h + torch.rand(4)
        torch.random.set_rng_state(state)
        return drawn

    trace(Noisy(forward), (torch.randn(2, 4),))


def told() -> str:
    return time.strftime("%S", time.gmtime(3)) + time.ctime(3)


def test_what_is_seeded_is_not() -> None:
    asks = Asks(lambda h: np.random.default_rng(0).random() < random.Random(0).random() or told() == "")
    trace(asks, (torch.randn(2, 4),))


class Stamped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{stamp()} {datetime.datetime.now():%H:%M} {record.getMessage()}"


def stamp() -> str:
    return str(datetime.datetime.now())


def logged(h: Tensor) -> bool:
    log = logging.Logger("of the test")
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(Stamped())
    log.addHandler(handler)
    log.warning("computed %s", h.shape)
    return True


def logged_by_rich(h: Tensor) -> bool:
    rich.console.Console(file=io.StringIO()).log("computed", h.shape)
    return True


@pytest.mark.parametrize("log", [logged, logged_by_rich])
def test_log_lines_have_a_date(log: Callable[[Tensor], object]) -> None:
    trace(Asks(log), (torch.randn(2, 4),))  # type: ignore[arg-type]


def test_who_asks_for_the_date_is_named() -> None:
    asks = Asks(lambda h: logged(h) and len(stamp()) > 3)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match=r"in stamp of test_torch_switches.py:\d+\nWay out"):
        trace(asks, (torch.randn(2, 4),))
    assert "__getattribute__" not in vars(torch.nn.Module)


@pytest.mark.parametrize("draw", [random.random, lambda: None])
def test_what_forward_raises_is_not_hidden(draw: Callable[[], object]) -> None:
    def ask(h: Tensor) -> bool:
        draw()  # as it was imported
        stamp()
        raise KeyError("forward's own")

    with pytest.raises(TraceError, match='cannot be traced: KeyError: "forward.s own"'):
        trace(Asks(ask), (torch.randn(2, 4),))  # type: ignore[arg-type]
    assert "__getattribute__" not in vars(torch.nn.Module)


def test_other_threads_do_as_they_like() -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            uuid.uuid4(), time.time(), time.strftime("%S"), random.random(), torch.initial_seed()
            assert "AUTOPAR_TEST" not in os.environ and not hasattr(torch.ones(1), "of_another_thread")
            half = torch.nn.Linear(2, 2).to(torch.float64)
            half.weight.register_hook(lambda gradient: None)
            half(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
        except BaseException as problem:
            raised.append(problem)

    def ask(h: Tensor) -> bool:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return True

    with guards_of_traces() as guards:
        trace(Asks(ask), (torch.randn(2, 4),))  # type: ignore[arg-type]
    assert not raised and not guards.inputs and not [one.label for one in guards.questions]
