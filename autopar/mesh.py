"""The mesh: named axes of devices, outermost first. Abstract: it needs no process group and may have any size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Outermost first: neighbours on a later axis are closer together (tp inside a node, pp across nodes).
AXIS_ORDER = ("pp", "dp", "dp_replicate", "dp_shard", "ep", "sp", "tp")
ALIASES = {"cp": "sp"}
DATA_AXES = ("dp", "dp_replicate", "dp_shard")
BATCH_AXES = (*DATA_AXES, "ep")  # ranks along these get different rows of the batch
PIPELINE = "pp"  # ranks along this one run different stages of the model

Coordinates = Mapping[str, int]


@dataclass(frozen=True, init=False)
class Mesh:
    """Named axes with their sizes, e.g. ``Mesh(pp=2, dp=2, tp=2)`` for 8 ranks.

    Ranks are numbered row-major: the last axis (``tp``) varies fastest, so its groups are neighbours.
    Raises ValueError for an unknown axis or a size below 1.
    """

    axes: tuple[tuple[str, int], ...]

    def __init__(self, **sizes: int) -> None:
        named = {ALIASES.get(name, name): size for name, size in sizes.items()}
        for name, size in named.items():
            if name not in AXIS_ORDER:
                raise ValueError(f"mesh axis '{name}' is unknown; the axes are {', '.join(AXIS_ORDER)} (cp means sp)")
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"mesh axis {name}={size!r}: a size is a whole number of at least 1")
        if len(named) != len(sizes):
            raise ValueError("mesh axes 'cp' and 'sp' are the same axis: give one of them")
        if "dp" in named and ("dp_replicate" in named or "dp_shard" in named):
            raise ValueError("give either dp, or dp_replicate and dp_shard, not both")
        object.__setattr__(self, "axes", tuple((name, named[name]) for name in AXIS_ORDER if name in named))

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """``Mesh.parse("dp=2,tp=4")``; separators are commas or spaces. Raises ValueError on anything else."""
        sizes: dict[str, int] = {}
        for part in text.replace(",", " ").split():
            name, equals, size = part.partition("=")
            if not equals or not size.isdigit():
                raise ValueError(f"mesh '{text}': '{part}' is not of the form axis=size, e.g. dp=2,tp=4")
            if name in sizes:
                raise ValueError(f"mesh '{text}': axis '{name}' is given twice")
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

    def size(self, axis: str) -> int:
        """Size of ``axis``; 1 for an axis that this mesh does not have."""
        return dict(self.axes).get(axis, 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis name -> position of ``rank`` on it. Raises ValueError outside 0..world_size-1."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not on {self}, which has ranks 0 to {self.world_size - 1}")
        found: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, found[name] = divmod(rank, size)
        return {name: found[name] for name in self.names}

    def rank(self, coordinates: Coordinates) -> int:
        """The inverse of :meth:`coordinates`; axes that are not given count as 0. Raises ValueError off the mesh."""
        for name, position in coordinates.items():
            if not 0 <= position < self.size(name):
                raise ValueError(f"position {position} on axis '{name}' is not on {self}")
        rank = 0
        for name, size in self.axes:
            rank = rank * size + coordinates.get(name, 0)
        return rank

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` only on ``axis``, in axis order."""
        here = self.coordinates(rank)
        return tuple(self.rank({**here, axis: i}) for i in range(self.size(axis)))

    def groups(self, axis: str) -> Iterator[tuple[int, ...]]:
        """All groups of ``axis``: together they hold every rank once."""
        others = [[(name, i) for i in range(size)] for name, size in self.axes if name != axis]
        for fixed in itertools.product(*others):
            yield tuple(self.rank({**dict(fixed), axis: i}) for i in range(self.size(axis)))

    def __str__(self) -> str:
        return f"mesh({' '.join(f'{name}={size}' for name, size in self.axes)})"

    __repr__ = __str__
