"""Models are traced, and give the numbers of one device, however torch's products in TF32 were switched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.cache.torch_state import modes_of_torch
from autopar.frontend.trace import trace
from autopar.ir.torch_export import export_as_run
from autopar.observation.observation import guards_of_traces
from autopar.observation.torch_switches import SWITCHES, switches
from tests.against_one_process import compare_gradients, float64, worst
from tests.launch import run_ranks
from tests.observation.test_gradient_mode import Asks
from tests.selection import slow_but

backends: Any = torch.backends
PLACES: dict[str, Callable[[], Any]] = {
    "all": lambda: backends,
    "matmul": lambda: backends.cuda.matmul,
    "cudnn": lambda: backends.cudnn,
    "conv": lambda: backends.cudnn.conv,
    "rnn": lambda: backends.cudnn.rnn,
    "oneDNN": lambda: backends.mkldnn.matmul,
}


@contextmanager
def precision(place: str, chosen: str) -> Iterator[None]:
    module = PLACES[place]()
    before = module.fp32_precision
    module.fp32_precision = chosen
    try:
        yield
    finally:
        module.fp32_precision = before


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean(-1)).square().mean()


CASES = [(place, chosen) for place in PLACES for chosen in ("ieee", "tf32")]


@pytest.mark.parametrize(("place", "chosen"), slow_but([0, 3, 6], CASES))
def test_a_model_is_traced_and_switches_stay(place: str, chosen: str) -> None:
    with precision(place, chosen):
        before = switches()
        export_as_run(Net(), (torch.randn(2, 2, 5),))
        step = autopar.parallelize(Net(), Mesh(dp=2), Plan(zero=3)).simulate(torch.randn(4, 2, 5))
        assert step.loss.isfinite() and switches() == before and modes_of_torch()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("place", slow_but([1, 2], ["all", "matmul", "conv", "oneDNN"]))
def test_who_asks_for_it_is_asked_again(place: str) -> None:
    def ask(h: Tensor) -> bool:
        return bool(PLACES[place]().fp32_precision == "ieee")

    with guards_of_traces() as guards:
        trace(Asks(ask), (torch.randn(2, 4),))
    assert guards.hold() and SWITCHES in {question.label for question in guards.questions}
    with precision(place, "ieee"):
        assert not guards.hold()


def test_the_older_name_stays() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        usual = modes_of_torch()
        trace(Net(), (torch.randn(2, 2, 5),))
        assert torch.get_float32_matmul_precision() == "high" and modes_of_torch() == usual
    finally:
        torch.set_float32_matmul_precision(before)
    assert modes_of_torch() != usual


def test_programs_are_kept_apart() -> None:
    usual = modes_of_torch()
    with precision("matmul", "tf32"):
        assert modes_of_torch() != usual
    assert modes_of_torch() == usual


def train() -> float:
    backends.fp32_precision = "ieee"
    model, reference = float64(Net), float64(Net)
    parallel = autopar.parallelize(model, Mesh(dp=2))
    torch.manual_seed(1)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    for module in (parallel, reference):
        module(x).backward()
    return float(worst(compare_gradients(parallel, reference))[0])


@pytest.mark.slow
def test_on_real_ranks() -> None:
    assert max(run_ranks(train, 2)) < 1e-12
