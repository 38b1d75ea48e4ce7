"""Process groups over several axes of a mesh, or over a part of one, made when a program first needs them.

Only the members of a group make it, so that pipeline stages need not wait for each other. They do so in the same order:
ranks of a group bind the same programs. gloo and NCCL allow it (``new_group(use_local_synchronization=True)``, torch
2.1 and later); they find each other by a name that torch makes of the ranks and the number of groups so far, which
must be the same on all of them. ``torch.distributed.destroy_process_group()`` ends these groups with all others.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from autopar.communication.timeouts import set_timeout
from autopar.errors import LaunchError


def new_group(ranks: Sequence[int], seconds: float) -> ProcessGroup:
    """The group of ``ranks`` (of the world, in the order of their positions); collective over them.

    A group of all ranks is the world's own. Raises RuntimeError where a member does not come within ``seconds``.
    """
    world = dist.group.WORLD
    assert world is not None, "there is no process group yet"
    if list(ranks) == list(range(world.size())):
        set_timeout(world, seconds)
        return world
    with _of_its_own(world):
        made: ProcessGroup = dist.new_group(
            list(ranks), timeout=timedelta(seconds=seconds), use_local_synchronization=True, **_in_order(ranks)
        )
    return made


def agreement_group(ranks: Sequence[int], seconds: float) -> ProcessGroup | None:
    """A group of ``ranks`` on their CPUs, whatever else they communicate by; None for one rank, or without gloo."""
    if len(ranks) < 2 or not dist.is_gloo_available():
        return None
    made: ProcessGroup = dist.new_group(
        list(ranks), timedelta(seconds=seconds), "gloo", use_local_synchronization=True, **_in_order(ranks)
    )
    return made


def _in_order(ranks: Sequence[int]) -> dict[str, Any]:
    """What keeps torch from sorting ``ranks``. Raises LaunchError where it always does."""
    if list(ranks) == sorted(ranks):
        return {}
    if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
        raise LaunchError(
            f"torch {torch.__version__} sorts the ranks of a process group, and these are {list(ranks)}\n"
            "Way out: torch 2.13, or a DeviceMesh with its ranks in rising order."
        )
    return {"sort_ranks": False}


@contextmanager
def _of_its_own(world: Any) -> Iterator[None]:
    """Have NCCL make a new communicator: to split the world's, where that is bound to a device, takes all ranks."""
    bound = world.bound_device_id
    if bound is None:
        yield
        return
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound
