"""Whether what a rank holds fits into the memory of its device, by how much it does not, and what would help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from autopar.memory.table import RankMemory
from autopar.mesh import PIPELINE, SHARD_AXES, TENSOR, Mesh
from autopar.plan import Plan

SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
FIXED, SHARE = 2 * 10**9, 0.05


@dataclass(frozen=True)
class Device:
    """One with ``bytes`` of memory. Not all of it is for tensors:

    Attributes:
        fixed: what the driver, the libraries' kernels and the buffers of NCCL's communicators take; an allowance.
        share: what the allocator rounds up and leaves in pieces, of the bytes of tensors; an allowance.
    """

    bytes: int
    fixed: int = FIXED
    share: float = SHARE

    def needed(self, peak: int) -> int:
        """The memory of a device that holds ``peak`` bytes of tensors."""
        return self.fixed + int(peak * (1 + self.share))

    def over(self, peak: int) -> int:
        """Bytes by which it is too much; 0 or less where it fits."""
        return self.needed(peak) - self.bytes


def read_size(text: str) -> int:
    """The bytes of ``80GB``, ``80 GiB``, ``141e9``. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError(f"'{text}' is no size of a memory: write 80GB (80 x 10^9 bytes) or 80GiB (80 x 2^30 bytes)")
    unit = found[2].upper()
    return int(float(found[1]) * (BINARY[unit] if found[3] and unit else SCALES[unit]))


@dataclass(frozen=True)
class Help:
    """A change of the plan or mesh, and the bytes at the peak that it is estimated to save."""

    change: str
    saves: int


def helps(mesh: Mesh, plan: Plan, one: RankMemory) -> list[Help]:
    """What would lower the peak of a rank, most first; estimates, from what is held at its peak."""
    return sorted(_changes(mesh, plan, one), key=lambda change: -change.saves)


def _changes(mesh: Mesh, plan: Plan, one: RankMemory) -> Iterator[Help]:
    held = one.at_peak
    ways = 1
    for axis in SHARD_AXES:
        ways *= mesh.size(axis)
    if plan.zero < 3 and ways > 1:
        whole = held["parameters"] + held["gathered"] if plan.zero else one.parameters
        states = 0 if plan.zero else one.optimizer
        grads = one.gradients if plan.zero < 2 else 0
        yield Help("zero=3 (parameters, gradients and states split)", int((whole + states + grads) * (1 - 1 / ways)))
    if plan.recompute != "full" and held["activations"]:
        yield Help("recompute='full' (blocks keep their inputs only)", int(held["activations"] * 0.8))
    if plan.microbatches == 1 and not mesh.is_pipelined and held["activations"]:
        yield Help("microbatches=2, run one after the other", held["activations"] // 2)
    if one.optimizer > one.parameters:
        yield Help("an optimizer with smaller states (adam8bit, sgd)", one.optimizer * 3 // 4)
    split = held["parameters"] + held["gradients"] + one.optimizer + held["activations"]
    yield Help(f"{TENSOR}={2 * mesh.size(TENSOR)} (layers split once more)", split // 2)
    states = one.parameters + held["gradients"] + one.optimizer
    yield Help(f"{PIPELINE}={2 * mesh.size(PIPELINE)} (half the layers on a rank)", states // 2)
