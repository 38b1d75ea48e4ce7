"""Closed forms over the prices of a block: memory, bytes sent and seconds of a step on a mesh with a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from autopar.cost.machine import ACCELERATOR
from autopar.fitting.prices import Price
from autopar.memory.optimizers import optimizer_named
from autopar.mesh import PIPELINE, SEQUENCE, TENSOR, Mesh
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
    stages, data = mesh.size(PIPELINE), mesh.size("dp") * mesh.size(SEQUENCE)
    layers, ends = math.ceil(blocks / stages), 1.0 if stages == 1 else 0.5  # the first and the last share the rest
    parameters = layers * price.block.parameters + ends * price.rest.parameters
    flights = min(stages, plan.microbatches)
    kept = rows * (flights * layers * price.block.activations + price.rest.activations * (1 if stages == 1 else ends))
    block = price.block.parameters or price.rest.parameters
    seconds = plan.microbatches * rows * (layers * price.block.seconds + ends * price.rest.seconds)
    bubble = (stages - 1) / plan.microbatches
    sent = _sent(mesh, plan, rows, price, layers, parameters)
    moving = sum(size / _link(mesh, axis, node_size) for axis, size in sent.items() if axis != TENSOR)
    return Estimate(
        mesh, plan, rows,
        memory=int(_memory(plan, data, parameters, block, kept, rows * price.working, optimizer, price.dtype)),
        sent=sent, bubble=bubble, seconds=seconds * (1 + bubble) + moving, optimizer=optimizer,
    )  # fmt: skip


def _memory(
    plan: Plan,
    data: int,
    parameters: float,
    block: float,
    kept: float,
    working: float,
    optimizer: str,
    dtype: torch.dtype,
) -> float:
    """The larger of the peaks of the step and of the update (Rajbhandari et al. 2020, for what ZeRO divides)."""
    part = parameters / data
    held = part if plan.zero == 3 else parameters
    shard = part if plan.zero else parameters
    states = shard * optimizer_named(optimizer).states(SHAPE, dtype) / (math.prod(SHAPE) * dtype.itemsize)
    whole_sums = plan.zero < 2 and (plan.microbatches > 1 or plan.zero == 0)
    grads = parameters if whole_sums else part
    under_way = (UNDER_WAY * block if plan.zero == 3 else 0) + (block if data > 1 else 0)
    if plan.zero in (1, 2) and plan.microbatches == 1:  # whole ones wait for their bucket, and go into it
        under_way += 2 * min(parameters, plan.bucket_mb * 1e6)
    step = held + grads + states + kept + working + under_way
    return max(step, held + 2 * shard + states)


def _sent(mesh: Mesh, plan: Plan, rows: int, price: Price, layers: int, parameters: float) -> dict[str, float]:
    times = plan.microbatches * rows
    found = {TENSOR: times * (layers * price.block.sent + price.rest.sent)} if mesh.size(TENSOR) > 1 else {}
    ways = mesh.size("dp")
    share = parameters * (ways - 1) / ways
    if ways > 1:
        each = plan.microbatches  # gathers and scatters of gradients that are never whole are made for each
        found["dp"] = share * {0: 2, 1: 2, 2: 1 + each, 3: 3 * each}[plan.zero]
    if mesh.size(PIPELINE) > 1:
        found[PIPELINE] = (2 if mesh.size(PIPELINE) > 2 else 1) * times * price.crossing  # in both directions, or one
    return found


def _link(mesh: Mesh, axis: str, node_size: int) -> float:
    """Bytes per second: an axis whose groups leave the node goes over the network."""
    members = max(mesh.group(0, axis)) - min(mesh.group(0, axis))
    return ACCELERATOR.link if members < node_size else BETWEEN_NODES
