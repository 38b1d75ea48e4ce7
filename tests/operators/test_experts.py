"""Rows times the matrices of their experts, against one product a row: values, gradients, kernels, messages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopar.operators import experts
from autopar.operators.experts import EXPERT_LINEAR, EXPERT_OUTER

IDS = {
    "one each": [0, 3, 2, 1, 0, 2],
    "two each": [0, 3, 2, 0, 0, 2, 3, 0, 2, 2, 0, 3],  # nobody goes to expert 1
    "all to one": [2, 2, 2, 2, 2, 2],
    "some to none": [4, 3, 4, 1, 0, 5],
}


def _inputs(
    turned: bool, dtype: torch.dtype = torch.float64, inner: int = 8, outer: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (6, I), the parameter, and the weight (4, I, O) that is a view of it."""
    torch.manual_seed(0)
    rows = torch.randn(6, inner, dtype=dtype, requires_grad=True)
    parameter = torch.randn(4, *((outer, inner) if turned else (inner, outer)), dtype=dtype, requires_grad=True)
    return rows, parameter, parameter.transpose(1, 2) if turned else parameter


def _row_by_row(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    k = len(ids) // len(rows)
    nothing = rows.new_zeros(weight.shape[2])
    return torch.stack([rows[j // k] @ weight[e] if e < len(weight) else nothing for j, e in enumerate(ids.tolist())])


@pytest.mark.parametrize("turned", [False, True], ids=["as it lies", "transposed"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_equals_one_product_a_row(ids: list[int], turned: bool) -> None:
    rows, parameter, weight = _inputs(turned)
    places = torch.tensor(ids)
    found, expected = EXPERT_LINEAR(rows, weight, places), _row_by_row(rows, weight, places)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    ours = torch.autograd.grad(found, (rows, parameter), cotangent)
    theirs = torch.autograd.grad(expected, (rows, parameter), cotangent)
    for grad, wanted in zip(ours, theirs):
        torch.testing.assert_close(grad, wanted, rtol=1e-14, atol=1e-14)
    assert ours[1].is_contiguous(), "the gradient of a transposed weight lies as its parameter does"
    unused = sorted({*range(4)} - {*ids})
    assert not ours[1][unused].any()


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_registered_as_torch_wants_it(ids: list[int]) -> None:
    rows, _, weight = _inputs(True)
    torch.library.opcheck(EXPERT_LINEAR, (rows, weight, torch.tensor(ids)))
    with torch.no_grad():
        grads = torch.randn(len(ids), 5, dtype=torch.float64)
        torch.library.opcheck(EXPERT_OUTER, (rows, grads, torch.tensor(ids, dtype=torch.int32), 4))


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_the_grouped_kernel_equals_the_plain_one(ids: list[int]) -> None:
    """The one that runs on GPUs; torch has its grouped product on CPUs too."""
    rows, _, weight = (x.detach() for x in _inputs(True, torch.bfloat16, 16, 8))
    places = torch.tensor(ids)
    assert experts._takes_grouped(rows, weight, weight.transpose(1, 2))
    torch.testing.assert_close(experts._grouped_linear(rows, weight, places), experts._linear(rows, weight, places))
    grads = torch.randn(len(ids), 8, dtype=torch.bfloat16)
    found, expected = experts._grouped_outer(rows, grads, places, 4), experts._outer(rows, grads, places, 4)
    torch.testing.assert_close(found, expected)


def test_odd_widths_are_not_for_the_grouped_kernel() -> None:
    rows, _, weight = (x.detach() for x in _inputs(False, torch.bfloat16, 8, 5))
    places = torch.tensor(IDS["two each"])
    assert not experts._takes_grouped(rows, weight, weight.transpose(1, 2))
    assert torch.equal(experts._grouped_linear(rows, weight, places), experts._linear(rows, weight, places))


def test_no_rows() -> None:
    found = EXPERT_LINEAR(torch.zeros(0, 3), torch.ones(2, 3, 5), torch.zeros(0, dtype=torch.int64))
    assert found.shape == (0, 5)


@pytest.mark.parametrize(
    ("rows", "weight", "ids", "message"),
    [
        (torch.ones(4, 3), torch.ones(2, 5, 3), torch.zeros(4, dtype=torch.int64), r"\[4, 3\].*\[2, 5, 3\]"),
        (torch.ones(4, 3), torch.ones(2, 3, 5).double(), torch.zeros(4, dtype=torch.int64), "float32.*float64"),
        (torch.ones(4, 3), torch.ones(2, 3, 5), torch.zeros(6, dtype=torch.int64), r"rows \[4, 3\] and ids \[6\]"),
        (torch.ones(4, 3), torch.ones(2, 3, 5), torch.zeros(4), "whole numbers"),
    ],
)
def test_what_does_not_fit_is_named(rows: Tensor, weight: Tensor, ids: Tensor, message: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        EXPERT_LINEAR(*(mode.from_tensor(x) for x in (rows, weight, ids)))
