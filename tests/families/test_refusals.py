"""Which errors of a compile that nobody has asked for are expected."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.calls.call_sizes import general
from autopar.calls.calls import Signature
from autopar.calls.size_families import SizeFamilies
from autopar.compiler import compile_program
from autopar.errors import InvariantError, TraceError
from autopar.families.refusals import is_refusal
from autopar.mesh import Mesh


class Short(nn.Module):
    """Takes no batch that is longer than its table."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 13:
            raise KeyError("unlucky")
        return (x * self.weight[torch.arange(x.shape[1])]).sum()


def problem_at(length: int) -> Exception:
    with pytest.raises(Exception) as caught:
        compile_program(Short(), Mesh(dp=1), autopar.Plan(), (torch.ones(2, length),))
    return caught.value


def test_what_the_model_raises_is_a_refusal() -> None:
    assert is_refusal(problem_at(13)) and is_refusal(problem_at(20))
    assert is_refusal(TraceError("")) and is_refusal(MemoryError())


def test_faults_of_the_compiler_are_none() -> None:
    assert not is_refusal(InvariantError(""))
    try:
        raise AssertionError("in a pass")
    except AssertionError as problem:
        assert not is_refusal(problem)


def test_a_fault_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    model, plan = Short(), autopar.Plan()
    signature = Signature(model.forward)
    first = compile_program(model, Mesh(dp=1), plan, (torch.ones(4, 8),))

    def compiled(call: object, like: object) -> object:
        raise AssertionError("a pass went wrong")

    families = SizeFamilies(compiled, lambda call: None, Mesh(dp=1), plan, lambda *_: [])  # type: ignore[arg-type]
    for length in (8, 11):
        call = signature.call((torch.ones(4, length),), {})
        families.learn(general(call), call, first, autopar.ir.guards.Guards())
    (told,) = [str(one.message) for one in recwarn if "compiling for another length" in str(one.message)]
    assert "a pass went wrong" in told and "Way out" in told
