"""An operator without a form of its own: an unknown function of its operands, the same wherever it is applied.

    linalg_qr(x: [4@dp, 3, 3])      each matrix of a result is a hash of the matrix that it is made of

Equal calls on equal values give equal results, and nothing else is known (an uninterpreted function, as in the theory
of equality that solvers of formulas have; Ackermann 1954). So what is equal here is equal for the true operator; what
is not may still be, since no law of the operator is known: it counts as not proved, and not as wrong.

Rows that an operator treats alone have each a hash of its own; a mesh may split them. Which dims those are is found by
running the operator itself on numbers, whole and row by row, and not by the rules that the compiler splits by.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.ir.operator_facts import bare_name, is_random, writes
from autopar.proof import field
from autopar.proof.field_complex import ComplexFieldTensor, parts
from autopar.proof.field_tensor import FORMS, Facts, FieldTensor, NoFieldForm, elements_of, field_tensors, form

FAILURES = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)
PIVOTED = ("linalg_", "lu_")  # of which the whole numbers are pivots, a row of them for each matrix
MOST_TRIED = 4096  # ways to lay rows along dims of operands and results
WIDE = (torch.float64, torch.complex128)
CLOSE = 1e-9  # what rounding may change between the whole and one row
_met: list[set[str]] = []


@contextmanager
def recorded() -> Iterator[set[str]]:
    """The names of the operators that are taken as unknown functions within this context."""
    _met.append(set())
    try:
        yield _met[-1]
    finally:
        _met.pop()


def note_unknown(name: str) -> None:
    """Take an operator for an unknown function: what differs with it is not proved, and not refused."""
    for met in _met:
        met.add(name)


@dataclass(frozen=True)
class Rows:
    """Dims that an operator treats row by row: for each, its place in every operand and in every result, or None."""

    operands: tuple[tuple[int | None, ...], ...]
    results: tuple[tuple[int | None, ...], ...]


@form("any other")
def applied(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of ``func`` as a hash of its operands, row by row where it treats rows alone."""
    if is_random(func) or writes(func):
        raise NoFieldForm(f"{func} has no form in the field")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    call = _Call(func, tuple(rest), spec, tuple(places))
    operands = [leaves[place] for place in places]
    like, rows = _known(call, operands)
    note_unknown(str(func))
    digests = [_digest(x, [dims[number] for dims in rows.operands]) for number, x in enumerate(operands)]
    attributes = str(func), repr(rest), repr(spec)
    depth = 1 + max((x.facts.depth for x in field_tensors([_pieces(x) for x in operands])), default=0)
    numbers = itertools.count()

    def made(one: Tensor) -> Tensor:
        number = next(numbers)
        is_flag = "info" in func._schema.returns[min(number, len(func._schema.returns) - 1)].name
        return _result(number, one, digests, [dims[number] for dims in rows.results], attributes, depth, is_flag)

    return pytree.tree_map_only(Tensor, made, like)


for _name in ("grid_sampler_2d", "grid_sampler_3d"):  # whose places in the image are whole parts of numbers
    FORMS[_name] = functools.partial(applied, getattr(torch.ops.aten, _name).default)


@dataclass
class _Call:
    """A call without its tensors. ``places``: of those among the leaves of all arguments."""

    func: Any
    rest: tuple[Any, ...]
    spec: Any
    places: tuple[int, ...]

    def __call__(self, operands: Sequence[Tensor]) -> Any:
        """What the operator gives on numbers."""
        leaves = list(self.rest)
        for place, operand in zip(self.places, operands):
            leaves[place] = operand
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.func(*args, **kwargs)


# ---------------------------------------------------------------- hashes


def _pieces(x: Tensor) -> list[Any]:
    return list(parts(x)) if x.dtype.is_complex else [x]


def _elements(x: Tensor) -> Tensor:
    """int64; the parts of complex numbers along one more dim."""
    if x.dtype.is_complex:
        return torch.stack([elements_of(part, hides=False) for part in _pieces(x)], -1)
    return elements_of(x, hides=False)


def _digest(x: Tensor, dims: Sequence[int | None]) -> Tensor:
    """(rows of each dim of ``dims``, 1 where ``x`` has none): what the elements of a row are, and where."""
    elements = _elements(x)
    own = [dim for dim in dims if dim is not None]
    order = own + [dim for dim in range(elements.dim()) if dim not in own]
    sizes = [elements.shape[dim] if dim is not None else 1 for dim in dims]
    count = math.prod(elements.shape[dim] for dim in order[len(own) :])
    return field.folded(elements.permute(order).reshape([*sizes, count]))


def _result(
    number: int, like: Tensor, digests: Sequence[Tensor], dims: Sequence[int | None], attributes: Any, depth: int,
    is_flag: bool,
) -> Tensor:  # fmt: skip
    """The ``number``-th result, of the sizes and the dtype of ``like``."""
    own = [dim for dim in dims if dim is not None]
    order = own + [dim for dim in range(like.dim()) if dim not in own]
    sizes = [like.shape[dim] for dim in order]
    count = math.prod(sizes[len(own) :])
    rows = [_of_all(digest, dims).unsqueeze(-1) for digest in digests]

    def drawn(part: str) -> Tensor:
        found = field.hashed(part, *rows, torch.arange(count), attributes=attributes)
        laid = found.expand([*sizes[: len(own)], count]).reshape(sizes)
        return laid.permute([order.index(dim) for dim in range(len(order))]).contiguous()

    if not _is_number(like):  # pivots, and flags of failures: kernels believe them, and the factors say which they are
        known = torch.zeros((), dtype=like.dtype) if is_flag else torch.arange(1, like.shape[-1] + 1, dtype=like.dtype)
        return known.expand(like.shape).contiguous()
    facts = Facts(False, 1, depth)
    if like.dtype.is_complex:
        real = torch.float64 if like.dtype is torch.complex128 else torch.float32
        return ComplexFieldTensor(*(FieldTensor(drawn(f"{part} {number}"), real, facts) for part in ("re", "im")))
    return FieldTensor(drawn(f"result {number}"), like.dtype, facts)


def _of_all(digest: Tensor, dims: Sequence[int | None]) -> Tensor:
    """The digests of the rows that a result has; those of the others folded into one."""
    for place in reversed([place for place, dim in enumerate(dims) if dim is None]):
        digest = field.folded(digest.movedim(place, -1)) if digest.shape[place] > 1 else digest.squeeze(place)
    return digest


# ---------------------------------------------------------------- which rows are alone

_results: dict[Any, tuple[Any, Rows]] = {}


def _description(x: Tensor) -> Any:
    """What the rows depend on: sizes and dtype, and the values of whole numbers, which may be lengths and places."""
    return tuple(x.shape), x.dtype, () if _is_number(x) else tuple(x.flatten().tolist())


def _is_number(x: Tensor) -> bool:
    return x.dtype.is_floating_point or x.dtype.is_complex


def _known(call: _Call, operands: Sequence[Tensor]) -> tuple[Any, Rows]:
    key = call.func, repr(call.rest), repr(call.spec), *map(_description, operands)
    if key not in _results:
        _results[key] = _tried(call, operands)
    return _results[key]


def _tried(call: _Call, operands: Sequence[Tensor]) -> tuple[Any, Rows]:
    """Results without numbers, in the dtypes of this call, and the rows. Raises NoFieldForm where it does not run."""
    problem: Exception | None = None
    for stand_in in (_any_numbers, _definite):
        given = [_stand_in(x, number, stand_in) for number, x in enumerate(operands)]
        try:
            whole = call(given)
        except FAILURES as error:
            problem = error
            continue
        if not (bare_name(call.func).lstrip("_").startswith(PIVOTED) or all(map(_is_number, _tensors(whole)))):
            raise NoFieldForm(f"{call.func} gives whole numbers and has no form in the field")
        like = functools.partial(_like, narrow=not any(x.dtype in WIDE for x in operands))
        return pytree.tree_map_only(Tensor, like, whole), _rows(call, given, _tensors(whole))
    shapes = [list(x.shape) for x in operands]
    words = (str(problem).strip().splitlines() or [""])[0]
    raise NoFieldForm(f"{call.func} on {shapes} has no form in the field: {words}") from problem


def _like(x: Tensor, narrow: bool) -> Tensor:
    """``x`` as a tensor without data. ``narrow``: in single precision."""
    dtype = {torch.float64: torch.float32, torch.complex128: torch.complex64}.get(x.dtype, x.dtype)
    return torch.empty(x.shape, dtype=dtype if narrow else x.dtype, device="meta")


def _tensors(results: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]


def _stand_in(x: Tensor, number: int, draw: Callable[[Sequence[int], torch.Generator], Tensor]) -> Tensor:
    if not _is_number(x):
        return x
    generator = torch.Generator().manual_seed(number + 1)
    found = draw(x.shape, generator)
    return torch.complex(found, draw(x.shape, generator)) if x.dtype.is_complex else found


def _any_numbers(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def _definite(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Symmetric and positive definite where it can be: for operators that refuse other matrices."""
    found = _any_numbers(shape, generator)
    if len(shape) < 2 or shape[-1] != shape[-2]:
        return found
    return found @ found.mT + torch.diag(torch.arange(1, shape[-1] + 1, dtype=torch.float64))


def _rows(call: _Call, operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rows:
    chosen: list[tuple[tuple[int | None, ...], tuple[int | None, ...]]] = []
    if any(not _is_number(x) for x in operands) and not bare_name(call.func).lstrip("_").startswith(PIVOTED):
        return Rows((), ())  # whole numbers say where rows begin and end, and kernels believe them
    for size in sorted({size for x in operands for size in x.shape if size > 1}):
        for dims in itertools.islice(_ways(size, operands, results), MOST_TRIED):
            taken = any(
                one is not None and one == other
                for before in chosen
                for one, other in zip((*before[0], *before[1]), dims)
            )
            given, made = dims[: len(operands)], dims[len(operands) :]
            if not taken and _is_alone(call, operands, results, given, made):
                chosen.append((given, made))
    return Rows(tuple(given for given, _ in chosen), tuple(made for _, made in chosen))


def _ways(size: int, operands: Sequence[Tensor], results: Sequence[Tensor]) -> Iterator[tuple[int | None, ...]]:
    """The dims of that size in each operand and result: those that many have in one place first."""

    def choices(x: Tensor) -> list[int | None]:
        return [*(dim for dim, each in enumerate(x.shape) if each == size), None]

    every = itertools.product(*map(choices, (*operands, *results)))
    useful = [dims for dims in itertools.islice(every, MOST_TRIED) if _is_useful(dims, len(operands))]
    return iter(sorted(useful, key=lambda dims: (dims.count(None), len(set(dims)))))


def _is_useful(dims: Sequence[int | None], count: int) -> bool:
    given, made = dims[:count], dims[count:]
    return any(dim is not None for dim in given) and any(dim is not None for dim in made)


def _is_alone(
    call: _Call,
    operands: Sequence[Tensor],
    results: Sequence[Tensor],
    given: Sequence[int | None],
    made: Sequence[int | None],
) -> bool:
    """Whether the operator gives rows in another order for rows in another order, and for one row that row.

    In this order: a kernel may not look whether the sizes of its operands fit, and one row is for those that do.
    """
    turned = [x if dim is None else x.roll(1, dim) for x, dim in zip(operands, given)]
    if not _gives(call, turned, [x if dim is None else x.roll(1, dim) for x, dim in zip(results, made)]):
        return False
    for row in (-1, 0):
        some = [x if dim is None else x.narrow(dim, row, 1).contiguous() for x, dim in zip(operands, given)]
        if not _gives(call, some, [x if dim is None else x.narrow(dim, row, 1) for x, dim in zip(results, made)]):
            return False
    return True


def _gives(call: _Call, operands: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    try:
        found = _tensors(call(operands))
    except FAILURES:
        return False
    return len(found) == len(wanted) and all(map(_close, found, wanted))


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.allclose(one, other, rtol=CLOSE, atol=CLOSE, equal_nan=True)
