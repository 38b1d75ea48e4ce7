"""The layout of one tensor on the mesh: a ``Placement`` describes it on one axis, a ``Layout`` on all of them.

The kinds of placement on one axis are those of ``spmd_types`` and of JAX's ``shard_map`` types:

    INVARIANT   I   whole on every rank, used alike by all; its gradient is whole too
    REPLICATED  R   whole on every rank, used differently; each rank's gradient is only a part
    Split(d)    S   each rank holds a part of dim d
    Partial(op) P   each rank holds a summand (or a candidate maximum) of the value
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from autopar.mesh import Coordinates, Mesh, axes_of


@dataclass(frozen=True)
class Placement:
    """Base of the four kinds; INVARIANT and REPLICATED are its two plain instances."""


@dataclass(frozen=True)
class Whole(Placement):
    invariant: bool

    def __str__(self) -> str:
        return "I" if self.invariant else "R"


@dataclass(frozen=True)
class Split(Placement):
    """Dim ``dim`` is cut into ``outer`` equal blocks, each block into segments with sizes in proportion ``ratio``.

    Each segment is divided evenly over the axis. A plain split is ``Split(dim)``. A fused QKV weight of three equal
    parts is ``Split(0, outer=3)``; one with 4 query heads and 2 K and V heads is ``Split(0, ratio=(4, 2, 2))``.

    ``mirrored``: every second block is dealt out from the last rank to the first. ``Split(1, outer=2, mirrored=True)``
    over n ranks gives rank r the chunks r and 2n-1-r of 2n: the zig-zag order of a sequence under a causal mask.
    """

    dim: int
    outer: int = 1
    ratio: tuple[int, ...] = (1,)
    mirrored: bool = False

    def __post_init__(self) -> None:
        if self.mirrored and (self.outer % 2 or self.ratio != (1,)):
            raise ValueError(f"a mirrored split has an even number of blocks and no ratio, not {self}")
        if len(set(self.ratio)) == 1:  # (2, 2, 2) is three blocks of (1,)
            object.__setattr__(self, "outer", self.outer * len(self.ratio))
            object.__setattr__(self, "ratio", (1,))
        else:
            common = math.gcd(*self.ratio)
            object.__setattr__(self, "ratio", tuple(part // common for part in self.ratio))

    @classmethod
    def of(cls, dim: int, outer: int, ratio: Sequence[int] = (1,)) -> Split:
        """The split that the arguments of a collective say: ``outer`` is negative for a mirrored one."""
        return cls(dim, abs(outer), tuple(ratio), outer < 0)

    @property
    def signed_outer(self) -> int:
        """``outer``, negative for a mirrored split."""
        return -self.outer if self.mirrored else self.outer

    @property
    def contiguous(self) -> bool:
        return self.outer == 1 and self.ratio == (1,)

    def divides(self, size: int, ways: int) -> bool:
        """Whether a dim of ``size`` elements has this structure and every segment divides by ``ways``."""
        block, rest = divmod(size, self.outer)
        unit, odd = divmod(block, sum(self.ratio))
        return rest == 0 and odd == 0 and all(part * unit % ways == 0 for part in self.ratio)

    def __str__(self) -> str:
        extra = f",outer={self.outer}" if self.outer > 1 else ""
        extra += ",mirrored" if self.mirrored else ""
        extra += f",ratio={'+'.join(map(str, self.ratio))}" if self.ratio != (1,) else ""
        return f"S({self.dim}{extra})"


@dataclass(frozen=True)
class Partial(Placement):
    op: str = "sum"

    def __str__(self) -> str:
        return "P" if self.op == "sum" else f"P({self.op})"


INVARIANT = Whole(True)
REPLICATED = Whole(False)
PARTIAL = Partial("sum")


def owned_indices(size: int, split: Split, position: int, ways: int) -> Tensor:
    """Global indices along a dim of ``size`` that ``position`` of ``ways`` owns, in local order (int64, 1-D).

    A contiguous split need not divide: parts have ceil(size / ways) elements and the last ones are shorter. Any other
    split must divide. Raises ValueError.
    """
    if split.contiguous:
        part = -(-size // ways)
        return torch.arange(min(position * part, size), min((position + 1) * part, size))
    if not split.divides(size, ways):
        raise ValueError(f"{split} over {ways} ranks does not divide a dim of {size} elements")
    unit = size // split.outer // sum(split.ratio)
    pieces, start = [], 0
    for block in range(split.outer):
        turn = ways - 1 - position if split.mirrored and block % 2 else position
        for share in split.ratio:
            part = share * unit // ways
            pieces.append(torch.arange(start + turn * part, start + (turn + 1) * part))
            start += share * unit
    return torch.cat(pieces)


@dataclass(frozen=True)
class Factor:
    """One factor of a dim: ``size`` is its global size, ``axes`` own it in the order in which they split it.

    An axis may be several merged to one (``dp+sp``): these cut the factor once, into as many parts as they have ranks.
    ``mirrored``: the one of ``axes``, if any, whose ranks are counted from the last behind each odd index of the
    factors in front of this one. ``ragged``: each rank knows the size of its own part at run time only (rows sent to
    experts); ``size`` is then what it is on the mean, and no argument of an operator may say it. ``order``: what is cut
    is not 0, 1, 2, ... but these indices, in this order (experts that are placed by their load).
    """

    size: int
    axes: tuple[str, ...] = ()
    ratio: tuple[int, ...] = (1,)
    mirrored: str = ""
    ragged: bool = False
    order: tuple[int, ...] = ()

    def local(self, mesh: Mesh) -> int:
        size = self.size
        for axis in self.axes:
            size = -(-size // mesh.size(axis))
        return size

    def __str__(self) -> str:
        if self.ratio == (1,):
            owned = "".join(f"@{axis}" + "~" * (axis == self.mirrored) for axis in self.axes)
            order = f"<{' '.join(map(str, self.order))}>" if self.order else ""
            return str(self.size) + "?" * self.ragged + order + owned
        unit = self.size // sum(self.ratio)
        parts = (str(part * unit) for part in self.ratio)
        return "+".join(f"({part})" if " " in part else part for part in parts) + "".join(
            f"@{axis}" for axis in self.axes
        )


@dataclass(frozen=True)
class Layout:
    """For each dim its factors, outermost first, and the axes over which the value is a pending reduction.

    These are single ones: a sum over ``dp+sp`` is one over ``dp`` and one over ``sp``.
    """

    dims: tuple[tuple[Factor, ...], ...]
    partial: tuple[tuple[str, str], ...] = ()

    def __hash__(self) -> int:
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = self.__dict__["_hash"] = hash((self.dims, self.partial))
        return known

    def __getstate__(self) -> dict[str, Any]:  # what is worked out once is so in one process
        return {"dims": self.dims, "partial": self.partial}

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Layout:
        return cls(tuple((Factor(int(size)),) for size in shape))

    @cached_property  # a layout is shared by the copies of its node, and asked for its shape after each pass
    def shape(self) -> tuple[int, ...]:
        """The global shape."""
        return tuple([_product(dim) for dim in self.dims])

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        known = self.__dict__.get("_local")
        if known is None or known[0] is not mesh:
            known = mesh, tuple([_local_product(dim, mesh) for dim in self.dims])
            self.__dict__["_local"] = known
        found: tuple[int, ...] = known[1]
        return found

    @cached_property
    def ragged(self) -> bool:
        """Whether the ranks have parts of sizes that they know at run time only."""
        return any(factor.ragged for dim in self.dims for factor in dim)

    @property
    def axes(self) -> frozenset[str]:
        """Axes of the mesh that split this value (not those over which it is partial)."""
        return frozenset(axis for group in self.groups for axis in axes_of(group))

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """As :attr:`axes`, with merged ones as they split it: ``dp+sp``."""
        return tuple([axis for dim in self.dims for factor in dim for axis in factor.axes])

    def part(self, coordinates: Coordinates, mesh: Mesh) -> tuple[int, ...]:
        """What determines the part of the rank at ``coordinates``: ranks with equal ones hold the same."""
        groups = (*self.groups, *(axis for axis, _ in self.partial))
        return tuple([mesh.position(group, coordinates) for group in groups])

    def place(self, axis: str, placement: Placement, mesh: Mesh) -> Layout:
        """This layout, so far whole on ``axis``, with ``placement`` on it; the dim of a Split is a local one."""
        if isinstance(placement, Partial):
            return replace(self, partial=(*self.partial, *((part, placement.op) for part in axis.split("+"))))
        if isinstance(placement, Split):
            dims = list(self.dims)
            dims[placement.dim] = _cut(self.dims[placement.dim], placement, axis, mesh)
            return replace(self, dims=tuple(dims))
        return self

    def placement(self, axis: str, mesh: Mesh) -> Placement:
        """The inverse of :meth:`place`, for the axis that was placed last; INVARIANT where the value is whole."""
        for name, op in self.partial:
            if name in axis.split("+"):
                return Partial(op)
        for dim, factors in enumerate(self.dims):
            outer = 1
            for factor in factors:
                if axis in factor.axes:
                    return Split(dim, outer, factor.ratio, factor.mirrored == axis)
                outer *= factor.local(mesh)
        return INVARIANT

    def indices(self, dim: int, coordinates: Coordinates, mesh: Mesh) -> Tensor | None:
        """Global indices along ``dim`` that the rank at ``coordinates`` owns, in local order; None for all."""
        factors = self.dims[dim]
        if not any(factor.axes for factor in factors):
            return None
        owned = torch.zeros(1, dtype=torch.int64)
        for factor in factors:
            own = _owned(factor, coordinates, mesh)[None, :]
            if factor.mirrored:
                last = {axis: mesh.size(axis) - 1 - coordinates.get(axis, 0) for axis in axes_of(factor.mirrored)}
                turned = _owned(factor, {**coordinates, **last}, mesh)[None, :]
                own = torch.where(owned[:, None] % 2 == 1, turned, own)
            owned = (owned[:, None] * factor.size + own).flatten()
        return owned

    def __str__(self) -> str:
        dims = (str(dim[0]) if len(dim) == 1 else f"({' '.join(map(str, dim))})" for dim in self.dims)
        partial = ",".join(f"{op}:{axis}" for axis, op in self.partial)
        return f"[{','.join(dims)}]" + (f"{{{partial}}}" if partial else "")


def _product(factors: tuple[Factor, ...]) -> int:
    size = 1  # a loop, here and below: passes ask for the shapes of all values, of one factor a dim mostly
    for factor in factors:
        size *= factor.size
    return size


def _local_product(factors: tuple[Factor, ...], mesh: Mesh) -> int:
    size = 1
    for factor in factors:
        size *= factor.local(mesh) if factor.axes else factor.size
    return size


def _owned(factor: Factor, coordinates: Coordinates, mesh: Mesh) -> Tensor:
    """Indices within ``factor`` that the rank at ``coordinates`` owns."""
    own = torch.tensor(factor.order) if factor.order else torch.arange(factor.size)
    for axis in factor.axes:
        ways = mesh.size(axis)
        if factor.ratio == (1,):  # parts of an uneven split are padded before the next axis splits them
            own = torch.nn.functional.pad(own, (0, -len(own) % ways), value=-1)
        own = own[owned_indices(len(own), Split(0, ratio=factor.ratio), mesh.position(axis, coordinates), ways)]
    return own[own >= 0]


def _cut(factors: tuple[Factor, ...], split: Split, axis: str, mesh: Mesh) -> tuple[Factor, ...]:
    """Let ``axis`` own the part of a dim after ``split.outer`` local elements of outer factors."""
    size = math.prod(factor.local(mesh) for factor in factors)
    if not split.contiguous and not split.divides(size, mesh.size(axis)):
        raise ValueError(f"{split} over '{axis}' ({mesh.size(axis)} ways) does not divide {size} local elements")
    passed = 1
    done: list[Factor] = []
    for position, factor in enumerate(factors):
        if passed == split.outer:  # own the rest: the first factor that can carry the axis
            rest = factors[position:]
            if split.mirrored and done[-1].local(mesh) % 2 and any(front.axes for front in done):
                raise ValueError(
                    f"{split} over '{axis}': which blocks are odd, no layout of {Layout((factors,))} can say"
                )
            return (*done, *_own(rest, split, axis, mesh))
        local = factor.local(mesh)
        if split.outer % (passed * local) == 0:
            done.append(factor)
            passed *= local
            continue
        front = split.outer // passed  # the cut is inside this factor
        ways = math.prod(mesh.size(name) for name in factor.axes)
        plain = not factor.axes or (factor.ratio == (1,) and not factor.mirrored)
        if local % front or local * ways != factor.size or not plain or (split.mirrored and front % 2):
            raise ValueError(f"{split} over '{axis}' cuts {Layout((factors,))} where no layout can say so")
        done.append(Factor(front * ways, factor.axes))
        rest = (Factor(local // front), *factors[position + 1 :])
        return (*done, *_own(rest, split, axis, mesh))
    assert passed == split.outer, (factors, split)
    return (*done, Factor(1, (axis,)))


def _own(rest: tuple[Factor, ...], split: Split, axis: str, mesh: Mesh) -> tuple[Factor, ...]:
    """Let ``axis`` own ``rest``, in the ratio of ``split``: its first factor, or several whole ones merged."""
    ways, inner = mesh.size(axis), Split(0, ratio=split.ratio)
    first, *others = rest
    if others and first.axes and first.local(mesh) == 1:  # nothing of it is left to split
        return (first, *_own(tuple(others), split, axis, mesh))
    while others and not inner.divides(first.local(mesh), ways) and not first.axes and not others[0].axes:
        first = Factor(first.size * others.pop(0).size)
    fits = inner.divides(first.local(mesh), ways) or (not others and split.ratio == (1,))
    if not fits or (first.axes and first.ratio != split.ratio) or (split.mirrored and first.mirrored):
        raise ValueError(f"{split} over '{axis}' ({ways} ways) of {Layout((rest,))} is a split that no layout can say")
    mirrored = axis if split.mirrored else first.mirrored
    return (replace(first, axes=(*first.axes, axis), ratio=split.ratio, mirrored=mirrored), *others)


def runs(indices: Tensor) -> list[tuple[int, int]]:
    """(first, length) of each run of neighbouring indices, in their order: ``0 1 2 6 7 -> (0, 3), (6, 2)``."""
    if not len(indices):
        return []
    breaks = [0, *((indices.diff() != 1).nonzero().flatten() + 1).tolist(), len(indices)]
    lengths = (end - start for start, end in itertools.pairwise(breaks))
    return list(zip(indices[breaks[:-1]].tolist(), lengths))


def shard(tensor: Tensor, layout: Layout, mesh: Mesh, coordinates: Coordinates) -> Tensor:
    """The part of the whole ``tensor`` that the rank at ``coordinates`` holds (shorter where a split is uneven)."""
    for dim in range(tensor.dim()):
        owned = layout.indices(dim, coordinates, mesh)
        if owned is None:
            continue
        found = runs(owned) or [(0, 0)]
        if len(found) == 1:
            tensor = tensor.narrow(dim, *found[0])
        else:
            tensor = tensor.index_select(dim, owned.to(tensor.device))
    return tensor


def unshard(parts: Sequence[Tensor], layout: Layout, mesh: Mesh) -> Tensor:
    """Join the parts of all ranks (in rank order) to the whole tensor: splits are joined, pending sums added.

    Where several ranks hold the same part, the first one's is taken. Padding of uneven splits is dropped.
    """
    assert all(op == "sum" for _, op in layout.partial), layout
    out = parts[0].new_zeros(layout.shape)
    counted = set[tuple[int, ...]]()
    for rank, part in enumerate(parts):
        here = mesh.coordinates(rank)
        if (which := layout.part(here, mesh)) in counted:
            continue
        counted.add(which)
        where = []
        for dim, size in enumerate(layout.shape):
            owned = layout.indices(dim, here, mesh)
            owned = torch.arange(size) if owned is None else owned
            part = part.narrow(dim, 0, len(owned))
            where.append(owned.to(part.device))
        if where:
            out[torch.meshgrid(*where, indexing="ij")] += part
        else:
            out += part
    return out
