"""Complex numbers in the field: pairs of elements, with i * i = -1, as rotary embeddings in polar form have them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from autopar.ir.operator_facts import bare_name, is_composite
from autopar.proof.field_tensor import FieldTensor, Form, NoFieldForm, form, is_moved

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

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _form_of(func, bare_name(func))(*args, **(kwargs or {}))


def _parts(x: Any) -> tuple[Any, Any]:
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
        return _parts(x)
    return x, x


def _product(a: Any, b: Any) -> ComplexFieldTensor:
    (x, y), (u, v) = _parts(a), _parts(b)
    return ComplexFieldTensor(x * u - y * v, x * v + y * u)


def _cast(x: ComplexFieldTensor, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
    if dtype is None or dtype.is_complex:
        return ComplexFieldTensor(x.re.clone(), x.im.clone())
    return aten._to_copy.default(x.re, dtype=dtype)  # type: ignore[no-any-return]


FORMS: dict[str, Form] = {
    "mul": _product,
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
    if is_composite(func):
        return func.decompose  # type: ignore[no-any-return]
    raise NoFieldForm(f"{func} of complex numbers has no form in the field")


@form("polar")
def polar(size: Tensor, angle: Tensor) -> ComplexFieldTensor:
    return ComplexFieldTensor(size * angle.cos(), size * angle.sin())


@form("view_as_complex")
def view_as_complex(x: FieldTensor) -> ComplexFieldTensor:
    return ComplexFieldTensor(x.select(-1, 0), x.select(-1, 1))


@form("complex")
def complex_(re: Tensor, im: Tensor) -> ComplexFieldTensor:
    return ComplexFieldTensor(re, im)
