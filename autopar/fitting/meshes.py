"""The meshes for a number of devices, and the reasons for which some cannot be, or are not tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autopar.memory.device import Device
from autopar.memory.optimizers import optimizer_named
from autopar.mesh import DATA_AXES, EXPERTS, PIPELINE, SEQUENCE, TENSOR, Mesh
from autopar.plan import Plan

AXES = (PIPELINE, "dp", EXPERTS, SEQUENCE, TENSOR)  # outermost first
LEAST_TOKENS = 4096  # of a rank: below it, sp sends more than it is worth (a heuristic)


@dataclass(frozen=True)
class Wanted:
    """What has to fit.

    Attributes:
        devices: how many there are; ``node_size`` of them have fast links.
        rows: of the batch of a step, on all ranks together.
        fixed: choices of the plan that are not to be varied.
        length: tokens of a row, where the model has such.
        axes: those to try; None: those that make sense for the model, see :func:`tried_axes`.
    """

    devices: int
    node_size: int
    rows: int
    optimizer: str
    device: Device
    plan: Plan
    fixed: frozenset[str] = frozenset()
    length: int | None = None
    axes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Model:
    """What limits meshes: ``blocks`` alike, 1 where there is no list of such; ``experts`` of a layer, 0 without."""

    blocks: int
    experts: int


@dataclass(frozen=True)
class Refused:
    """A mesh on which nothing fits, and why."""

    mesh: Mesh
    why: str


def read_axes(text: str) -> tuple[str, ...]:
    """``pp,dp,tp`` in the order of meshes. Raises ValueError for another axis, and for none."""
    given = set(text.replace(",", " ").split())
    if not given or given - set(AXES):
        raise ValueError(f"--axes {text}: fit knows the axes {', '.join(AXES)}\nWay out: --axes pp,dp,tp")
    return tuple(axis for axis in AXES if axis in given)


def tried_axes(model: Model, wanted: Wanted) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the axes that are tried, one line for each that is not: why, and how it would be)."""
    if wanted.axes is not None:
        return wanted.axes, ()
    axes, left = ["pp", "dp", "tp"], []
    if model.experts:
        axes.append(EXPERTS)
    if wanted.length is not None and wanted.length >= 2 * LEAST_TOKENS:
        axes.append(SEQUENCE)
    elif wanted.length is not None and wanted.length > 1:
        left.append(
            f"sp is not tried: it would leave a rank fewer than {LEAST_TOKENS:,} of {wanted.length:,} tokens of a row "
            f"(--axes {','.join([*axes, SEQUENCE])} tries it)"
        )
    return tuple(axis for axis in AXES if axis in axes), tuple(left)


def meshes(wanted: Wanted, axes: Sequence[str]) -> Iterator[Mesh]:
    """All of ``axes``; an axis of one rank is left out."""
    for sizes in _factors(wanted.devices, len(axes)):
        yield Mesh(**{axis: size for axis, size in zip(axes, sizes) if size > 1} or {"dp": 1})


def impossible(mesh: Mesh, model: Model, wanted: Wanted) -> str | None:
    """Why no plan can be tried, before anything is priced."""
    return next(_reasons(mesh, model, wanted), None)


def _reasons(mesh: Mesh, model: Model, wanted: Wanted) -> Iterator[str]:
    stages, data = mesh.size(PIPELINE), math.prod(mesh.size(axis) for axis in DATA_AXES)
    ways, parts, experts = mesh.size(TENSOR), mesh.size(SEQUENCE), mesh.size(EXPERTS)
    if ways > wanted.node_size:
        yield f"tp={ways} goes beyond a node of {wanted.node_size}: its collectives wait between any two layers"
    if experts > 1 and not model.experts:
        yield f"experts: the model has none for ep={experts}"
    if optimizer_named(wanted.optimizer).whole_only and ways * experts > 1:
        yield f"optimizer: torch's {wanted.optimizer} cannot update split parameters; dp and pp leave them whole"
    if model.experts % experts:
        yield f"experts: {model.experts} do not divide by ep={experts}"
    if wanted.rows % data:
        over = " x ".join(f"{axis}={mesh.size(axis)}" for axis in DATA_AXES if mesh.size(axis) > 1)
        yield f"batch: {wanted.rows} rows do not divide by {over}"
    if wanted.length is not None and wanted.length % parts:
        yield f"length: {wanted.length:,} tokens do not divide by sp={parts}"
    if wanted.axes is None and parts > 1 and wanted.length is not None and wanted.length // parts < LEAST_TOKENS:
        yield f"length: sp={parts} leaves a rank {wanted.length // parts:,} tokens, fewer than {LEAST_TOKENS:,}"
    if 1 < model.blocks < stages:  # 1: the model has no list of blocks alike, so that the compiler has to say it
        yield f"layers: {model.blocks} for pp={stages} stages"
    if wanted.rows // data < stages:
        yield f"batch: {wanted.rows // data} rows a rank make fewer microbatches than pp={stages}"


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``number`` as a product of ``count`` factors, in order."""
    sizes = [size for size in range(1, number + 1) if number % size == 0]
    for chosen in itertools.product(sizes, repeat=count - 1):
        done = math.prod(chosen)
        if number % done == 0:
            yield (*chosen, number // done)
