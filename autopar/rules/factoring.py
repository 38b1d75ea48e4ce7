"""The content of a splitting rule: the named factors of each tensor of an operator, and the strategies that follow.

A rule is one line, ``"b m k, b k n -> b m n"``: every dim is a factor or a product of factors ``(h d)``. Splitting a
factor splits every tensor dim that has it; a factor missing from the output is summed, so splitting it leaves the
output partial. Tensors without the factor are used whole. (Factor rules: Shardy; einsum-like lines: GSPMD, nnScaler.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

from torch import fx

from autopar.ir.layout import INVARIANT, PARTIAL, REPLICATED, Partial, Placement, Split
from autopar.ir.node import Value
from autopar.ir.operator_facts import argument_names, is_overload
from autopar.rules.lines import Line, read_rule

ANY_SIZE = 2  # of a factor that is never split: its size does not matter. Not 1, since a dim of size 1 has no factor
Shape = tuple[int, ...]
Dims = tuple[tuple[str, ...], ...]  # for each dim its factors, outermost first; () for a dim of size 1


@dataclass(frozen=True)
class Call:
    """One operator call as rules see it. The sizes are those of the present graph, already cut by earlier axes."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[fx.Node, ...]  # the tensor arguments, in the order in which they are passed
    inputs: tuple[Shape, ...]  # their shapes
    outputs: tuple[Shape, ...]
    diff_inputs: tuple[bool, ...] = ()  # whether a gradient flows into each operand
    parameters: tuple[bool, ...] = ()  # whether each operand is a parameter, or a cast or transposition of one

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by its position or its keyword."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


@dataclass(frozen=True)
class Part:
    """The part of an operator that is split: a factor, cut inside as a ``Split`` is (``outer`` blocks, ``ratio``)."""

    factor: str
    outer: int = 1
    ratio: tuple[int, ...] = (1,)
    mirrored: bool = False

    def __str__(self) -> str:
        text = self.factor + (f"/{self.outer}" if self.outer > 1 else "") + "~" * self.mirrored
        return text + (f":{'+'.join(map(str, self.ratio))}" if self.ratio != (1,) else "")


@dataclass(frozen=True)
class Strategy:
    """One way to run an operator on an axis: the placements of its operands and of its outputs."""

    label: str
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    part: Part | None = None
    share: float = 1.0  # the fraction of the operator's work that each rank does


class Emit(Protocol):
    """Adds nodes to the graph under construction, where a split of a factor needs other code."""

    def __call__(
        self, target: Any, args: tuple[Any, ...], *types: Value, kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        """A call with outputs of the given types."""

    def axis_index(self, axis: str) -> fx.Node:
        """This rank's position on the axis, an int64 scalar."""

    def partial(self, whole: Value, axis: str, op: str = "sum") -> Value:
        """The type of a pending reduction of ``whole`` over the axis."""

    def all_reduce(self, summand: fx.Node, axis: str, op: str = "sum") -> fx.Node:
        """The reduction of a pending value."""


# (emit, the node with its local arguments, axis, ways) -> the node that replaces it
Rewrite = Callable[[Emit, fx.Node, str, int], fx.Node]
Ways = int | Fraction  # by what sizes are divided; below 1 where they grow (a padded batch)
# (call, strategy, local output shapes, ways) -> the arguments of the local call
Localize = Callable[["Call", Strategy, tuple[Shape, ...], Ways], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Factoring:
    """The factors of one operator call.

    sizes:    of each factor; ``ANY_SIZE`` for those that must not be split
    reduce:   how a factor that no output has is combined ("sum" if not listed; "whole": the rewrite finishes it)
    whole:    factors that must not be split (softmax's own dim)
    linear:   sets of operands in which the operator is jointly linear, the others held fixed: they may be partial
    added:    operands that are added to a sum over factors that they lack (a bias): added once, on one rank
    uneven:   factors that may be padded at the end: what padding holds is finite, and reaches nothing but padding
    plain:    factors of which each rank must have one contiguous piece
    localize: cuts the sizes written in the arguments; rewrites: other code for a split of a certain factor
    """

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    sizes: Mapping[str, int]
    reduce: Mapping[str, str] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    added: frozenset[int] = frozenset()
    uneven: frozenset[str] = frozenset()
    plain: frozenset[str] = frozenset()
    localize: Localize | None = None
    rewrites: Mapping[str, Rewrite] = field(default_factory=dict)
    contraction: bool = False  # matmul-like: its weights are what tensor parallelism splits
    work: int | None = None  # multiply-adds of a contraction, where they are not the product of all sizes

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that may be split, in order of first appearance."""
        seen = dict.fromkeys(f for dims in (*self.inputs, *self.outputs) for dim in dims for f in dim)
        return tuple(f for f in seen if f not in self.whole and self.sizes[f] > 1)

    def splits(self, part: Part, tensor: Dims) -> list[Split]:
        """The splits of one tensor that go with ``part``; none where the tensor lacks the factor."""
        found = []
        for dim, factors in enumerate(tensor):
            if part.factor in factors:
                before = math.prod(self.sizes[f] for f in factors[: factors.index(part.factor)])
                found.append(Split(dim, before * part.outer, part.ratio, part.mirrored))
        return found

    def part_of(self, tensor: Dims, split: Split, ways: int) -> Part | None:
        """The part of the operator to which a split of one of its tensors belongs; None where no rule carries it."""
        remaining = split.outer
        for factor in tensor[split.dim]:
            size = self.sizes[factor]
            if size == 1:
                continue
            if remaining % size == 0 and remaining >= size:
                remaining //= size
                continue
            if split.mirrored and remaining % 2:  # which blocks are odd, another factor says
                return None
            part = Part(factor, remaining, split.ratio, split.mirrored)
            return part if self.allows(part, ways) else None
        return None

    def allows(self, part: Part, ways: int) -> bool:
        size = self.sizes.get(part.factor, 1)
        plain = part.outer == 1 and part.ratio == (1,)
        if size == 1 or part.factor in self.whole or size % part.outer or (part.factor in self.plain and not plain):
            return False
        if Split(0, part.outer, part.ratio).divides(size, ways):
            return True
        dims = (dim for tensor in (*self.inputs, *self.outputs) for dim in tensor)
        alone = all(dim == (part.factor,) for dim in dims if part.factor in dim)
        return plain and alone and part.factor in self.uneven and -(-size // ways) * (ways - 1) < size

    def strategy(self, part: Part, ways: int) -> Strategy | None:
        """The strategy that splits ``part`` over an axis of ``ways`` ranks; None where the rule has none."""
        if not self.allows(part, ways):
            return None
        outputs: list[Placement] = []
        for tensor in self.outputs:
            splits = self.splits(part, tensor)
            if len(splits) > 1:
                return None
            outputs.append(splits[0] if splits else self._combined(part.factor))
        summed = any(isinstance(placement, Partial) for placement in outputs)
        inputs: list[Placement] = []
        for position, tensor in enumerate(self.inputs):
            splits = self.splits(part, tensor)
            if len(splits) > 1:
                return None
            lacking = PARTIAL if summed and position in self.added else REPLICATED
            inputs.append(splits[0] if splits else lacking)
        return Strategy(str(part), tuple(inputs), tuple(outputs), part, 1.0 / ways)

    def _combined(self, factor: str) -> Placement:
        op = self.reduce.get(factor, "sum")
        return INVARIANT if op == "whole" else Partial(op)

    def unsplit(self, call: Call) -> list[Strategy]:
        """The strategies that split nothing: all invariant, all replicated, or partial where linear."""
        count = len(self.inputs)
        found = [Strategy("invariant", (INVARIANT,) * count, (INVARIANT,) * len(self.outputs))]
        if any(call.diff_inputs):
            found.append(Strategy("replicated", (REPLICATED,) * count, (REPLICATED,) * len(self.outputs)))
        for group in self.linear:
            inputs = tuple(PARTIAL if i in group else REPLICATED for i in range(count))
            found.append(Strategy("partial", inputs, (PARTIAL,) * len(self.outputs)))
        return found


def dims_of(shape: Shape, tag: str = "d") -> tuple[Dims, dict[str, int]]:
    """One factor for each dim of a tensor, ``d0, d1, ...``, none for a dim of size 1; and the sizes of all."""
    sizes = {f"{tag}{i}": size for i, size in enumerate(shape)}
    return tuple((name,) if size != 1 else () for name, size in sizes.items()), sizes


def factoring_of(line: str, call: Call) -> Factoring:
    """The factoring that a one-line rule gives for a call. ``...`` stands for leading dims, aligned at the right.

    Raises ValueError where the line does not fit the shapes.
    """
    return factoring_by(read_rule(line), call)


def factoring_by(rule: Line, call: Call) -> Factoring:
    """The factoring that a line gives, once it is read. Raises ValueError where the line does not fit the shapes."""
    line, places = rule.text, _places(rule, call)
    if len(places) < len(call.inputs):
        raise ValueError(f"rule '{line}' has {len(rule.inputs)} inputs, the call has {len(call.inputs)} tensors")
    if len(rule.outputs) != len(call.outputs):
        raise ValueError(f"rule '{line}' has {len(rule.outputs)} outputs, the call gives {len(call.outputs)}")
    sizes: dict[str, int] = {}
    inputs = [_named(rule.inputs[place], shape, line, sizes) for place, shape in zip(places, call.inputs)]
    outputs = [_named(dims, shape, line, sizes) for dims, shape in zip(rule.outputs, call.outputs)]
    for factors in (factors for dims in inputs + outputs for factors in dims if len(factors) == 1):
        sizes.setdefault(factors[0], 1)
    for dims, shape in zip(inputs + outputs, call.inputs + call.outputs):
        _infer(dims, shape, sizes, line)
    numbers = {place: number for number, place in enumerate(places)}
    linear = [frozenset(numbers[place] for place in group if place in numbers) for group in rule.linear]
    return Factoring(
        tuple(_tuples(dims, shape) for dims, shape in zip(inputs, call.inputs)),
        tuple(_tuples(dims, shape) for dims, shape in zip(outputs, call.outputs)),
        sizes,
        reduce={factor: op for op in ("max", "min") for factor in rule.factors.get(op, ())},
        whole=rule.factors.get("whole", frozenset()) | rule.only_outputs,
        linear=tuple(group for group in linear if group),
        added=frozenset(numbers[place] for place in rule.added if place in numbers),
        uneven=rule.factors.get("uneven", frozenset()),
        plain=rule.factors.get("plain", frozenset()),
        contraction=rule.contraction,
    )


def _places(rule: Line, call: Call) -> list[int]:
    """For each tensor of the call, its input in the line; optional ones (a mask, a bias) may be missing."""
    names = tensor_arguments(call.target)
    if names is None or len(names) != len(rule.inputs):
        return list(range(min(len(rule.inputs), len(call.inputs))))
    given = [*zip(argument_names(call.target), call.args), *call.kwargs.items()]
    found = [names.index(name) for name, value in given if name in names and value is not None]
    return found if len(found) == len(call.inputs) else list(range(min(len(rule.inputs), len(call.inputs))))


def tensor_arguments(target: Any) -> list[str] | None:
    """The names of the tensor arguments of an operator; None where they are unknown, or are lists of any length."""
    if not is_overload(target):
        return None
    kinds = {argument.name: str(argument.type) for argument in target._schema.arguments}
    if any("Tensor" in kind and kind not in ("Tensor", "Optional[Tensor]") for kind in kinds.values()):
        return None
    return [name for name, kind in kinds.items() if "Tensor" in kind]


def _named(dims: list[list[str]], shape: Shape, line: str, sizes: dict[str, int]) -> list[list[str]]:
    """Expand ``...`` and note the sizes of factors that stand alone in a dim."""
    if ["..."] in dims:
        at = dims.index(["..."])
        extra = len(shape) - (len(dims) - 1)
        if extra < 0:
            raise ValueError(f"rule '{line}': {dims} does not fit a tensor of {len(shape)} dims")
        dims = dims[:at] + [[f"d{extra - i}"] for i in range(extra)] + dims[at + 1 :]
    if len(dims) != len(shape):
        raise ValueError(f"rule '{line}': {dims} does not fit a tensor of shape {shape}")
    for factors, size in zip(dims, shape):
        if len(factors) == 1 and size != 1 and sizes.setdefault(factors[0], size) != size:
            raise ValueError(f"rule '{line}': factor '{factors[0]}' is {sizes[factors[0]]} and {size}")
    return dims


def _infer(dims: list[list[str]], shape: Shape, sizes: dict[str, int], line: str) -> None:
    for factors, size in zip(dims, shape):
        unknown = [f for f in factors if f not in sizes]
        known = math.prod(sizes[f] for f in factors if f in sizes)
        if len(factors) > 1 and len(unknown) == 1 and size % known == 0:
            sizes[unknown[0]] = size // known
        elif unknown or (len(factors) > 1 and known != size):
            raise ValueError(f"rule '{line}': cannot tell the sizes of {factors} in a dim of {size}")


def _tuples(dims: list[list[str]], shape: Shape) -> Dims:
    return tuple(tuple(factors) if size != 1 else () for factors, size in zip(dims, shape))
