"""How many rows the experts of a layer got: what ranks have counted, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.ir import collectives as comm
from autopar.ir.node import Node
from autopar.mesh import Mesh


@dataclass(frozen=True)
class ExpertLoad:
    """Of one layer, since the counting began.

    Attributes:
        experts: for each expert, the rows that tokens sent to it, over the whole batch; those that it dropped too.
        ranks: the rows of the experts of each rank of the group, for every group of ranks: groups one after the other.
        ways: the ranks of a group.
        lost: rows that no expert took: they are of none, or with a ``capacity_factor``, that were dropped.
    """

    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    ways: int
    lost: int = 0

    def __add__(self, other: ExpertLoad) -> ExpertLoad:
        """Of two steps together."""
        experts = tuple(map(sum, zip(self.experts, other.experts, strict=True)))
        ranks = tuple(map(sum, zip(self.ranks, other.ranks, strict=True)))
        return ExpertLoad(experts, ranks, self.ways, self.lost + other.lost)

    def to_json(self) -> dict[str, Any]:
        return {"experts": list(self.experts), "ranks": list(self.ranks), "ways": self.ways, "lost": self.lost}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ExpertLoad:
        """The inverse of :meth:`to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        experts, ranks = (tuple(map(int, found[name])) for name in ("experts", "ranks"))
        return cls(experts, ranks, int(found["ways"]), int(found["lost"]))

    @property
    def imbalance(self) -> float:
        """Rows of the fullest rank over those of the mean rank; 1 where the load is balanced, or nothing was sent."""
        total = sum(self.ranks)
        return max(self.ranks) * len(self.ranks) / total if total else 1.0


@dataclass(frozen=True)
class Tally:
    """What a ``comm.tally`` says of its layer: ``axis``: all ranks that have tokens of their own; ``group``: those over
    which the experts are dealt out; ``places``: the slot of each expert."""

    axis: str
    group: str
    places: tuple[int, ...]

    @classmethod
    def of(cls, arguments: Sequence[object]) -> Tally:
        """From the arguments of the collective behind the counts and the name of the layer."""
        axis, group, places = arguments
        assert isinstance(axis, str) and isinstance(group, str) and isinstance(places, (list, tuple))
        return cls(axis, group, tuple(places))

    def load(self, mesh: Mesh, counts: Tensor) -> ExpertLoad:
        """``counts`` (ranks of ``axis``, ways, own + 1): of each rank the rows that it has sent to each slot.

        The last of ``own + 1`` counts rows of no expert, or those that were dropped.
        """
        own = counts.shape[2] - 1
        slots = counts[..., :own].flatten(1).sum(0)
        groups: dict[tuple[tuple[str, int], ...], Tensor] = {}
        inside = set(self.group.split("+"))
        for position, rows in enumerate(counts):
            here = mesh.place(self.axis, position)
            key = tuple((axis, place) for axis, place in here.items() if axis not in inside)
            received = rows[:, :own].sum(1)
            groups[key] = groups[key] + received if key in groups else received
        experts = slots[torch.tensor(self.places, dtype=torch.int64)]
        ranks = torch.cat([groups[key] for key in sorted(groups)])
        return ExpertLoad(tuple(experts.tolist()), tuple(ranks.tolist()), counts.shape[1], int(counts[..., own].sum()))


def add(counts: Mapping[str, Tensor], layer: str, more: Tensor) -> Tensor:
    """``counts[layer]`` with ``more``."""
    return counts[layer] + more if layer in counts else more.clone()


def tallies(nodes: Sequence[Node]) -> dict[str, Tally]:
    """Layer -> what its tally says, for the tallies among ``nodes``."""
    found = {}
    for node in nodes:
        if node.target is comm.OPS.tally.default:
            given = comm.arguments_of(node)
            found[str(given["layer"])] = Tally.of((given["axis"], given["group"], given["places"]))
    return found
