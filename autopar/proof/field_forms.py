"""The field forms of arithmetic: sums, products, quotients, elementary functions, reductions, products of matrices.

These are the ground: they act on elements. All other forms are written in operators that arrive here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.proof import field
from autopar.proof.field import LOWEST, NEGATIVE, POSITIVE, PRIME, UNDEFINED
from autopar.proof.field_tensor import (
    FORMS,
    Facts,
    FieldTensor,
    dtype_of,
    elements_of,
    facts_of,
    field_tensors,
    form,
    hashed,
    made,
    moved,
)

aten = torch.ops.aten

# ---------------------------------------------------------------- sums and products of elements


@form("add")
def add(a: Any, b: Any, alpha: Any = 1) -> FieldTensor:
    x, y = elements_of(a), elements_of(b if alpha == 1 else _times(b, alpha))
    found, facts = (x + y) % PRIME, facts_of(a, b)
    if facts.codes or _may_have_codes(a, b):
        found, facts = _coded(found, x, y), Facts(True, facts.degree, facts.depth)
    result = made(found, a, b, facts=facts)
    shifts = [x.shift for x in (a, b) if isinstance(x, FieldTensor) and x.shift is not None]
    if len(shifts) == 2 and torch.equal(*shifts):
        result.shift = shifts[0]  # parts of one sum of exponentials
    return result


def _may_have_codes(*operands: Any) -> bool:
    """Whether an operand that is no FieldTensor has a code: a mask that is added."""
    plain = [x for x in operands if not isinstance(x, FieldTensor)]
    return any(field.has_codes(elements_of(x)) for x in plain)


def _coded(found: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A sum with codes among its terms: the stronger code."""
    code = torch.minimum(x.clamp(max=0), y.clamp(max=0))
    opposite = (torch.maximum(x, y) == NEGATIVE) & (code == POSITIVE)
    return torch.where(code < 0, torch.where(opposite, UNDEFINED, code), found)


def _times(b: Any, alpha: Any) -> Any:
    return b * alpha if isinstance(b, Tensor) else float(b) * alpha


@form("sub")
def sub(a: Any, b: Any, alpha: Any = 1) -> FieldTensor:
    result = add(a, _times(b, -alpha))
    if isinstance(a, FieldTensor) and isinstance(b, FieldTensor) and b.facts.maximum:
        result.exponential = div(exp(a), exp(b))  # the one law of exponentials that stable sums of them need
        result.exponential.shift = b.elements.expand(result.shape)
    return result


@form("rsub")
def rsub(a: Any, b: Any, alpha: Any = 1) -> FieldTensor:
    return add(b, _times(a, -alpha))


@form("neg")
def neg(x: FieldTensor) -> FieldTensor:
    return mul(x, -1)


@form("mul")
def mul(a: Any, b: Any) -> FieldTensor:
    if isinstance(b, complex):
        return FORMS["complex"](a * b.real, a * b.imag)  # type: ignore[no-any-return]
    x, y = elements_of(a, hides=False), elements_of(b, hides=False)
    found, facts = x * y % PRIME, facts_of(a, b, degree=sum)
    if facts.codes:
        found = _coded_product(found, x, y)
    return made(found, a, b, facts=facts)


def _coded_product(found: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A code times a number has the sign of both, and a very low number times zero is zero."""
    x, y = torch.broadcast_tensors(x, y)  # type: ignore[no-untyped-call]
    code, other = torch.minimum(x, y), torch.maximum(x, y)
    sign = field.signed(torch.where(other >= 0, other, 1)).sign()
    turned = torch.where(code == NEGATIVE, POSITIVE, torch.where(code == POSITIVE, NEGATIVE, code))
    result = torch.where(sign > 0, code, torch.where(sign < 0, turned, torch.where(code == LOWEST, 0, UNDEFINED)))
    return torch.where(code < 0, result, found)


@form("reciprocal")
def reciprocal(x: FieldTensor) -> FieldTensor:
    facts = facts_of(x)
    return made(field.inverse(x.elements.clamp(min=0)), x, facts=Facts(False, 1, facts.depth + 1))


@form("div", "true_divide")
def div(a: Any, b: Any, *, rounding_mode: str | None = None) -> FieldTensor:
    if rounding_mode is not None:
        return hashed("div", a, b, attributes=rounding_mode)
    if isinstance(b, FieldTensor):
        return mul(a, reciprocal(b))
    inverse = FieldTensor(field.inverse(elements_of(b, hides=False).clamp(min=0)), dtype_of(a), Facts(False, 0, 0))
    found = mul(a, inverse)
    return found if isinstance(b, Tensor) and b.dim() else made(found.elements, a, facts=found.facts)


@form("pow.Tensor_Scalar")
def pow_(x: FieldTensor, exponent: float) -> FieldTensor:
    if float(exponent).is_integer():
        facts = facts_of(x)
        if exponent < 0:
            return reciprocal(pow_(x, -exponent))
        whole = int(exponent)
        return made(field.power(x.elements, whole), x, facts=Facts(facts.codes, facts.degree * whole, facts.depth))
    if float(2 * exponent).is_integer():
        return pow_(elementary("sqrt", x), 2 * exponent)
    return hashed("pow", x, attributes=float(exponent))


@form("square")
def square(x: FieldTensor) -> FieldTensor:
    return pow_(x, 2)


@form("pow.Scalar", "pow.Tensor_Tensor")
def pow_of(base: Any, exponent: Any) -> FieldTensor:
    return hashed("power", base, exponent)


# ---------------------------------------------------------------- elementary functions: hash functions by their names


def elementary(name: str, x: FieldTensor) -> FieldTensor:
    """A hash of the operand, but at the points at which the function has a value that programs may count on."""
    found = hashed(name, x)
    for point, value in POINTS[name].items():
        if point >= 0 or x.facts.codes:
            found.elements.masked_fill_(x.elements == point, value)
            found.facts.codes = found.facts.codes or (value < 0 and field.has_codes(found.elements))
    return found


POINTS: dict[str, dict[int, int]] = {  # function -> argument -> value, both elements or codes
    "exp": {0: 1, NEGATIVE: 0, LOWEST: 0, POSITIVE: POSITIVE},
    "log": {1: 0, 0: NEGATIVE, POSITIVE: POSITIVE},
    "sqrt": {0: 0, 1: 1, POSITIVE: POSITIVE},
    "sigmoid": {0: field.number(0.5), NEGATIVE: 0, LOWEST: 0, POSITIVE: 1},
    "tanh": {0: 0, NEGATIVE: PRIME - 1, LOWEST: PRIME - 1, POSITIVE: 1},
    "erf": {0: 0, NEGATIVE: PRIME - 1, LOWEST: PRIME - 1, POSITIVE: 1},
    "sin": {0: 0},
    "cos": {0: 1},
    "atan": {0: 0},
    "sinh": {0: 0},
    "cosh": {0: 1},
}


@form("exp")
def exp(x: FieldTensor) -> FieldTensor:
    """The exponential of a logarithm that is kept with its operand is that operand."""
    return x.exponential if x.exponential is not None else elementary("exp", x)


@form("log")
def log(x: FieldTensor) -> FieldTensor:
    """Of a sum of shifted exponentials: the logarithm of the sum of those that are not, minus the shift."""
    if x.shift is None:
        return elementary("log", x)
    shift = FieldTensor(x.shift, x.dtype, x.facts)
    return sub(elementary("log", mul(x, exp(shift))), shift)


for _name in POINTS.keys() - {"exp", "log"}:
    FORMS[_name] = lambda x, _name=_name: elementary(_name, x)
FORMS["rsqrt"] = lambda x: x.sqrt().reciprocal()
FORMS["expm1"] = lambda x: x.exp() - 1
FORMS["log1p"] = lambda x: (x + 1).log()
FORMS["tan"] = lambda x: aten.sin(x) / aten.cos(x)
FORMS["silu"] = lambda x: x * aten.sigmoid(x)
FORMS["softplus"] = lambda x, beta=1, threshold=20: hashed("softplus", x * beta, attributes=float(threshold)) / beta
FORMS["log_sigmoid_forward"] = lambda x: (aten.log(aten.sigmoid(x)), x * 0)
FORMS["gelu"] = lambda x, approximate="none": x * _gelu_factor(x, approximate)


def _gelu_factor(x: FieldTensor, approximate: str) -> FieldTensor:
    if approximate == "tanh":
        return 0.5 * (1 + aten.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # type: ignore[no-any-return]
    return 0.5 * (1 + aten.erf(x * math.sqrt(0.5)))  # type: ignore[no-any-return]


# ---------------------------------------------------------------- what only changes the type


@form("_to_copy", "convert_element_type")
def to_copy(x: FieldTensor, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
    dtype = dtype or x.dtype
    if dtype is torch.bool:
        return x.elements != 0
    if dtype.is_complex:
        return FORMS["complex"](x, x * 0)  # type: ignore[no-any-return]
    if not dtype.is_floating_point:
        return hashed("whole number", x).elements
    return _kept(FieldTensor(x.elements.clone(), dtype, x.facts, x.exponential), x)


def _kept(result: FieldTensor, x: FieldTensor) -> FieldTensor:
    result.shift = x.shift
    return result


@form("copy")
def copy(x: FieldTensor, source: Any, non_blocking: bool = False) -> FieldTensor:
    return made(
        elements_of(source).expand(x.shape).clone(), x, facts=facts_of(source if isinstance(source, FieldTensor) else x)
    )


@form("item", "_local_scalar_dense")
def item(x: FieldTensor) -> Any:
    return float(x.elements)


@form("equal")
def equal(a: Any, b: Any) -> bool:
    return torch.equal(elements_of(a), elements_of(b))


FORMS["allclose"] = lambda a, b, *within, **more: equal(a, b)  # there is no rounding

# ---------------------------------------------------------------- reductions


def _dims(x: Tensor, dim: int | Sequence[int] | None) -> list[int]:
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    return [d % max(x.dim(), 1) for d in dims] or list(range(x.dim()))


@form("sum")
def sum_(
    x: FieldTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, output_dtype: Any = None
) -> FieldTensor:
    if not x.dim():
        return FieldTensor(x.elements.clone(), dtype or x.dtype, x.facts)
    dims = _dims(x, dim)
    found = field.total(x.elements, dims, keepdim)
    if x.facts.codes and field.has_codes(x.elements):
        worst = x.elements.clamp(max=0).amin(dims, keepdim)
        found = torch.where(worst < 0, worst, found)
    result = FieldTensor(found, dtype or x.dtype, x.facts)
    if x.shift is not None and torch.equal(x.shift.amax(dims, keepdim), x.shift.amin(dims, keepdim)):
        result.shift = x.shift.amax(dims, keepdim)
    return result


@form("mean")
def mean(x: FieldTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> FieldTensor:
    count = math.prod(x.shape[d] for d in _dims(x, dim))
    return div(sum_(x, dim, keepdim, dtype=dtype), max(count, 1))


@form("var_mean.correction")
def var_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = _dims(x, dim)
    count = math.prod(x.shape[d] for d in dims) - (1 if correction is None else correction)
    middle = x.mean(dims, keepdim=True)
    spread = (x - middle).square().sum(dims, keepdim=keepdim) / count
    return spread, middle if keepdim else x.mean(dims)


FORMS["var.correction"] = lambda x, dim=None, **kwargs: var_mean(x, dim, **kwargs)[0]
FORMS["std.correction"] = lambda x, dim=None, **kwargs: var_mean(x, dim, **kwargs)[0].sqrt()


@form("cumsum")
def cumsum(x: FieldTensor, dim: int, *, dtype: Any = None) -> FieldTensor:
    return FieldTensor(x.elements.cumsum(dim) % PRIME, dtype or x.dtype, x.facts)


@form("prod")
def prod(
    x: FieldTensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None, output_dtype: Any = None
) -> FieldTensor:
    """By halves, one dim after the other."""
    found, degree = x.elements, x.facts.degree
    for dim in sorted(_dims(x, dims), reverse=True) if x.dim() else ():
        degree *= max(found.shape[dim], 1)
        while found.shape[dim] > 1:
            half = found.shape[dim] // 2
            pairs = found.narrow(dim, 0, half) * found.narrow(dim, half, half) % PRIME
            found = torch.cat([pairs, found.narrow(dim, 2 * half, found.shape[dim] - 2 * half)], dim)
        found = found if found.shape[dim] else found.new_ones([1 if d == dim else s for d, s in enumerate(found.shape)])
        found = found if keepdim else found.squeeze(dim)
    return FieldTensor(found, dtype or x.dtype, Facts(x.facts.codes, degree, x.facts.depth))


@form("_trilinear")
def trilinear(a: Any, b: Any, c: Any, of_a: Any, of_b: Any, of_c: Any, dims: Any, unroll: int = 1) -> Tensor:
    """Products of three, each with new dims where it has none, summed over ``dims``."""
    for number, new in enumerate((of_a, of_b, of_c)):
        operand = (a, b, c)[number]
        for dim in sorted(new):
            operand = operand.unsqueeze(dim)
        a, b, c = (operand if number == place else one for place, one in enumerate((a, b, c)))
    return (a * b * c).sum(list(dims))  # type: ignore[no-any-return]


@form("trace")
def trace(x: FieldTensor) -> Tensor:
    return x.diagonal().sum()


# ---------------------------------------------------------------- sums of what is put at one place


def _summed(func: Any, *args: Any, **kwargs: Any) -> FieldTensor:
    """An operator that moves elements and adds those that meet."""
    found: FieldTensor = moved(func, *args, **kwargs)
    return FieldTensor(found.elements % PRIME, found.dtype, found.facts)


FORMS["scatter_add"] = lambda *args: _summed(aten.scatter_add.default, *args)
FORMS["index_add"] = lambda x, dim, index, source, alpha=1: _summed(
    aten.index_add.default, x, dim, index, source * alpha if alpha != 1 else source
)
FORMS["embedding"] = lambda table, ids, *rest: aten.index_select(table, 0, ids.reshape(-1)).reshape(
    *ids.shape, *table.shape[1:]
)


@form("put")
def put(x: Any, index: Tensor, source: Any, accumulate: bool = False) -> Tensor:
    return index_put(x.reshape(-1), [index.reshape(-1)], source.reshape(-1), accumulate).reshape(x.shape)


@form("index_put", "_unsafe_index_put")
def index_put(x: Any, indices: Sequence[Any], source: Any, accumulate: bool = False) -> FieldTensor:
    if accumulate:
        return _summed(aten.index_put.default, x, indices, source, True)
    return moved(aten.index_put.default, x, indices, source)  # type: ignore[no-any-return]


@form("embedding_dense_backward")
def embedding_dense_backward(grad: Tensor, ids: Tensor, count: int, padding_idx: int, by_frequency: bool) -> Tensor:
    if by_frequency:
        raise NotImplementedError
    rows = torch.where((ids == padding_idx).unsqueeze(-1), 0.0, grad).reshape(-1, grad.shape[-1])
    return grad.new_zeros(count, grad.shape[-1]).index_add(0, ids.reshape(-1), rows)


@form("unfold_backward")
def unfold_backward(grad: Tensor, sizes: Sequence[int], dim: int, size: int, step: int) -> Tensor:
    dim %= len(sizes)
    places = torch.arange(grad.shape[dim])[:, None] * step + torch.arange(size)
    flat = grad.movedim(-1, dim + 1).flatten(dim, dim + 1)
    return grad.new_zeros(sizes).index_add(dim, places.flatten(), flat)


@form("as_strided")
def as_strided(x: FieldTensor, sizes: Any, strides: Any, offset: int | None = None) -> FieldTensor:
    return FieldTensor(x.elements.as_strided(sizes, strides, offset), x.dtype, x.facts)


# ---------------------------------------------------------------- products of matrices


@form("mm", "bmm", "matmul")
def product(a: Any, b: Any) -> FieldTensor:
    for x in field_tensors(a, b):
        if x.facts.codes and field.has_codes(x.elements):
            raise NotImplementedError("an infinite number in a product")
    return made(field.product(elements_of(a), elements_of(b)), a, b, facts=facts_of(a, b, degree=sum, coded=False))


FORMS["mv"] = lambda a, b: (product(a, b.unsqueeze(-1))).squeeze(-1)
FORMS["dot"] = FORMS["vdot"] = lambda a, b: (a * b).sum()
FORMS["addmm"] = FORMS["baddbmm"] = lambda m, a, b, *, beta=1, alpha=1: m * beta + (product(a, b)) * alpha
FORMS["addbmm"] = lambda m, a, b, *, beta=1, alpha=1: m * beta + product(a, b).sum(0) * alpha
FORMS["addmv"] = lambda m, a, b, *, beta=1, alpha=1: m * beta + aten.mv(a, b) * alpha
FORMS["addcmul"] = lambda m, a, b, *, value=1: m + a * b * value
FORMS["addcdiv"] = lambda m, a, b, *, value=1: m + a / b * value
FORMS["lerp"] = lambda a, b, weight: a + (b - a) * weight
