"""Our attention operator against torch's scaled_dot_product_attention, in fp64, values and gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from autopar.operators import attention

SHAPES = {
    "plain": ((2, 3, 5, 8), (2, 3, 5, 8), 8),
    "cross": ((2, 3, 5, 8), (2, 3, 7, 8), 8),
    "longer queries": ((2, 3, 9, 8), (2, 3, 7, 8), 8),
    "grouped heads": ((2, 6, 5, 8), (2, 2, 5, 8), 8),
    "one key head": ((2, 4, 5, 8), (2, 1, 5, 8), 8),
    "narrow values": ((2, 3, 5, 8), (2, 3, 5, 8), 6),
    "wide values": ((2, 4, 5, 6), (2, 2, 5, 6), 10),
    "odd width": ((1, 2, 4, 5), (1, 2, 4, 5), 5),
    "no heads": ((3, 5, 8), (3, 7, 8), 8),
    "five dims": ((2, 3, 2, 4, 8), (2, 3, 2, 4, 8), 8),
    "six dims": ((2, 1, 3, 4, 4, 8), (2, 1, 3, 2, 4, 8), 8),
    "one query": ((2, 3, 1, 8), (2, 3, 7, 8), 8),
}
MASKS = ("none", "causal", "bool", "float", "rows", "columns", "heads", "empty row", "causal and bool")


def _inputs(shape: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, width = SHAPES[shape]
    torch.manual_seed(0)
    return (
        torch.randn(q, dtype=dtype, requires_grad=True),
        torch.randn(k, dtype=dtype, requires_grad=True),
        torch.randn((*k[:-1], width), dtype=dtype, requires_grad=True),
    )


def _mask(kind: str, q: Tensor, k: Tensor) -> tuple[Tensor | None, bool]:
    torch.manual_seed(1)
    rows, columns = q.shape[-2], k.shape[-2]
    full = (*q.shape[:-2], rows, columns)
    allowed = torch.rand(*full[:-3], *([1] if len(full) > 3 else []), rows, columns) > 0.3
    allowed[..., 0] = True
    match kind:
        case "none" | "causal":
            return None, kind == "causal"
        case "float":
            return torch.randn(full, dtype=q.dtype), False
        case "rows":
            return torch.randn(rows, columns, dtype=q.dtype), False
        case "columns":
            return torch.rand(*full[:-2], 1, columns) > -1, False
        case "heads":
            return torch.randn(full[-3:], dtype=q.dtype), False
        case "empty row":
            allowed[..., -1, :] = False
            return allowed, False
    return allowed, kind.startswith("causal")


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    if q.dim() > 3:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    if mask is not None and causal:
        later = torch.ones(q.shape[-2], k.shape[-2], device=q.device).tril() == 0
        mask, causal = mask.masked_fill(later, False if mask.dtype is torch.bool else -math.inf), False
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)


def _largest_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, expected))


@pytest.mark.parametrize(("shape", "mask"), itertools.product(SHAPES, MASKS))
def test_operator_is_attention(shape: str, mask: str) -> None:
    q, k, v = _inputs(shape)
    allowed, causal = _mask(mask, q, k)
    expected = _reference(q, k, v, allowed, causal, 0.3)
    grad = torch.randn_like(expected)
    found = attention.attend(q, k, v, allowed, 0.0, causal, scale=0.3)
    grads = torch.autograd.grad(found, (q, k, v), grad)
    assert _largest_error((found, *grads), (expected, *torch.autograd.grad(expected, (q, k, v), grad))) < 1e-12


@pytest.mark.parametrize(("shape", "mask"), itertools.product(SHAPES, MASKS))
def test_plain_kernel_and_parts_are_attention(shape: str, mask: str) -> None:
    q, k, v = _inputs(shape)
    allowed, causal = _mask(mask, q, k)
    expected = _reference(q, k, v, allowed, causal, None)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    with torch.no_grad():
        out, logsumexp = attention._plain(q, k, v, allowed, causal, None)
        grads = attention._plain_backward(grad, q, k, v, allowed, out, logsumexp, causal, None)
    assert _largest_error((out, *grads), (expected, *expected_grads)) < 1e-12
    parts = attention.attention_by_parts(q, k, v, allowed, 0.0, causal, None)
    grads = torch.autograd.grad(parts, (q, k, v), grad)
    assert _largest_error((parts, *grads), (expected, *expected_grads)) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_strides_are_those_announced(shape: str) -> None:
    q, k, v = (x.detach() for x in _inputs(shape))
    from torch._subclasses.fake_tensor import FakeTensorMode

    out, logsumexp = attention.ATTENTION(q, k, v, None, True, None)
    grads = attention.ATTENTION_BACKWARD(out, q, k, v, None, out, logsumexp, True, None)
    with FakeTensorMode() as mode:
        fq, fk, fv = (mode.from_tensor(x) for x in (q, k, v))
        announced = attention.ATTENTION(fq, fk, fv, None, True, None)
        announced += attention.ATTENTION_BACKWARD(announced[0], fq, fk, fv, None, *announced, True, None)
    for real, fake in zip((out, logsumexp, *grads), announced, strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
        dense = [(size, a, b) for size, a, b in zip(real.shape, real.stride(), fake.stride()) if size > 1]
        assert all(a == b for _, a, b in dense), (real.shape, real.stride(), fake.stride())


@pytest.mark.parametrize("layout", ("transposed", "strided", "expanded"))
def test_any_strides(layout: str) -> None:
    q, k, v = (x.detach() for x in _inputs("plain"))
    if layout == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "strided":
        q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v))
    else:
        k, v = (x[:, :1].expand_as(x) for x in (k, v))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    expected, found = _reference(q, k, v, None, True, None), attention.attend(q, k, v, is_causal=True)
    grad = torch.randn_like(expected).transpose(-1, -2).contiguous().transpose(-1, -2)
    grads = (torch.autograd.grad(found, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad))
    assert _largest_error((found, *grads[0]), (expected, *grads[1])) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)))
def test_lower_precision(dtype: torch.dtype, bound: float) -> None:
    exact = _inputs("grouped heads")
    rounded = tuple(x.detach().to(dtype).requires_grad_() for x in exact)
    expected, found = _reference(*exact, None, True, None), attention.attend(*rounded, is_causal=True)
    grads = torch.autograd.grad(expected.sum(), exact), torch.autograd.grad(found.sum(), rounded)
    for a, b in zip((expected, *grads[0]), (found, *grads[1]), strict=True):
        assert b.dtype is dtype
        error = float((a - b.double()).detach().abs().max())
        assert error < bound * max(1.0, float(a.detach().abs().max()))


def test_mask_with_a_gradient() -> None:
    q, k, v = _inputs("plain")
    bias = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    expected, found = _reference(q, k, v, bias, False, None), attention.attend(q, k, v, bias)
    every = (q, k, v, bias)
    assert _largest_error(
        torch.autograd.grad(found.sum(), every), torch.autograd.grad(expected.sum(), every)
    ) < 1e-12  # fmt: skip


def test_dropout_is_applied() -> None:
    q, k, v = _inputs("plain")
    torch.manual_seed(0)
    dropped = attention.attend(q, k, v, dropout_p=0.5)
    assert not torch.allclose(dropped, attention.attend(q, k, v))


def test_broadcast_leading_dims() -> None:
    q, k, v = (x.detach() for x in _inputs("plain"))
    found = attention.attend(q, k[:1], v[:, :1])
    with sdpa_kernel(SDPBackend.MATH):
        expected = functional.scaled_dot_product_attention(q, k[:1].expand_as(k), v[:, :1].expand_as(v))
    assert float((found - expected).abs().max()) < 1e-12


def test_logsumexp() -> None:
    q, k, v = (x.detach() for x in _inputs("cross"))
    _, found = attention.ATTENTION(q, k, v, None, False, 0.5)
    expected = torch.logsumexp(0.5 * q @ k.transpose(-1, -2), -1)
    assert float((found - expected).abs().max()) < 1e-12


def test_empty_batch() -> None:
    q = torch.randn(0, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    attention.attend(q, q, q).sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 2, 5, 8)
    with pytest.raises(ValueError, match="multiple"):
        attention.ATTENTION(q, k, k, None, False, None)


@pytest.mark.parametrize(("shape", "dtype"), itertools.product(SHAPES, (torch.float32, torch.bfloat16, torch.float64)))
def test_cuda_kernels_are_called_with_fitting_shapes(shape: str, dtype: torch.dtype) -> None:
    """Without a device: torch's own shape functions of the kernels that would run."""
    q, k, v = (x.detach().to("meta", dtype) for x in _inputs(shape))
    for kind in MASKS:
        mask, causal = _mask(kind, q.double(), k)
        mask = None if mask is None else mask.to("meta", dtype if mask.is_floating_point() else torch.bool)
        out, logsumexp = attention._cuda(q, k, v, mask, causal, None)
        assert out.shape == (*q.shape[:-1], v.shape[-1]) and logsumexp.shape == q.shape[:-1]
        grads = attention._cuda_backward(out, q, k, v, mask, out, logsumexp, causal, None)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("shape", "dtype"), itertools.product(SHAPES, (torch.float32, torch.bfloat16)))
def test_cuda_kernels(shape: str, dtype: torch.dtype) -> None:
    for mask in MASKS:
        _compare_on_cuda(shape, mask, dtype)


def _compare_on_cuda(shape: str, mask: str, dtype: torch.dtype) -> None:
    exact = tuple(x.detach().to(dtype).double().cuda().requires_grad_() for x in _inputs(shape))
    allowed, causal = _mask(mask, exact[0], exact[1])
    allowed = None if allowed is None else allowed.cuda()
    rounded = tuple(x.detach().to(dtype).requires_grad_() for x in exact)
    expected = _reference(*exact, allowed, causal, None)
    found = attention.attend(*rounded, allowed, 0.0, causal)
    grad = torch.randn_like(found)
    grads = torch.autograd.grad(expected, exact, grad.double()), torch.autograd.grad(found, rounded, grad)
    bound = 1e-4 if dtype is torch.float32 else 0.05
    for a, b in zip((expected, *grads[0]), (found, *grads[1]), strict=True):
        error = float((a - b.double()).detach().abs().max())
        assert error < bound * max(1.0, float(a.detach().abs().max())), mask
