"""``Plan(verify=True)``: a program is proved when it is compiled, and one that is refused reaches nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar import Mesh, Plan
from autopar.cache import compiled
from autopar.compiler import compile_program
from autopar.errors import ProofError
from autopar.families.family import Family
from autopar.ir import collectives as comm
from autopar.ir.program import Program
from autopar.ir.rewrite import remove_unused
from autopar.proof import subject


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))).square().mean()


MESH, INPUTS = Mesh(dp=2, tp=2), (torch.randn(4, 4),)


def without_a_reduction(*call: Any) -> Program:
    """What a compiler with a fault would give: nothing reduces the gradients over dp."""
    program = compile_program(*call)
    assert isinstance(program, Program)
    backward = program.required_role.backward
    assert backward is not None
    for node in list(backward.nodes):
        if comm.moving(node.target) == "all_reduce" and comm.arguments_of(node)["axis"] == "dp":
            for wait in [node, *node.users]:
                wait.replace_all_uses_with(node.args[0], delete_user_cb=lambda user: user is not wait)  # noqa: B023
    remove_unused(backward)
    return program


def test_a_right_program_passes() -> None:
    parallel = autopar.parallelize(Model(), MESH, Plan(verify=True), example_inputs=INPUTS)
    assert parallel.program is not None


def test_a_wrong_program_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "compile_program", without_a_reduction)
    for _ in range(2):  # nothing of the first try serves the second
        with pytest.raises(ProofError, match="the gradient of '(up|down).*over dp"):
            autopar.parallelize(Model(), MESH, Plan(verify=True, bucket_mb=0), example_inputs=INPUTS)
    monkeypatch.setattr(compiled, "compile_program", compile_program)
    autopar.parallelize(Model(), MESH, Plan(verify=True, bucket_mb=0), example_inputs=INPUTS)


def test_what_is_too_large_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "MOST_ELEMENTS", 10)
    with pytest.warns(UserWarning, match="58 parameters are too many to be executed exactly here"):
        autopar.parallelize(Model(), MESH, Plan(verify=True), example_inputs=INPUTS)


# ---------------------------------------------------------------- programs that were derived for another length


class Lengths(nn.Module):
    """Does something else at one length, which lies between others."""

    def __init__(self, special: int = 0) -> None:
        super().__init__()
        self.up, self.special = nn.Linear(4, 4), special

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).tanh()
        is_special = str(x.shape[1]) == str(self.special)  # a question that is not seen
        return (h * 2 if is_special else h).square().mean()


def called(model: nn.Module, *lengths: int) -> Any:
    """The model after steps with batches of these lengths."""
    parallel = autopar.parallelize(model, Mesh(dp=1), Plan(verify=True, check_numerics=False))
    for length in lengths:
        parallel(torch.randn(4, length, 4)).backward()
    return parallel


def test_a_derived_program_is_proved() -> None:
    parallel = called(Lengths(), 40, 51, 17)
    (family,) = parallel.families
    assert {"s": 17, "b": 4} not in family.points and parallel.program.source is not None


def test_a_derived_program_of_a_model_that_does_something_else_there_is_refused() -> None:
    with pytest.raises(ProofError, match="the gradient of 'up|gradient of up|output"):
        called(Lengths(17), 40, 51, 17)


def test_a_derived_program_with_a_wrong_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Family.member

    def wrong(self: Family, *given: Any) -> Any:
        program = right(self, *given)
        backward = program.parts[0].required_role.backward
        scale = next(node for node in backward.nodes if node.target is torch.ops.aten.div.Scalar)
        scale.update_arg(1, scale.args[1] + 4)
        return program

    monkeypatch.setattr(Family, "member", wrong)
    with pytest.raises(ProofError, match="gradient of up"):
        called(Lengths(), 40, 51, 17)
