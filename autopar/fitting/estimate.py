"""Closed forms over the prices of a block: memory, bytes sent and seconds of a step on a mesh with a plan."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from autopar.cost.machine import ACCELERATOR
from autopar.fitting.prices import Price
from autopar.memory.optimizers import optimizer_named
from autopar.mesh import EXPERTS, PIPELINE, TENSOR, Mesh
from autopar.plan import Plan

BETWEEN_NODES = 50e9  # bytes per second of a rank to another node; within one, that of the machine
SHAPE = (4096, 4096)  # of a parameter for which the states of an optimizer are counted
UNDER_WAY = 2  # blocks whose parameters are gathered at once with zero=3: the one in use and the next


@dataclass(frozen=True)
class Estimate:
    """A step on one mesh with one plan.

    Attributes:
        mesh, plan: ``plan.microbatches`` of them in a step.
        rows: of a microbatch on one rank.
        memory: bytes at the peak of the largest rank, optimizer states included.
        sent: axis -> bytes that a rank sends in a step.
        bubble: idle time over computing time of the pipeline.
        seconds: of a step, by a roofline; only ratios matter.
        optimizer: whose states count.
        compiled: whether ``memory`` is counted on compiled programs, not by a closed form.
    """

    mesh: Mesh
    plan: Plan
    rows: int
    memory: int
    sent: Mapping[str, float]
    bubble: float
    seconds: float
    optimizer: str
    compiled: bool = False


def estimate(mesh: Mesh, plan: Plan, rows: int, price: Price, blocks: int, optimizer: str, node_size: int) -> Estimate:
    """``rows``: of a microbatch on one rank; ``blocks``: of the model."""
    stages = mesh.size(PIPELINE)
    layers, ends = math.ceil(blocks / stages), 1.0 if stages == 1 else 0.5  # the first and the last share the rest
    flights = min(stages, plan.microbatches)
    kept = rows * (flights * layers * price.block.activations + price.rest.activations * ends)
    seconds = plan.microbatches * rows * (layers * price.block.seconds + ends * price.rest.seconds)
    bubble = (stages - 1) / plan.microbatches
    owned = _owned(mesh, price, layers, ends)
    sent = _sent(mesh, plan, rows, price, layers, owned)
    moving = sum(size / _link(mesh, axis, node_size) for axis, size in sent.items() if axis != TENSOR)
    return Estimate(
        mesh, plan, rows,
        memory=int(_memory(plan, owned, kept, rows * price.working, optimizer, price.dtype)),
        sent=sent, bubble=bubble, seconds=seconds * (1 + bubble) + moving, optimizer=optimizer,
    )  # fmt: skip


@dataclass(frozen=True)
class _Owned:
    """Parameters of a rank that the same ranks have: the axes of these, and how many they are."""

    axes: str
    ways: int
    whole: float
    block: float  # of one block, or of all where there are none

    @property
    def part(self) -> float:
        """What ZeRO leaves of them."""
        return self.whole / self.ways


def _owned(mesh: Mesh, price: Price, layers: int, ends: float) -> tuple[_Owned, _Owned]:
    """The parameters that all data ranks have, and those of experts, which differ along ``ep``."""
    found = []
    for name, taken in (("parameters", ()), ("experts", (EXPERTS,))):
        block, rest = getattr(price.block, name), getattr(price.rest, name)
        axes = mesh.shard_axis(taken) or ""
        found.append(_Owned(axes, mesh.size(axes) if axes else 1, layers * block + ends * rest, block or rest))
    return found[0], found[1]


def _memory(
    plan: Plan, owned: Sequence[_Owned], kept: float, working: float, optimizer: str, dtype: torch.dtype
) -> float:
    """The larger of the peaks of the step and of the update (Rajbhandari et al. 2020, for what ZeRO divides)."""
    whole, part = sum(one.whole for one in owned), sum(one.part for one in owned)
    held = part if plan.zero == 3 else whole
    shard = part if plan.zero else whole
    states = shard * optimizer_named(optimizer).states(SHAPE, dtype) / (math.prod(SHAPE) * dtype.itemsize)
    whole_sums = plan.zero < 2 and (plan.microbatches > 1 or plan.zero == 0)
    grads = whole if whole_sums else part
    blocks = sum(one.block for one in owned if one.ways > 1)
    under_way = (UNDER_WAY * sum(one.block for one in owned) if plan.zero == 3 else 0) + blocks
    if plan.zero in (1, 2) and plan.microbatches == 1:  # whole ones wait for their bucket, and go into it
        under_way += 2 * min(whole, plan.bucket_mb * 1e6)
    step = held + grads + states + kept + working + under_way
    return max(step, held + 2 * shard + states)


def _sent(mesh: Mesh, plan: Plan, rows: int, price: Price, layers: int, owned: Sequence[_Owned]) -> dict[str, float]:
    times = plan.microbatches * rows
    found = defaultdict[str, float](float)
    for axis in dict.fromkeys((*price.block.sent, *price.rest.sent)):
        found[axis] += times * (layers * price.block.sent.get(axis, 0.0) + price.rest.sent.get(axis, 0.0))
    each = plan.microbatches  # gathers and scatters of gradients that are never whole are made for each
    for one in owned:
        if one.ways > 1 and one.whole:
            share = one.whole * (one.ways - 1) / one.ways
            found[one.axes] += share * {0: 2, 1: 2, 2: 1 + each, 3: 3 * each}[plan.zero]
    if mesh.size(PIPELINE) > 1:
        found[PIPELINE] = (2 if mesh.size(PIPELINE) > 2 else 1) * times * price.crossing  # in both directions, or one
    return dict(found)


def _link(mesh: Mesh, axis: str, node_size: int) -> float:
    """Bytes per second: an axis whose groups leave the node goes over the network."""
    members = max(mesh.group(0, axis)) - min(mesh.group(0, axis))
    return ACCELERATOR.link if members < node_size else BETWEEN_NODES
