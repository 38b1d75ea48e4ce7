"""Tensors of field elements that torch takes for floating-point ones: operators on them run in the field.

A ``FieldTensor`` has the dtype of the numbers that it stands for and int64 elements. Whatever operator reaches it, from
a graph, from torch's autograd or from one of torch's own decompositions, is looked up in :data:`FORMS`; what has no row
there follows from the operator itself (:func:`_default`). A floating-point tensor that depends on neither parameters
nor inputs stays one, in ordinary arithmetic, until it meets a ``FieldTensor``: so a constant that is folded and one
that is not are the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils import _pytree as pytree

from autopar.errors import AutoparError
from autopar.ir.operator_facts import bare_name, is_composite, is_pointwise, is_view, writes
from autopar.proof import field as arithmetic

aten = torch.ops.aten
Form = Callable[..., Any]
_F = TypeVar("_F", bound=Form)
FORMS: dict[str, Form] = {}  # by the operator's name without its overload, or with it; "any other" for the rest
LEAVES: set[type] = set()  # other kinds of tensors of the field, whose operators take these for operands


class NoFieldForm(AutoparError):
    """An operator that has no form in the field: what it computes is not proved."""


@dataclass
class Facts:
    """What is known of all elements: ``codes`` may be among them; each is a ``maximum`` of others.

    ``degree``, ``depth``: see :mod:`autopar.proof.field_proof`.
    """

    codes: bool = False
    degree: int = 1
    depth: int = 0
    maximum: bool = False


class FieldTensor(Tensor):
    """Elements of the field, int64, under a floating-point dtype.

    Attributes:
        exponential: exp of this tensor, where that is no hash: of a logarithm, and of what a maximum was taken from.
        shift: this tensor is one of exponentials of scores minus ``shift``: int64 elements of its shape.
    """

    elements: Tensor
    facts: Facts
    exponential: FieldTensor | None
    shift: Tensor | None

    @staticmethod
    def __new__(
        cls, elements: Tensor, dtype: torch.dtype, facts: Facts | None = None, exponential: FieldTensor | None = None
    ) -> FieldTensor:
        self: FieldTensor = torch.Tensor._make_wrapper_subclass(
            cls, elements.shape, strides=elements.stride(), storage_offset=elements.storage_offset(), dtype=dtype
        )
        self.elements, self.facts, self.exponential = elements, facts or Facts(), exponential
        self.shift = None
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FieldTensor({self.dtype}, {self.elements.tolist()})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if len(types) > 1 and not LEAVES.isdisjoint(types):
            return NotImplemented
        return form_of(func)(*args, **(kwargs or {}))


def form(*names: str) -> Callable[[_F], _F]:
    """Register a function as the form of operators, by their names: ``mm``, ``pow.Scalar``, ``autopar::tile``."""

    def register(function: _F) -> _F:
        for name in names:
            assert name not in FORMS, name
            FORMS[name] = function
        return function

    return register


# ---------------------------------------------------------------- operands and results


def elements_of(x: Any, *, hides: bool = True) -> Tensor:
    """The elements of an operand: of the field, of integers, of floats or a Python number."""
    if isinstance(x, FieldTensor):
        return x.elements
    if isinstance(x, Tensor) and x.dtype.is_complex:
        return torch.stack([elements_of(part, hides=hides) for part in (x.real, x.imag)], -1)
    if isinstance(x, Tensor):
        return arithmetic.embedded(x, hides=hides)
    if isinstance(x, float) and hides and x <= arithmetic.HIDES:
        return torch.tensor(arithmetic.NEGATIVE if x == -math.inf else arithmetic.LOWEST)
    return torch.tensor(arithmetic.number(x))


def field_tensors(*trees: Any) -> list[FieldTensor]:
    found: list[FieldTensor] = []
    for tree in trees:
        if isinstance(tree, FieldTensor):
            found.append(tree)
        elif isinstance(tree, (list, tuple)):
            found += field_tensors(*tree)
        elif isinstance(tree, dict):
            found += field_tensors(*tree.values())
    return found


def _mapped(convert: Callable[[Tensor], Any], tree: Any) -> Any:
    """The tree with all tensors converted: as pytree, but quick."""
    if isinstance(tree, Tensor):
        return convert(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(convert, item) for item in tree)
    if isinstance(tree, dict):
        return {key: _mapped(convert, item) for key, item in tree.items()}
    return tree


def dtype_of(*operands: Any) -> torch.dtype:
    """Of the result of an operator on these operands."""
    found: torch.dtype | None = None
    for one in operands:
        floating = isinstance(one, Tensor) and (one.dtype.is_floating_point or one.dtype.is_complex)
        if isinstance(one, FieldTensor) or (floating and one.dim()):
            found = one.dtype if found is None else torch.promote_types(found, one.dtype)
    assert found is not None, "an operand of the field"
    return found


def facts_of(*trees: Any, degree: Callable[[Sequence[int]], int] = max, coded: bool = True) -> Facts:
    """The facts of a result from those of the operands; ``degree``: of theirs."""
    given = field_tensors(trees)
    codes = coded and any(x.facts.codes for x in given)
    return Facts(codes, degree([x.facts.degree for x in given]), max(x.facts.depth for x in given))


def made(elements: Tensor, *operands: Any, facts: Facts | None = None) -> FieldTensor:
    return FieldTensor(elements, dtype_of(*operands), facts or facts_of(operands))


def hashed(name: str, *operands: Any, attributes: Any = ()) -> FieldTensor:
    """A hash of the operands, elementwise."""
    found = arithmetic.hashed(name, *map(elements_of, operands), attributes=attributes)
    depth = 1 + max(x.facts.depth for x in field_tensors(operands))
    return made(found, *operands, facts=Facts(False, 1, depth))


# ---------------------------------------------------------------- what follows from an operator


def form_of(func: Any) -> Form:
    """What runs in place of an operator. The result raises NoFieldForm where there is nothing."""
    full = f"{func._schema.name.removeprefix('aten::').removeprefix('prims::')}.{func._overloadname}"
    return _form_of(func, full, bare_name(func), len(FORMS))


@functools.cache
def _form_of(func: Any, full: str, name: str, _: int) -> Form:
    found = FORMS.get(full) or FORMS.get(name)
    return found if found is not None else _default(func, name)


def _default(func: Any, name: str) -> Form:
    """The form of an operator that has no row: what is moved, compared, written out by torch, or elementwise."""
    if not func._schema.returns:
        return lambda *args, **kwargs: None  # it only looks at its arguments
    if writes(func):
        return functools.partial(_in_place, func)
    if func is aten.view.dtype:
        return functools.partial(_nothing, func)
    if is_moved(func, name):
        return functools.partial(moved, func)
    if name in ORDERED:
        return functools.partial(ordered, func)
    if is_composite(func, in_python=False):
        return func.decompose  # type: ignore[no-any-return]
    written = decomposition_table.get(func)
    elementwise = is_pointwise(func)
    if written is not None and (not elementwise or written.__module__ == "torch._decomp.decompositions"):
        return written
    if elementwise:
        return functools.partial(_hashed_call, func, name)
    if is_composite(func):
        return func.decompose  # type: ignore[no-any-return]
    return functools.partial(FORMS.get("any other", _nothing), func)


def is_moved(func: Any, name: str) -> bool:
    """Whether an operator runs on elements as they are: it puts them elsewhere."""
    return name in MOVES or (is_view(func) and name != "to")


def _nothing(func: Any, *args: Any, **kwargs: Any) -> Any:
    shapes = [list(x.shape) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    raise NoFieldForm(f"{func} on {shapes} has no form in the field")


def _hashed_call(func: Any, name: str, *args: Any, **kwargs: Any) -> FieldTensor:
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    rest = pytree.tree_map(lambda x: "" if isinstance(x, Tensor) else x, (args, kwargs))
    return hashed(name, *tensors, attributes=(func._overloadname, rest))


def _in_place(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The functional operator, and then a copy into the elements, which views share."""
    target = args[0]
    if not isinstance(target, FieldTensor):
        return _nothing(func, *args, **kwargs)
    result = form_of(functional_of(func))(*args, **kwargs)
    if torch.Tag.inplace_view in func.tags and result.shape == target.shape:  # other strides, and nothing is written
        target.elements = result.elements
        return target
    target.elements.copy_(elements_of(result))
    if isinstance(result, FieldTensor):
        facts = target.facts
        facts.codes = facts.codes or result.facts.codes
        facts.degree, facts.depth = (
            max(facts.degree, result.facts.degree),
            max(facts.depth, result.facts.depth),
        )
    target.exponential = None
    return target


def functional_of(func: Any) -> Any:
    """The operator that gives what ``func`` writes into its first operand."""
    packet = getattr(getattr(torch.ops, func.namespace), func._schema.name.split("::")[1].removesuffix("_"))
    same = func._overloadname in packet.overloads()  # transpose_ is transpose.int
    return getattr(packet, func._overloadname if same else packet.overloads()[0])


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES = _names("""
    _reshape_copy _unsafe_index as_strided_scatter autopar::columns autopar::columns_backward autopar::permute_rows
    autopar::pick_rows broadcast_in_dim cat channel_shuffle clone constant_pad_nd contiguous detach_copy
    diagonal_backward diagonal_scatter empty_like expand_copy fill flip full_like gather index index_copy index_fill
    index_put index_select lift_fresh lift_fresh_copy masked_fill masked_scatter masked_scatter_backward movedim
    new_empty new_empty_strided new_full new_ones new_zeros ones_like pad permute_copy pixel_shuffle pixel_unshuffle
    repeat repeat_interleave roll scatter select_backward select_copy select_scatter slice_backward slice_copy
    slice_scatter split_with_sizes_copy squeeze_copy stack t_copy take trace_copy transpose_copy tril triu
    unsqueeze_copy view_copy where zeros_like
""")
# of which every element of the result is one of the operand: none is made
REARRANGES = _names("""
    _reshape_copy autopar::columns autopar::permute_rows clone contiguous flip gather index index_select repeat roll
    take
""")
ORDERED = _names("""
    _unique2 abs adaptive_max_pool2d all amax amin aminmax any argmax argmin argsort bucketize clamp clamp_max
    clamp_min cummax cummin eq equal fmax fmin ge gt hardshrink_backward hardtanh heaviside isclose isfinite isinf
    isnan isneginf isposinf kthvalue le logical_and logical_not logical_or lt max max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices maximum median min minimum mode nan_to_num ne nonzero
    reflection_pad1d reflection_pad1d_backward reflection_pad2d reflection_pad2d_backward reflection_pad3d
    reflection_pad3d_backward relu relu_backward replication_pad1d replication_pad1d_backward replication_pad2d
    replication_pad2d_backward replication_pad3d replication_pad3d_backward scatter_reduce searchsorted sgn sign
    signbit softshrink_backward sort threshold threshold_backward topk unique_dim upsample_nearest1d
    upsample_nearest1d_backward upsample_nearest2d upsample_nearest2d_backward upsample_nearest3d
    upsample_nearest3d_backward
""")
_FACTORIES = _names("""
    empty_like full_like new_empty new_empty_strided new_full new_ones new_zeros ones_like zeros_like
""")


def _numbers_as(elements: Callable[[Any], Any], tree: Any, func: Any) -> Any:
    """The arguments of a call with all that stands for numbers replaced by its elements; sizes stay."""
    return _mapped(lambda x: elements(x) if _is_number(x) else x, tree)


def _is_number(x: Tensor) -> bool:
    return isinstance(x, FieldTensor) or x.dtype.is_floating_point


def _scalars(func: Any, args: Sequence[Any], kwargs: dict[str, Any], convert: Callable[[Any], Any]) -> Any:
    """Numbers among the arguments that are as elements of the result, not sizes or dims."""
    names, numbers = _argument_names(func)
    given = dict(zip(names, args)) | kwargs
    for name in numbers:
        if isinstance(given.get(name), bool | int | float):
            given[name] = convert(given[name])
    return given


@functools.cache
def _argument_names(func: Any) -> tuple[list[str], list[str]]:
    """Of all arguments, and of those that are numbers."""
    arguments = func._schema.arguments
    numbers = [one.name for one in arguments if str(one.type) in ("number", "Optional[number]")]
    return [one.name for one in arguments], numbers


def moved(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator that puts elements elsewhere, or makes some: it runs as it is, on the elements."""
    name = bare_name(func)
    if name in _FACTORIES:
        return _like(func, name, args, kwargs)
    fields = field_tensors(args, kwargs)
    if len(fields) == 1 and fields[0] is args[0] and is_view(func) and fields[0].exponential is fields[0].shift is None:
        x = args[0]
        return _mapped(lambda y: FieldTensor(y, x.dtype, x.facts), func(x.elements, *args[1:], **kwargs))
    fresh: list[Tensor] = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and _is_number(x)]
    given = _scalars(func, args, kwargs, lambda value: int(elements_of(value)))
    found = func(**_numbers_as(elements_of, given, func))
    codes = [value for value in given.values() if isinstance(value, int) and not isinstance(value, bool) and value < 0]
    facts = facts_of(fields) if fields else Facts()
    if len(fresh) > 1 or codes:
        plain = any(not isinstance(x, FieldTensor) for x in fresh) or bool(codes)
        facts = Facts(facts.codes or plain, facts.degree, facts.depth)
    elif fields:
        facts = fields[0].facts  # a view shares what is known of its memory
    dtype = dtype_of(*fresh)
    result = _mapped(lambda x: FieldTensor(x, dtype, facts), found)
    if len(fresh) == 1 and isinstance(result, FieldTensor):
        _carry(result, fields[0], func, args, kwargs)
    return result


def _carry(result: FieldTensor, x: FieldTensor, func: Any, args: Any, kwargs: Any) -> None:
    """Move what is known of ``x`` as its elements were; where some are hidden by a number, their exponential is 0."""
    name = bare_name(func)
    given = _scalars(func, args, kwargs, lambda value: 0 if elements_of(value) < 0 else None)
    hides = name == "masked_fill" and given.get("value") == 0
    if x.exponential is not None and (hides or name in REARRANGES or is_view(func)):
        result.exponential = func(**_mapped(lambda y: x.exponential if y is x else y, given))
    if x.shift is not None and (name in REARRANGES or is_view(func)):
        result.shift = func(**_numbers_as(lambda y: x.shift, given, func))
    value = kwargs.get("value", args[-1])
    if x.shift is not None and name == "masked_fill" and isinstance(value, int | float) and value == 0:
        result.shift = x.shift  # an exponential that is left out is 0 whatever the shift


def _like(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """A new tensor with the sizes of another one, or near it."""
    model = args[0]
    dtype = kwargs.get("dtype") or model.dtype
    sizes = model.shape if name.endswith("_like") else args[1]
    if not dtype.is_floating_point:
        plain = torch.empty(model.shape, dtype=model.dtype)
        return func(plain, *args[1:], **kwargs)  # type: ignore[no-any-return]
    value: Any = 1.0 if "ones" in name else 0.0
    if "full" in name:
        value = kwargs.get("fill_value", args[-1])
    element = int(elements_of(float(value) if not isinstance(value, Tensor) else value))
    if name == "new_empty_strided":
        return FieldTensor(torch.empty_strided(sizes, args[2], dtype=torch.int64).fill_(element), dtype)
    dense = (
        torch.empty_like(model.elements, dtype=torch.int64)
        if name.endswith("_like")
        else torch.empty(tuple(sizes), dtype=torch.int64)
    )
    return FieldTensor(dense.fill_(element), dtype, Facts(element < 0, 0, 0))


def ordered(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator that compares, or picks and adds a few: it runs on the representatives around zero in float64."""
    fields = field_tensors(args, kwargs)
    given = _scalars(func, args, kwargs, lambda value: float(arithmetic.signed(elements_of(value))))
    found = func(**_numbers_as(lambda x: arithmetic.signed(elements_of(x)), given, func))
    dtype, facts = dtype_of(*fields), facts_of(fields)
    facts.maximum = bare_name(func) in ("amax", "max", "maximum", "clamp_min")

    def back(x: Any) -> Any:
        if not x.dtype.is_floating_point:
            return x
        return FieldTensor(arithmetic.unsigned(x), dtype, facts)

    return _mapped(back, found)
