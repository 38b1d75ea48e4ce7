"""The mesh: named axes of devices, outermost first. Abstract: it needs no process group and may have any size.

Collectives run over groups of ranks, and a group has a name wherever an axis has one:

    sp          the ranks that differ on axis sp only
    dp+sp       those that differ on dp or sp; the axes stand in mesh order, and positions are row-major
    sp:inner2   2 neighbours on sp
    sp:outer4   4 ranks of sp as far apart as possible: on sp=8 those at a distance of 2

``inner2`` and ``outer4`` together are an axis of 8: a rank at position p is at p % 2 in the one, p // 2 in the other.
They may be merged too (``dp+sp:inner2``). A name in normal form (:meth:`Mesh.merged`) has no part of one rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Never

from autopar.errors import check_kind, near_names
from autopar.notes import warn

# Outermost first: neighbours on a later axis are closer together (tp inside a node, pp across nodes).
AXIS_ORDER = ("pp", "dp", "dp_replicate", "dp_shard", "ep", "sp", "tp")
ALIASES = {"cp": "sp"}
DATA_AXES = ("dp", "dp_replicate", "dp_shard", "ep")  # ranks along these get different rows of the batch
REPLICA_AXES = (*DATA_AXES, "sp")  # along these, ranks use the same weights on other data: a gradient is a sum
SHARD_AXES = tuple(axis for axis in REPLICA_AXES if axis != "dp_replicate")  # ZeRO splits parameters over these
EXPERTS = "ep"  # ranks along this one have different experts
SEQUENCE = "sp"  # ranks along this one have parts of the sequence
PIPELINE = "pp"  # ranks along this one run different stages of the model
TENSOR = "tp"  # ranks along this one have parts of the same layers
MOST_SHOWN = 8  # ranks of a group

GROUP = re.compile(r"(\w+)(?::(inner|outer)(\d+))?")  # a part of the name of a group

Coordinates = Mapping[str, int]


@lru_cache(maxsize=1024)
def axes_of(group: str) -> tuple[str, ...]:
    """The axes in the name of a group: ``dp``, ``sp`` of ``dp+sp:inner2``."""
    return tuple(part.partition(":")[0] for part in group.split("+"))


def overlap(one: str, other: str) -> bool:
    """Whether two axes, or parts of one (``sp:inner2``, ``sp:outer4``), are the same or have a part in common."""
    (axis, _, part), (other_axis, _, other_part) = one.partition(":"), other.partition(":")
    return axis == other_axis and {part[:5], other_part[:5]} != {"inner", "outer"}


def inner(axis: str, ranks: int) -> str:
    """The name of the groups of ``ranks`` neighbours on ``axis``."""
    return f"{axis}:inner{ranks}"


def outer(axis: str, ranks: int) -> str:
    """The name of the groups of ``ranks`` ranks of ``axis`` that are as far apart as possible."""
    return f"{axis}:outer{ranks}"


@dataclass(frozen=True)
class Digit:
    """Ranks of a group differ by this part of their position on ``axis``: ``position // stride % size``."""

    axis: str
    stride: int
    size: int

    def of(self, position: int) -> int:
        return position // self.stride % self.size

    def put(self, position: int, digit: int) -> int:
        """``position`` with another digit."""
        return position + (digit - self.of(position)) * self.stride


@dataclass(frozen=True, init=False)
class Mesh:
    """Named axes with their sizes, e.g. ``Mesh(pp=2, dp=2, tp=2)`` for 8 ranks.

    Ranks are numbered row-major: the last axis (``tp``) varies fastest, so its groups are neighbours.
    ``node_size``: ranks of one node, which are neighbours too; no part of what makes meshes equal. A mesh whose ``tp``
    goes from node to node warns: its collectives wait between any two layers (Narayanan et al. 2021, section 3.2).
    Raises ValueError for an unknown axis, a size below 1, or a node size that does not divide the ranks.
    """

    axes: tuple[tuple[str, int], ...]
    node_size: int | None = field(default=None, compare=False)

    def __init__(self, *given: Never, node_size: int | None = None, **sizes: int) -> None:
        if given:
            raise ValueError(
                f"Mesh({given[0]!r}): sizes are given by the names of axes\n"
                "Way out: Mesh(dp=2, tp=2), or Mesh.parse('dp=2,tp=2')."
            )
        named = {ALIASES.get(name, name): size for name, size in sizes.items()}
        for name, size in named.items():
            if name not in AXIS_ORDER:
                raise ValueError(
                    f"mesh axis '{name}' is unknown{near_names(name, AXIS_ORDER)}\n"
                    f"Way out: one of {', '.join(AXIS_ORDER)} (cp means sp)."
                )
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"mesh axis {name}={size!r}: a size is a whole number, at least 1\nWay out: {name}=2.")
        if len(named) != len(sizes):
            raise ValueError("mesh axes 'cp' and 'sp' are the same axis\nWay out: give one of them.")
        if "dp" in named and ("dp_replicate" in named or "dp_shard" in named):
            raise ValueError(
                "give either dp, or dp_replicate and dp_shard, not both\nWay out: dp_replicate=2, dp_shard=2."
            )
        object.__setattr__(self, "axes", tuple((name, named[name]) for name in AXIS_ORDER if name in named))
        object.__setattr__(self, "node_size", node_size)
        if node_size is not None:
            _check_nodes(self, node_size)

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """``Mesh.parse("dp=2,tp=4")``, also with ``node_size=8``; separators are commas or spaces.

        Raises ValueError on anything else.
        """
        check_kind("the mesh", text, str, "Mesh.parse('dp=2,tp=4'), or Mesh(dp=2, tp=4)")
        sizes: dict[str, int] = {}
        for part in text.replace(",", " ").split():
            name, equals, size = part.partition("=")
            if not equals or not size.isdigit():
                raise ValueError(f"mesh '{text}': '{part}' is not of the form axis=size\nWay out: dp=2,tp=4")
            if name in sizes:
                raise ValueError(f"mesh '{text}': axis '{name}' is given twice\nWay out: {name}=4 once.")
            sizes[name] = int(size)
        return cls(**sizes)

    @classmethod
    def from_device_mesh(cls, device_mesh: Any) -> Mesh:
        """The axes of a ``torch.distributed.device_mesh.DeviceMesh``, whose dims must be named and in our order."""
        names = device_mesh.mesh_dim_names
        if not names:
            raise ValueError("the DeviceMesh has no mesh_dim_names; name its dims, e.g. ('dp', 'tp')")
        mesh = cls(**dict(zip(names, device_mesh.shape)))
        order = [ALIASES.get(name, name) for name in names]
        if [name for name, _ in mesh.axes] != order:
            raise ValueError(f"DeviceMesh dims {tuple(names)} are not in the order {mesh.names}, outermost first")
        return mesh

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def world_size(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def is_pipelined(self) -> bool:
        """Whether there is an axis ``pp``, of whatever size."""
        return PIPELINE in self.names

    @property
    def of_stage(self) -> Mesh:
        """The ranks of one pipeline stage: this mesh without ``pp``."""
        return Mesh(**{axis: size for axis, size in self.axes if axis != PIPELINE})

    def shard_axis(self, taken: Container[str] = ()) -> str | None:
        """The axes over which ZeRO splits a parameter, merged to one; None where these have one rank.

        They are all along which ranks have the same parameter, but ``dp_replicate``: without those that split it
        already, ``taken`` (experts over ``ep``).
        """
        axes = [axis for axis in SHARD_AXES if axis not in taken and self.size(axis) > 1]
        return self.merged(axes) if axes else None

    def size(self, axis: str) -> int:
        """Ranks in a group of ``axis``, which may be several (see above); 1 for an axis that is not on this mesh."""
        return _size(self, axis)

    def digits(self, group: str) -> tuple[Digit, ...]:
        """What distinguishes the ranks of ``group``, outermost first. Raises ValueError for a name that is none."""
        return _digits(self, group)

    def merged(self, groups: Iterable[str]) -> str:
        """The name, in normal form, of the groups over all of ``groups`` (names of axes or groups, in any order).

        Where each of them has one rank, the first. Raises ValueError for an axis that is given twice.
        """
        parts = [part for group in groups for part in group.split("+")]
        ordered = sorted(parts, key=lambda part: _place(axes_of(part)[0], part))
        digits = _digits(self, "+".join(ordered))
        names = [
            digit.axis if digit.size == self.size(digit.axis) else part
            for part, digit in zip(ordered, digits)
            if digit.size > 1
        ]
        return "+".join(names) or parts[0]

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis name -> position of ``rank`` on it. Raises ValueError outside 0..world_size-1."""
        check_kind("the rank", rank, int, f"a number from 0 to {self.world_size - 1}")
        if not 0 <= rank < self.world_size:
            raise ValueError(
                f"rank {rank} is not on {self}, which has ranks 0 to {self.world_size - 1}\nWay out: one of these."
            )
        found: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name in self.names}

    def position(self, axis: str, coordinates: Coordinates) -> int:
        """The position of the rank at ``coordinates`` in its group of ``axis``; 0 on axes that are not given."""
        found = 0
        for digit in _digits(self, axis):
            found = found * digit.size + digit.of(coordinates.get(digit.axis, 0))
        return found

    def rank(self, coordinates: Coordinates) -> int:
        """The inverse of :meth:`coordinates`; axes that are not given count as 0. Raises ValueError off the mesh."""
        for name, position in coordinates.items():
            if not 0 <= position < self.size(name):
                raise ValueError(f"position {position} on axis '{name}' is not on {self}")
        rank = 0
        for name, size in self.axes:
            rank = rank * size + coordinates.get(name, 0)
        return rank

    def place(self, axis: str, position: int) -> dict[str, int]:
        """The inverse of :meth:`position`: the coordinates on the axes of a group of the rank at ``position`` in it."""
        here = self.coordinates(self.group(0, axis)[position])
        return {name: here.get(name, 0) for name in axes_of(axis)}

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` only on ``axis``, in the order of their positions."""
        found = [self.coordinates(rank)]
        for digit in _digits(self, axis):
            found = [
                {**here, digit.axis: digit.put(here.get(digit.axis, 0), i)} for here in found for i in range(digit.size)
            ]
        return tuple(map(self.rank, found))

    def groups(self, axis: str) -> Iterator[tuple[int, ...]]:
        """All groups of ``axis``: together they hold every rank once."""
        for rank in range(self.world_size):
            if self.position(axis, self.coordinates(rank)) == 0:
                yield self.group(rank, axis)

    def nodes(self, axis: str) -> int:
        """The most nodes that a group of ``axis`` lies in; 1 where the size of a node is not known."""
        if self.node_size is None:
            return 1
        return max(len({rank // self.node_size for rank in group}) for group in self.groups(axis))

    def describe(self) -> str:
        """The groups of each axis: how many there are, the first one, and in how many nodes one lies at most."""
        known = self.node_size is not None
        rows = [("axis", "size", "groups", "the first", "nodes of one" if known else "")]
        for axis, size in self.axes:
            first = " ".join(map(str, self.group(0, axis)[:MOST_SHOWN])) + " ..." * (size > MOST_SHOWN)
            rows.append((axis, str(size), str(self.world_size // size), first, str(self.nodes(axis)) if known else ""))
        where = f" on {-(-self.world_size // self.node_size)} nodes of {self.node_size}" if self.node_size else ""
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([f"{self}: {self.world_size} ranks{where}", *lines])

    def __str__(self) -> str:
        return f"mesh({' '.join(f'{name}={size}' for name, size in self.axes)})"

    __repr__ = __str__


def _check_nodes(mesh: Mesh, node_size: int) -> None:
    """Raise ValueError for nodes that the ranks do not fill; warn where ``tp`` goes from node to node."""
    if not isinstance(node_size, int) or isinstance(node_size, bool) or node_size < 1:
        raise ValueError(f"node_size={node_size!r}: the ranks of one node, at least 1\nWay out: node_size=8.")
    if mesh.world_size > node_size and mesh.world_size % node_size:
        raise ValueError(
            f"{mesh} has {mesh.world_size} ranks, which nodes of {node_size} do not divide\n"
            f"Way out: a mesh of {mesh.world_size // node_size * node_size} ranks, or another node_size."
        )
    if mesh.nodes(TENSOR) > 1:
        size = mesh.size(TENSOR)
        warn(
            f"{TENSOR}={size} goes from node to node ({mesh.nodes(TENSOR)} nodes of {node_size}); it communicates in "
            f"every layer, and should stay inside one\n{mesh.describe()}\n"
            f"Way out: {TENSOR}={math.gcd(size, node_size)}, and the rest of the ranks on pp or dp.",
            stacklevel=3,
        )


def _place(axis: str, group: str) -> int:
    if axis not in AXIS_ORDER:
        raise ValueError(
            f"'{group}' is over an axis '{axis}' that there is not\nWay out: one of {', '.join(AXIS_ORDER)}"
        )
    return AXIS_ORDER.index(axis)


@lru_cache(maxsize=4096)
def _size(mesh: Mesh, group: str) -> int:
    return math.prod(digit.size for digit in _digits(mesh, group))


@lru_cache(maxsize=4096)
def _digits(mesh: Mesh, group: str) -> tuple[Digit, ...]:
    """What distinguishes the ranks of a group, outermost first. Raises ValueError for a name that is none."""
    sizes = dict(mesh.axes)
    if group in sizes:
        return (Digit(group, 1, sizes[group]),)
    places, found = list[int](), list[Digit]()
    for part in group.split("+"):
        match = GROUP.fullmatch(part)
        if match is None:
            raise ValueError(f"'{part}' in '{group}' is neither an axis nor a part of one, like sp:inner2 or sp:outer4")
        axis, kind, ranks = match[1], match[2], int(match[3] or 0)
        size = sizes.get(axis, 1)
        places.append(_place(axis, group))
        if kind and (ranks < 1 or size % ranks):
            raise ValueError(f"'{part}' on {mesh}: groups of {ranks} do not divide {axis}={size}")
        found.append(Digit(axis, size // ranks if kind == "outer" else 1, ranks if kind else size))
    if places != sorted(set(places)):
        order = "+".join(sorted(set(axes_of(group)), key=AXIS_ORDER.index))
        raise ValueError(f"'{group}': the axes of a group stand in mesh order, each once: {order}")
    return tuple(found)
