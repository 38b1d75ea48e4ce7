"""A model that asks how its inputs are stored gets the answer of the call, not that of its trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import autopar
from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.dtensors.dtensor import full_of
from autopar.errors import TraceError
from autopar.frontend.trace import trace
from autopar.ir.asked_of_inputs import ANSWERS, STRIDES, answers_of, unusual_answers
from autopar.observation.observation import guards_of_traces
from tests.launch import run_ranks
from tests.observation.test_gradient_mode import Asks as Branches
from tests.selection import slow_but

ROWS = 8


class Asks(Branches):
    """Branches by what is asked of the input."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.up(3 * x if self.ask(x) else x))
        h = self.down(h)
        return {"loss": h.square().mean(), "h": h}


def plain(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64)


def transposed(rows: int = ROWS) -> Tensor:
    return torch.randn(4, rows, dtype=torch.float64).t()


def padded(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64)[:, :4]


def behind_others(rows: int = ROWS) -> Tensor:
    return torch.randn(rows + 2, 4, dtype=torch.float64)[2:]


def computed(rows: int = ROWS) -> Tensor:
    return plain(rows).requires_grad_() * 1.0


def needing(rows: int = ROWS) -> Tensor:
    return plain(rows).requires_grad_()


def named(rows: int = ROWS) -> Tensor:
    x = plain(rows)
    x.lengths = 3  # type: ignore[attr-defined]
    return x


def contiguous(x: Tensor) -> bool:
    return x.is_contiguous()


def stride(x: Tensor) -> bool:
    return x.stride(0) == 4


def of_a_view(x: Tensor) -> bool:
    return x.t().is_contiguous()


def viewed(x: Tensor) -> bool:
    try:
        x.view(-1)
    except RuntimeError:
        return True
    return False


def identity(x: Tensor) -> bool:
    return x.contiguous() is x


def lists(x: Tensor) -> bool:
    return "lengths" in vars(x)


def offset(x: Tensor) -> bool:
    return x[1:].storage_offset() == 4


def leaf(x: Tensor) -> bool:
    return x.is_leaf


def attribute(x: Tensor) -> bool:
    return hasattr(x, "lengths")


Make = Callable[..., Tensor]
ASKED: list[tuple[Callable[[Tensor], bool], tuple[Make, ...]]] = [
    (contiguous, (plain, transposed, padded, plain)),
    (stride, (transposed, plain, padded)),
    (identity, (plain, transposed, plain)),
    (of_a_view, (plain, transposed, plain)),
    (offset, (plain, behind_others, plain)),
    (leaf, (needing, computed, needing)),
    (leaf, (computed, needing)),
]


def losses(axes: dict[str, int], asked: list[tuple[Callable[[Tensor], bool], tuple[Make, ...]]]) -> list[float]:
    errors = []
    for ask, made in asked:
        torch.manual_seed(0)
        reference = Asks(ask).double()
        parallel = autopar.parallelize(deepcopy(reference), Mesh(**axes), Plan(timeout=30.0))
        for make in made:
            x = make()
            found, wanted = parallel(x), reference(x)
            errors.append((full_of(found["loss"]) - wanted["loss"]).abs().item())
    return errors


@pytest.mark.parametrize(
    ("axes", "asked"), slow_but([0], [({"dp": 1}, ASKED), ({"dp": 2}, ASKED), ({"tp": 2}, ASKED[:3])])
)
def test_each_call_has_its_own_answer(
    axes: dict[str, int], asked: list[tuple[Callable[[Tensor], bool], tuple[Make, ...]]]
) -> None:
    for errors in run_ranks(losses, Mesh(**axes).world_size, axes, asked):
        assert max(errors) < 1e-12


def test_who_lists_attributes() -> None:
    with guards_of_traces() as guards:
        trace(Asks(lists), (torch.randn(2, 4),))
    assert guards.inputs == ["the attribute of any name"] and guards.hold()
    assert answers_of(guards.inputs, [plain(), named()]) == ((), ("lengths",))
    with pytest.raises(TraceError, match=r"lists attributes \(vars, dir\), and 'lengths'.*\n  in lists of .*\nWay out"):
        trace(Asks(lists).double(), (named(),))


def test_who_asks() -> None:
    for ask, name in (
        (viewed, STRIDES),
        (identity, STRIDES),
        (contiguous, STRIDES),
        (of_a_view, STRIDES),
        (offset, "their storage_offset"),
        (len, ""),
    ):
        with guards_of_traces() as guards:
            trace(Asks(ask), (torch.randn(2, 4),))
        assert guards.inputs == [name] * bool(name)
    with guards_of_traces() as guards:
        trace(Asks(attribute), (torch.randn(2, 4),))
    assert guards.inputs == ["the attribute lengths"]
    with pytest.raises(TraceError, match="Cannot view"):  # torch has it in the graph, with what is caught
        trace(Asks(viewed), (transposed().float(),))


def test_answers() -> None:
    names = list(ANSWERS)
    assert not unusual_answers(names, [plain(), 3, plain()]) and answers_of([], [plain()]) == ()
    pairs = ((STRIDES, transposed), ("their storage_offset", behind_others), ("whether they are leaves", computed))
    for name, make in (*pairs, ("whether they are views", padded)):
        assert unusual_answers([name], [plain(), make()]) and not unusual_answers([name], [plain()])


def of_many_lengths() -> tuple[list[float], int]:
    torch.manual_seed(0)
    reference = Asks(contiguous).double()
    parallel = autopar.parallelize(deepcopy(reference), Mesh())
    errors = []
    for rows in (4, 6, 8, 10, 12):
        for make in (plain, transposed):
            x = make(rows)
            errors.append(abs(full_of(parallel(x)["loss"]).item() - reference(x)["loss"].item()))
    return errors, len(parallel.families)


def test_families_are_of_new_tensors() -> None:
    ((errors, families),) = run_ranks(of_many_lengths, 1)
    assert max(errors) < 1e-12 and families == 1


def from_before(folder: str | None) -> list[float]:
    """The first module gets a plain input, the second one others; or a program is given to both."""
    torch.manual_seed(0)
    reference = Asks(contiguous).double()
    program = compile_program(reference, Mesh(), Plan(), (plain(),)) if folder is None else None
    os.environ["AUTOPAR_CACHE"] = folder or "0"
    found = []
    for made in ((plain,), (transposed, plain, padded)):
        parallel = autopar.parallelize(deepcopy(reference), Mesh(), Plan(), program=program)
        for make in made:
            x = make()
            found.append(abs(parallel(x)["loss"].item() - reference(x)["loss"].item()))
    return found


@pytest.mark.parametrize("is_given", [False, True])
def test_programs_from_before(is_given: bool, tmp_path: Path) -> None:
    (errors,) = run_ranks(from_before, 1, None if is_given else str(tmp_path))
    assert max(errors) < 1e-12


REFUSED: list[tuple[Callable[[Tensor], object], Make, str]] = [
    (lambda x: x.data_ptr() % 2, plain, "where a tensor is in memory"),
    (lambda x: x.untyped_storage().nbytes() > 8, plain, "memory of a tensor"),
    (lambda x: x._base is None, behind_others, "_base"),
    (lambda x: x._version, plain, "_version"),
    (lambda x: x.grad is None, needing, "the gradient that a tensor has"),
    (attribute, named, "'lengths', an attribute that was put on a tensor"),
]


@pytest.mark.parametrize(("ask", "make", "said"), REFUSED)
def test_what_no_program_knows_is_refused(ask: Callable[[Tensor], bool], make: Make, said: str) -> None:
    with pytest.raises(TraceError, match=rf"(?s){said}.*  at test_asked_of_inputs.py:.*Way out"):
        trace(Asks(ask).double(), (make(),))


def in_parts() -> list[str]:
    said = []
    for plan, make in ((Plan(inputs="local"), transposed), (Plan(microbatches=2), transposed), (Plan(), transposed)):
        parallel = autopar.parallelize(Asks(contiguous).double(), Mesh(dp=2), plan)
        try:
            parallel.train_step(x=make())
            said.append("")
        except TraceError as problem:
            said.append(str(problem))
    return said


@pytest.mark.slow
def test_parts_that_answer_otherwise_are_refused() -> None:
    for said in run_ranks(in_parts, 2):
        assert [("a part of these inputs answers otherwise" in one) for one in said] == [True, True, False]
