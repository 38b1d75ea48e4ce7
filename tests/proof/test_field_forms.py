"""The field forms of operators: what is rational on fractions, all that is written in other operators on float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._decomp import decomposition_table

from autopar.ir.operator_facts import bare_name
from autopar.operators.attention import ATTENTION, ATTENTION_BACKWARD
from autopar.operators.attention_tile import MERGE, TILE, TILE_BACKWARD
from autopar.operators.bags import EMBEDDING_BAGS, EMBEDDING_BAGS_BACKWARD
from autopar.operators.experts import EXPERT_LINEAR, EXPERT_OUTER
from autopar.operators.recurrent import RECURRENT_LAYER, RECURRENT_LAYER_BACKWARD
from autopar.proof import field
from autopar.proof import field_lockstep as registers_the_forms  # noqa: F401
from autopar.proof.field_tensor import FORMS, Facts, FieldTensor, NoFieldForm

aten = torch.ops.aten
F64 = torch.float64


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)), dtype=F64)


def fraction(*shape: int, seed: int = 0) -> Tensor:
    """Numbers with a denominator of four, none of them zero, all different."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return ((order - count // 2).double() / 4 + 0.125).reshape(shape)


def ids(*shape: int, below: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- in the field

X, Y, M = fraction(3, 4), fraction(3, 4, seed=1), fraction(4, 5, seed=2)
WX, WY = 8 * X, 8 * Y  # elements are compared as whole numbers are
BOOL = torch.tensor([[True, False, True, True]] * 3)
RATIONAL: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.add.Tensor, (X, Y), {"alpha": 3}),
    (aten.add.Scalar, (X, 0.5), {}),
    (aten.sub.Tensor, (X, Y[0]), {}),
    (aten.rsub.Scalar, (X, 2), {}),
    (aten.mul.Tensor, (X, Y), {}),
    (aten.mul.Scalar, (X, -0.75), {}),
    (aten.div.Tensor, (X, Y), {}),
    (aten.div.Scalar, (X, 3), {}),
    (aten.neg.default, (X,), {}),
    (aten.reciprocal.default, (X,), {}),
    (aten.pow.Tensor_Scalar, (X, 3), {}),
    (aten.pow.Tensor_Scalar, (X, -2.0), {}),
    (aten.square.default, (X,), {}),
    (aten.sum.dim_IntList, (X, [0], True), {}),
    (aten.sum.default, (X,), {}),
    (aten.mean.dim, (X, [-1]), {}),
    (aten.var_mean.correction, (X, [1]), {"correction": 1, "keepdim": True}),
    (aten.var.correction, (X, [0]), {"correction": 0}),
    (aten.cumsum.default, (X, 1), {}),
    (aten.prod.dim_int, (X, 1), {}),
    (aten.prod.default, (X[:1],), {}),
    (aten.cumprod.default, (X, 0), {}),
    (aten.mm.default, (X, M), {}),
    (aten.bmm.default, (X[None], M[None]), {}),
    (aten.mv.default, (X, M[:, 0]), {}),
    (aten.addbmm.default, (X[:, :1], X[None], M[None]), {"alpha": 2}),
    (aten.put.default, (X, torch.tensor([1, 7]), Y[0, :2], True), {}),
    (aten.dot.default, (X[0], Y[0]), {}),
    (aten.addmm.default, (X[:, :1], X, M), {"alpha": 2, "beta": 3}),
    (aten.addcmul.default, (X, X, Y), {"value": 0.5}),
    (aten.addcdiv.default, (X, X, Y), {"value": 0.5}),
    (aten.lerp.Scalar, (X, Y, 0.25), {}),
    (aten.relu.default, (WX,), {}),
    (aten.abs.default, (WX,), {}),
    (aten.clamp.default, (WX, -4.0, 3.0), {}),
    (aten.maximum.default, (WX, WY), {}),
    (aten.amax.default, (WX, [1], True), {}),
    (aten.topk.default, (WX, 2), {}),
    (aten.sort.default, (WX,), {}),
    (aten.argmax.default, (WX, 1), {}),
    (aten.lt.Scalar, (WX, 2.0), {}),
    (aten.ge.Tensor, (WX, WY), {}),
    (aten.where.self, (BOOL, X, Y), {}),
    (aten.where.ScalarOther, (BOOL, X, 0.5), {}),
    (aten.masked_fill.Scalar, (X, BOOL, -math.inf), {}),
    (aten.threshold_backward.default, (WX, WY, 0), {}),
    (aten.cat.default, ([X, Y], 1), {}),
    (aten.slice.Tensor, (X, 1, 1, 3), {}),
    (aten.select.int, (X, 0, -1), {}),
    (aten.index_select.default, (X, 1, torch.tensor([2, 0, 2])), {}),
    (aten.gather.default, (X, 1, torch.tensor([[2, 0], [1, 1], [3, 0]])), {}),
    (aten.constant_pad_nd.default, (X, [1, 2], 0.25), {}),
    (aten.tril.default, (X,), {}),
    (aten.expand.default, (X[:, None], [3, 2, 4]), {}),
    (aten.full_like.default, (X, 0.5), {}),
    (aten.new_zeros.default, (X, [2, 2]), {}),
    (aten.scatter_add.default, (X, 1, torch.tensor([[0, 0], [1, 1], [3, 0]]), Y), {}),
    (aten.index_add.default, (X, 0, torch.tensor([1, 1, 0]), Y), {"alpha": 2}),
    (aten.index_put.default, (X, [torch.tensor([1, 1])], Y[:2], True), {}),
    (aten.index_put.default, (X, [None, torch.tensor([1, 2])], Y[:, :2]), {}),
    (aten.embedding.default, (M, torch.tensor([[0, 3], [3, 1]])), {}),
    (aten.embedding_dense_backward.default, (fraction(2, 2, 3), torch.tensor([[0, 3], [3, 1]]), 4, 1, False), {}),
    (aten.select_backward.default, (X[0], [3, 4], 0, 1), {}),
    (aten.slice_backward.default, (X[:, :2], [3, 4], 1, 1, 3, 1), {}),
    (aten.unfold_backward.default, (fraction(3, 3, 2), [3, 4], 1, 2, 1), {}),
    (aten.avg_pool2d.default, (fraction(1, 2, 4, 4), [2, 2]), {}),
    (aten.adaptive_max_pool2d_backward.default,
     (fraction(1, 1, 1, 2), fraction(1, 1, 2, 2), torch.tensor([[[[2, 1]]]])), {}),
    (aten.max_pool2d_with_indices.default, (8 * fraction(1, 2, 4, 4), [2, 2]), {}),
    (aten._adaptive_avg_pool2d.default, (fraction(1, 2, 5, 4), [2, 3]), {}),
    (aten.convolution.default, (fraction(1, 2, 5), fraction(2, 2, 3), None, [2], [1], [1], False, [0], 1), {}),
    (aten.upsample_nearest2d.default, (fraction(1, 1, 2, 2), [4, 4]), {}),
]  # fmt: skip


def in_field(x: Any) -> Any:
    is_number = isinstance(x, Tensor) and x.dtype.is_floating_point
    if not is_number:
        return x
    elements = field.embedded(x)
    return FieldTensor(elements, x.dtype, Facts(codes=field.has_codes(elements)))


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, (tuple, list)):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if not wanted.dtype.is_floating_point:
        return not isinstance(found, FieldTensor) and torch.equal(found, wanted)
    assert isinstance(found, FieldTensor) and found.shape == wanted.shape
    return torch.equal(found.elements, field.embedded(wanted))


@pytest.mark.parametrize("operator, args, kwargs", RATIONAL, ids=lambda x: str(x) if hasattr(x, "_schema") else "")
def test_rational_operators_are_exact(operator: Any, args: Any, kwargs: Any) -> None:
    given = torch.utils._pytree.tree_map(in_field, args)
    assert same(operator(*given, **kwargs), operator(*args, **kwargs))


def test_in_place_through_a_view() -> None:
    x = in_field(X.clone())
    x[1, 2:] += in_field(Y[0, 2:])
    wanted = X.clone()
    wanted[1, 2:] += Y[0, 2:]
    assert torch.equal(x.elements, field.embedded(wanted))


def test_complex_numbers() -> None:
    def turned(x: Tensor, y: Tensor) -> Tensor:
        product = torch.view_as_complex(x) * torch.view_as_complex(y).conj().unsqueeze(0)
        return torch.view_as_real(product[:, 1:] + product[:, :-1]).flatten(1)

    given = fraction(3, 4, 2), fraction(4, 2, seed=1)
    assert same(turned(*map(in_field, given)), turned(*given))
    angle = in_field(X)
    found = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
    assert torch.equal(found[..., 0].elements, angle.cos().elements)
    assert torch.equal(found[..., 1].elements, angle.sin().elements)


def test_what_gives_whole_numbers_has_no_form() -> None:
    with pytest.raises(NoFieldForm, match=r"consecutive.default gives whole numbers and has no form in the field"):
        aten.unique_consecutive.default(in_field(X))


def test_any_other_elementwise_operator_is_a_hash() -> None:
    x = in_field(X)
    one, other = aten.digamma.default(x), aten.lgamma.default(x)
    assert torch.equal(one.elements, aten.digamma.default(x).elements)
    assert not bool((one.elements == other.elements).any())


def test_functions_have_the_values_that_programs_count_on() -> None:
    given = torch.tensor([0.0, 1.0, -math.inf, math.inf], dtype=F64)
    for function, at in (
        (torch.exp, [0, 2, 3]), (torch.log, [0, 1, 3]), (torch.sqrt, [0, 1, 3]), (torch.sigmoid, [0, 2, 3]),
        (torch.tanh, [0, 2, 3]), (torch.erf, [0, 2, 3]), (torch.sin, [0]), (torch.cos, [0]), (torch.atan, [0]),
    ):  # fmt: skip
        found, wanted = function(in_field(given)).elements, field.embedded(function(given))
        assert found[at].tolist() == wanted[at].tolist(), function


def test_stable_sums_of_exponentials_do_not_depend_on_what_is_subtracted() -> None:
    x = in_field(X)
    largest = x.amax(1, keepdim=True)
    shifted = x - largest
    total = shifted.exp().sum(1, keepdim=True)
    assert torch.equal((shifted - total.log()).elements, torch.log_softmax(x, 1).elements)
    assert torch.equal((shifted.exp() / total).elements, torch.softmax(x, 1).elements)
    parts = [shifted[:, :2].exp().sum(1), shifted[:, 2:].exp().sum(1)]
    assert torch.equal((parts[0] + parts[1]).log().elements, total.log().squeeze(1).elements)
    other = (x[:, 2:] - x[:, 2:].amax(1, keepdim=True)).exp().sum(1)  # of another maximum
    assert not torch.equal((parts[0] + other).log().elements, total.log().squeeze(1).elements)


def test_exponentials_go_with_what_is_moved() -> None:
    """And not with elements that are made: a logarithm that is padded with zeros has ones for exponentials there."""
    logs = torch.log_softmax(in_field(X), 1)
    chances = torch.softmax(in_field(X), 1)
    assert torch.equal(logs[:, 1:].t().exp().elements, chances[:, 1:].t().elements)
    assert torch.equal(logs.index_select(0, torch.tensor([2])).exp().elements, chances[2:].elements)
    hidden = logs.masked_fill(BOOL, -math.inf).exp()
    assert torch.equal(hidden.elements, chances.masked_fill(BOOL, 0.0).elements)
    assert torch.nn.functional.pad(logs, (1, 0)).exp().elements[:, 0].tolist() == [1, 1, 1]
    assert logs.masked_fill(BOOL, 0.0).exp().elements[BOOL].tolist() == [1] * 9


def test_a_row_that_is_hidden_by_finite_numbers_attends_evenly() -> None:
    x = in_field(X)
    x[1] = torch.finfo(F64).min
    x[2, :3] = torch.finfo(F64).min
    weights = torch.softmax(x, 1).elements
    assert weights[1].tolist() == [field.number(0.25)] * 4 and weights[2].tolist() == [0, 0, 0, 1]


# ---------------------------------------------------------------- on numbers

HEADS = tuple(real(2, heads, 6, 4, seed=seed) for seed, heads in enumerate((4, 2, 2)))
MASK = ids(2, 1, 6, 6, below=3) > 0
MASK[0, 0, 2] = False  # a row that may attend to nothing
BIAS = real(1, 4, 6, 6)
RANK = torch.tensor(1)
LABELS = torch.tensor([0, 3, -100, 1, 2, 2])
PARTS = tuple(x[..., :4, :] for x in HEADS)
WEIGHT3 = real(3, 5, 2)
IDS = torch.tensor([0, 2, 2, 1, 3, 0])  # the expert 3 is none
FLAT, OFFSETS = ids(7, below=6), torch.tensor([0, 2, 2, 5])
CELLS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def attended(operator: Any, *rest: Any) -> tuple[Any, ...]:
    """The operands of the backward operator: a gradient, those of forward, and its results."""
    out, logsumexp = operator(*HEADS, *rest)
    return real(*out.shape), out, logsumexp


def cell(name: str) -> tuple[Any, ...]:
    gates = CELLS[name]
    weights = [real(gates * 3, 4), real(gates * 3, 3), real(gates * 3), real(gates * 3, seed=1)]
    return real(5, 2, 4), [real(2, 3)] * (2 if name == "lstm" else 1), weights, name


def convolved(stride: int, padding: int, dilation: int, groups: int, transposed: bool = False) -> tuple[Any, ...]:
    weight = real(4, 6 // groups, 3, 2) if not transposed else real(6, 4 // groups, 3, 2)
    return (
        real(2, 6, 9, 8), weight, real(4), [stride] * 2, [padding] * 2, [dilation] * 2,
        transposed, [stride - 1] * 2 if transposed else [0, 0], groups,
    )  # fmt: skip


def turned(*args: Any) -> tuple[Any, ...]:
    out = aten.convolution.default(*args)
    return (real(*out.shape), args[0], args[1], [4], *args[3:], [True, True, True])


TILE_ROWS = (None, [ids(2, 8, below=2)], RANK, "j<=i & v0[i]==v0[j]", 1, 2, True, None)
WHOLE_ROWS = (real(1, 4, 4, 4), [], None, "", 0, 1, False, 0.5)
REAL: list[tuple[Any, tuple[Any, ...]]] = [
    (aten._softmax.default, (real(3, 4), 1, False)),
    (aten._log_softmax.default, (real(3, 4), 0, False)),
    (aten._softmax_backward_data.default, (real(3, 4), real(3, 4, seed=1).softmax(1), 1, F64)),
    (aten._log_softmax_backward_data.default, (real(3, 4), real(3, 4, seed=1).log_softmax(1), 1, F64)),
    (aten.logsumexp.default, (real(3, 4), [1])),
    (aten.logaddexp.default, (real(3, 4), real(3, 4, seed=1))),
    (aten.gelu.default, (real(3, 4),)),
    (aten.silu.default, (real(3, 4),)),
    (aten.rsqrt.default, (real(3, 4).abs(),)),
    (aten.expm1.default, (real(3, 4),)),
    (aten.tan.default, (real(3, 4),)),
    (aten.native_layer_norm_backward.default,
     (real(3, 4), real(3, 4, seed=1), [4], real(3, 1), real(3, 1, seed=1), real(4), real(4), [True] * 3)),
    (aten.native_group_norm_backward.default,
     (real(2, 4, 3), real(2, 4, 3, seed=1), real(2, 2), real(2, 2, seed=1), real(4), 2, 4, 3, 2, [True] * 3)),
    (aten.nll_loss_forward.default, (real(6, 4), LABELS, None, 1, -100)),
    (aten.nll_loss_backward.default, (real(), real(6, 4), LABELS, None, 1, -100, torch.tensor(5.0, dtype=F64))),
    (aten.gelu_backward.default, (real(3, 4), real(3, 4, seed=1))),
    (aten.silu_backward.default, (real(3, 4), real(3, 4, seed=1))),
    (aten.tanh_backward.default, (real(3, 4), real(3, 4, seed=1))),
    (aten.sigmoid_backward.default, (real(3, 4), real(3, 4, seed=1))),
    (aten.convolution.default, convolved(1, 1, 1, 1)),
    (aten.convolution.default, convolved(2, 1, 2, 2)),
    (aten.convolution.default, convolved(2, 1, 1, 2, True)),
    (aten.convolution_backward.default, turned(*convolved(2, 1, 1, 1))),
    (aten.convolution_backward.default, turned(*convolved(1, 0, 2, 2))),
    (aten.convolution_backward.default, turned(*convolved(2, 1, 1, 2, True))),
    (aten.avg_pool2d_backward.default, (real(1, 2, 3, 3), real(1, 2, 5, 5), [3, 3], [2, 2], [1, 1], False, True, None)),
    (aten.avg_pool2d.default, (real(2, 2, 7, 6), [3, 2], [2], [1], True, False)),
    (aten.avg_pool2d.default, (real(2, 7, 6), [5], [3], [2], True, True)),
    (aten.avg_pool3d.default, (real(1, 2, 4, 4, 5), [2], [2, 1, 2])),
    (aten.avg_pool2d_backward.default, (real(2, 2, 4, 4), real(2, 2, 7, 6), [3, 2], [2], [1], True, False, None)),
    (aten.upsample_bilinear2d_backward.default, (real(1, 2, 4, 6), [4, 6], [1, 2, 2, 3], False)),
    (aten._native_batch_norm_legit_no_training.default,
     (real(2, 3, 4), real(3), real(3, seed=1), real(3, seed=2), real(3).abs(), 0.1, 1e-3)),
    (aten._upsample_nearest_exact2d_backward.default, (real(1, 2, 4, 6), [4, 6], [1, 2, 2, 3])),
    (aten.max_pool3d_with_indices_backward.default,
     (real(1, 2, 1, 2, 2), real(1, 2, 2, 4, 4), [2], [2], [0], [1], False, ids(1, 2, 1, 2, 2, below=32))),
    (aten._weight_norm_interface_backward.default, (real(3, 4), real(3, 4, seed=1), real(3, 1), real(3, 1).abs(), 0)),
    (aten._trilinear.default, (real(3, 4), real(2, 4, 5), real(3, 5), [1, 3], [0], [1, 2], [2, 3])),
    (aten.logcumsumexp.default, (real(3, 4), 1)),
    (aten._adaptive_avg_pool2d_backward.default, (real(1, 2, 2, 3), real(1, 2, 5, 4))),
    (EXPERT_LINEAR, (real(3, 5), WEIGHT3, IDS)),
    (EXPERT_OUTER, (real(3, 5), real(6, 2), IDS, 3)),
    (EMBEDDING_BAGS, (real(5, 3), ids(4, 2, below=5), None, None, real(4, 2), None, "sum", 2, 0)),
    (EMBEDDING_BAGS, (real(5, 3), FLAT, OFFSETS, torch.tensor([1, 2]), None, RANK, "mean", -1, 0)),
    (EMBEDDING_BAGS_BACKWARD, (real(4, 3), real(5, 3), ids(4, 2, below=5), None, None, real(4, 2), None, "sum", 2, 0)),
    (EMBEDDING_BAGS_BACKWARD, (real(2, 3), real(5, 3), FLAT, OFFSETS, torch.tensor([1, 2]), None, RANK, "mean", -1, 0)),
    *((RECURRENT_LAYER, cell(name)) for name in CELLS),
    *((RECURRENT_LAYER_BACKWARD, (real(5, 2, 3), real(2, 3), *cell(name))) for name in CELLS),
]  # fmt: skip


def form_on_numbers(operator: Any) -> Callable[..., Any]:
    """What the field computes in place of an operator."""
    full = f"{operator._schema.name.removeprefix('aten::')}.{operator._overloadname}"
    return FORMS.get(full) or FORMS.get(bare_name(operator)) or decomposition_table[operator]


def close(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, (tuple, list)):
        return len(found) == len(wanted) and all(map(close, found, wanted))
    return found.shape == wanted.shape and torch.allclose(found, wanted.to(found.dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator, args", REAL, ids=[f"{row[0]}{number}" for number, row in enumerate(REAL)])
def test_forms_are_the_operators(operator: Any, args: tuple[Any, ...]) -> None:
    assert close(form_on_numbers(operator)(*args), operator(*args))


@pytest.mark.parametrize("rest", [(None, True, None), (MASK, False, 0.3), (BIAS, False, None)])
def test_attention(rest: Any) -> None:
    """With the sum of exponentials in place of its logarithm."""
    grad, out, logsumexp = attended(ATTENTION, *rest)
    found = form_on_numbers(ATTENTION)(*HEADS, *rest)
    assert close(found, (out, logsumexp.exp()))
    mask, *others = rest
    backward = form_on_numbers(ATTENTION_BACKWARD)(grad, *HEADS, mask, out, logsumexp.exp(), *others)
    assert close(backward, ATTENTION_BACKWARD(grad, *HEADS, mask, out, logsumexp, *others))


@pytest.mark.parametrize("rest", [TILE_ROWS, WHOLE_ROWS])
def test_tiles(rest: Any) -> None:
    bias, vectors, rank, *others = rest
    out, logsumexp = TILE(*PARTS, *rest)
    assert close(form_on_numbers(TILE)(*PARTS, *rest), (out, logsumexp.exp()))
    wanted = TILE_BACKWARD(real(*out.shape), *PARTS, bias, vectors, out, logsumexp, rank, *others, bias is not None)
    operands = (*PARTS, bias, vectors, out, logsumexp.exp(), rank)
    assert close(form_on_numbers(TILE_BACKWARD)(real(*out.shape), *operands, *others, bias is not None), wanted)


def test_merged_tiles() -> None:
    one, other = (real(2, 3, 4, seed=seed) for seed in (0, 1))
    sums = [real(2, 3, seed=seed) for seed in (0, 1)]
    sums[0][0, 0] = -math.inf
    out, logsumexp = MERGE(one, sums[0], other, sums[1])
    assert close(form_on_numbers(MERGE)(one, sums[0].exp(), other, sums[1].exp()), (out, logsumexp.exp()))
