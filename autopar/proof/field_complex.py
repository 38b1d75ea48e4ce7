"""Complex numbers in the field: pairs of elements, with i * i = -1, as rotary embeddings in polar form have them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from autopar.ir.operator_facts import bare_name, is_composite, writes
from autopar.proof.field_tensor import FORMS as OF_REAL
from autopar.proof.field_tensor import LEAVES, FieldTensor, Form, NoFieldForm, form, functional_of, is_moved

aten = torch.ops.aten
COMPLEX_OF = {torch.float64: torch.complex128, torch.float32: torch.complex64, torch.float16: torch.complex32}


class ComplexFieldTensor(Tensor):
    """``re``, ``im``: its parts, each a FieldTensor of the same shape (or a tensor of numbers)."""

    re: Tensor
    im: Tensor

    @staticmethod
    def __new__(cls, re: Tensor, im: Tensor) -> ComplexFieldTensor:
        dtype = COMPLEX_OF.get(re.dtype, torch.complex64)
        self: ComplexFieldTensor = torch.Tensor._make_wrapper_subclass(cls, re.shape, dtype=dtype)
        self.re, self.im = re, im
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ComplexFieldTensor({self.re}, {self.im})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _form_of(func, bare_name(func))(*args, **(kwargs or {}))


LEAVES.add(ComplexFieldTensor)


def joined(re: Any, im: Any) -> Tensor:
    """A complex tensor of its two parts: of the field, or of numbers."""
    if isinstance(re, FieldTensor) or isinstance(im, FieldTensor):
        return ComplexFieldTensor(re, im)
    return torch.complex(re, im)


def parts(x: Any) -> tuple[Any, Any]:
    """The real and the imaginary part of an operand."""
    if isinstance(x, ComplexFieldTensor):
        return x.re, x.im
    if isinstance(x, Tensor) and x.dtype.is_complex:
        return x.real, x.imag
    return x, 0


def _of_each_part(func: Any, *args: Any, **kwargs: Any) -> ComplexFieldTensor:
    """A linear operator with real coefficients: what moves, adds or sums."""
    given = [_split(x) for x in args]
    re, im = (func(*(pair[part] for pair in given), **kwargs) for part in (0, 1))
    return ComplexFieldTensor(re, im)


def _split(x: Any) -> tuple[Any, Any]:
    if isinstance(x, (list, tuple)) and any(isinstance(one, Tensor) for one in x):
        pairs = [_split(one) for one in x]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if isinstance(x, Tensor) and (isinstance(x, ComplexFieldTensor) or x.dtype.is_complex):
        return parts(x)
    return x, x


def _product(a: Any, b: Any) -> ComplexFieldTensor:
    (x, y), (u, v) = parts(a), parts(b)
    return ComplexFieldTensor(x * u - y * v, x * v + y * u)


def _quotient(a: Any, b: Any) -> ComplexFieldTensor:
    (x, y), (u, v) = parts(a), parts(b)
    if isinstance(b, Tensor) and b.dtype.is_complex:
        size = u * u + v * v
        return ComplexFieldTensor((x * u + y * v) / size, (y * u - x * v) / size)
    return ComplexFieldTensor(x / u, y / u)


def _product_of_matrices(a: Any, b: Any) -> ComplexFieldTensor:
    (x, y), (u, v) = (_both_parts(one) for one in (a, b))
    return ComplexFieldTensor(torch.matmul(x, u) - torch.matmul(y, v), torch.matmul(x, v) + torch.matmul(y, u))


def _both_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x.re, x.im) if isinstance(x, ComplexFieldTensor) else (x.real, x.imag)


def _size(x: ComplexFieldTensor) -> Tensor:
    return (x.re * x.re + x.im * x.im).sqrt()


def _sign(x: ComplexFieldTensor) -> ComplexFieldTensor:
    return _quotient(x, _size(x))


def _in_place(func: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    """The functional operator, and then a copy into both parts, which views share."""
    if not isinstance(target, ComplexFieldTensor):
        raise NoFieldForm(f"{func} of complex numbers has no form in the field")
    for own, fresh in zip(parts(target), parts(functional_of(func)(target, *args, **kwargs))):
        own.copy_(fresh)
    return target


def _cast(x: ComplexFieldTensor, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
    if dtype is None or dtype.is_complex:
        return ComplexFieldTensor(x.re.clone(), x.im.clone())
    return aten._to_copy.default(x.re, dtype=dtype)  # type: ignore[no-any-return]


FORMS: dict[str, Form] = {
    "mul": _product,
    "div": _quotient,
    "mm": _product_of_matrices,
    "bmm": _product_of_matrices,
    "abs": _size,
    "sgn": _sign,
    "copy": lambda x, source, non_blocking=False: ComplexFieldTensor(*(part + 0 * x.re for part in parts(source))),
    "_conj": lambda x: ComplexFieldTensor(x.re, -x.im),
    "_conj_physical": lambda x: ComplexFieldTensor(x.re, -x.im),
    "resolve_conj": lambda x: x,
    "view_as_real": lambda x: torch.stack([x.re, x.im], -1),
    "_to_copy": _cast,
    "real": lambda x: x.re,
    "imag": lambda x: x.im,
}
LINEAR = ("add", "sub", "sum", "neg", "cumsum", "zeros_like")


@functools.cache
def _form_of(func: Any, name: str) -> Form:
    if name in FORMS:
        return FORMS[name]
    if is_moved(func, name) or name in LINEAR:
        return functools.partial(_of_each_part, func)
    if writes(func):
        return functools.partial(_in_place, func)
    if is_composite(func):
        return func.decompose  # type: ignore[no-any-return]
    return functools.partial(OF_REAL["any other"], func)


@form("polar")
def polar(size: Tensor, angle: Tensor) -> ComplexFieldTensor:
    return ComplexFieldTensor(size * angle.cos(), size * angle.sin())


@form("view_as_complex")
def view_as_complex(x: FieldTensor) -> ComplexFieldTensor:
    return ComplexFieldTensor(x.select(-1, 0), x.select(-1, 1))


@form("complex")
def complex_(re: Tensor, im: Tensor) -> ComplexFieldTensor:
    return ComplexFieldTensor(re, im)
