"""One question tells whose gradients a backward pass computes: whether it goes to a leaf that nobody knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.autodiff.autograd import WITNESS, accumulating


@pytest.mark.parametrize("others", [0, 2])
def test_a_witness_tells_what_a_backward_pass_is_for(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Witnessed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Tensor:
            return given[-1] * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            seen.append(accumulating(ctx, others)[1:])
            return (None,) * (others + 1) + (None, grad * 2)

    def called() -> Tensor:
        found: Tensor = Witnessed.apply(*range(others), WITNESS, leaf, other)
        return found.sum()

    def counted(node: Any) -> bool:
        asked.append(node)
        return bool(torch._C._will_engine_execute_node(node))

    leaf, other, seen = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True), list[list[bool]]()
    asked = list[Any]()
    called().backward(inputs=[other])
    called().backward(inputs=[leaf, other])
    torch.autograd.grad(called(), [other])
    monkeypatch.setattr("autopar.autodiff.autograd._runs", counted)
    called().backward()
    assert len(asked) == 1, "each tensor is asked about by itself"
    assert seen == [[False, True], [True, True], [False, False], [True, True]]
    assert WITNESS.grad is None
