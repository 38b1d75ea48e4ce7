"""A model that asks whether gradients are enabled gets the answer of the call, not that of its trace."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.dtensors.dtensor import full_of
from autopar.errors import TraceError
from autopar.frontend.trace import trace
from autopar.module import ParallelModule
from autopar.observation.observation import guards_of_traces
from tests.launch import run_ranks
from tests.selection import slow_but


def by_function(h: Tensor) -> bool:
    return torch.is_grad_enabled()


def by_tensor(h: Tensor) -> bool:
    return h.requires_grad


def by_node(h: Tensor) -> bool:
    return h.grad_fn is not None


def by_leaf(h: Tensor) -> bool:
    return not h.is_leaf


def by_starmap(h: Tensor) -> bool:
    return all(itertools.starmap(torch.is_grad_enabled, [()]))


def by_inference(h: Tensor) -> bool:
    return not torch.is_inference_mode_enabled()


def by_nothing(h: Tensor) -> bool:
    """It names the function, and does not call it; torch's own ``no_grad`` does."""
    with torch.no_grad():
        h.sum()
    return h.dim() > 0 or torch.is_grad_enabled()


ASKING = (by_function, by_tensor, by_node, by_leaf, by_starmap)


class Asks(nn.Module):
    def __init__(self, ask: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.up, self.down, self.ask = nn.Linear(4, 6), nn.Linear(6, 3), ask

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.up(x))
        h = self.down(3 * h if self.ask(h) else h)
        return {"loss": h.square().mean(), "h": h}


TYPED = """
class Typed(Asks):
    def forward(self, x):
        h = torch.tanh(self.up(x))
        h = self.down(3 * h if self.ask(h) and h.requires_grad else h)
        return {"loss": h.square().mean(), "h": h}
"""


@pytest.mark.parametrize("name", ["<stdin>", "<ipython-input-3-0a1b>", "<string>", "/tmp/ipykernel_1/1.py"])
def test_code_that_stands_in_no_file(name: str) -> None:
    typed = {"Asks": Asks, "torch": torch}
    exec(compile(TYPED, name, "exec"), typed)
    model: nn.Module = typed["Typed"](lambda h: True)  # type: ignore[operator]
    parallel, x = autopar.parallelize(deepcopy(model), Mesh(dp=1)), torch.randn(4, 4)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert torch.allclose(full_of(parallel(x)["loss"]), model(x)["loss"])


@pytest.mark.parametrize("ask", [*ASKING, by_nothing])
def test_who_asks(ask: Callable[[Tensor], bool]) -> None:
    with guards_of_traces() as guards:
        trace(Asks(ask), (torch.randn(2, 4),))
    assert guards.ask_for_gradients == (ask in ASKING)
    with torch.no_grad(), guards_of_traces() as guards:
        trace(Asks(ask), (torch.randn(2, 4),))
        assert guards.hold() and guards.ask_for_gradients == (ask in ASKING)
    assert guards.hold() == (ask is by_nothing)


def in_every_mode(axes: dict[str, int], asks: tuple[Callable[[Tensor], bool], ...]) -> list[float]:
    errors, modes = [], (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad)
    for first, ask in enumerate(asks):
        torch.manual_seed(0)
        reference = Asks(ask).double()
        parallel = autopar.parallelize(deepcopy(reference), Mesh(**axes), Plan(timeout=30.0))
        for number, mode in enumerate(modes[first % 2 :]):
            x = torch.randn(6 + 2 * (number % 2) * (len(asks) > 1), 4, dtype=torch.float64)
            with mode():
                found, wanted = parallel(x), reference(x)
                pairs = [(found["loss"], wanted["loss"]), (found["h"], wanted["h"])]
                errors += [(full_of(a) - b).abs().max().item() for a, b in pairs if a is not None]
            if mode is torch.enable_grad and "pp" not in axes:
                found["loss"].backward()
                wanted["loss"].backward()
                errors += _of_gradients(parallel, reference)
    return errors


def _of_gradients(parallel: ParallelModule, reference: nn.Module) -> list[float]:
    own = dict(parallel.named_parameters())
    return [(full_of(own[name].grad) - p.grad).abs().max().item() for name, p in reference.named_parameters()]


@pytest.mark.parametrize(
    ("axes", "asks"),
    slow_but(
        [0], [({"dp": 2}, ASKING[:1]), *[({axis: 2}, ASKING) for axis in ("dp", "tp", "pp")], ({"dp": 1}, ASKING)]
    ),
)
def test_each_call_has_its_own_answer(axes: dict[str, int], asks: tuple[Callable[[Tensor], bool], ...]) -> None:
    for errors in run_ranks(in_every_mode, Mesh(**axes).world_size, axes, asks):
        assert max(errors) < 1e-12


def from_before(folder: str | None) -> list[float]:
    """The first process trains, the second one only looks; or a program is given to both."""
    torch.manual_seed(0)
    reference = Asks(by_function).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    program = compile_program(reference, Mesh(), Plan(), (x,)) if folder is None else None
    os.environ["AUTOPAR_CACHE"] = folder or "0"
    found = []
    for modes in ((torch.enable_grad,), (torch.no_grad, torch.enable_grad, torch.no_grad)):
        parallel = autopar.parallelize(deepcopy(reference), Mesh(), Plan(), program=program)
        for mode in modes:
            with mode():
                found.append(abs(parallel(x)["loss"].item() - reference(x)["loss"].item()))
    return found


@pytest.mark.parametrize("is_given", [False, True])
def test_programs_from_before(is_given: bool, tmp_path: Path) -> None:
    (errors,) = run_ranks(from_before, 1, None if is_given else str(tmp_path))
    assert max(errors) < 1e-12


def in_inference() -> list[str]:
    said = []
    parallel = autopar.parallelize(Asks(by_inference), Mesh(), Plan())
    calls: list[Any] = [torch.inference_mode, torch.no_grad, torch.inference_mode]
    for mode in calls:
        try:
            with mode():
                parallel(torch.ones(2, 4))
            said.append("")
        except TraceError as problem:
            said.append(str(problem))
    return said


def test_inference_mode_is_not_answered() -> None:
    (said,) = run_ranks(in_inference, 1)
    assert said[1] == "" and all("asks whether inference mode is on" in one for one in (said[0], said[2]))
