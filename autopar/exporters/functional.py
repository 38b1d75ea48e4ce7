"""Torch's functional collectives by the name of a group, as exported programs hold them: no process group is needed.

The names ``_c10d_functional::...`` are those of torch 2.11 to 2.13. Who loads an exported program registers a process
group under each name (docs/exports.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed  # it registers the operators
from torch import Tensor, _check

OPS: Any = torch.ops._c10d_functional
ALL_REDUCE, ALL_GATHER = OPS.all_reduce.default, OPS.all_gather_into_tensor.default
REDUCE_SCATTER, ALL_TO_ALL = OPS.reduce_scatter_tensor.default, OPS.all_to_all_single.default
WAIT = OPS.wait_tensor.default
MOVING = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL)


def _wait(x: Tensor) -> Tensor:
    found: Tensor = WAIT(x)
    return found


def all_reduce(x: Tensor, op: str, group: str) -> Tensor:
    return _wait(ALL_REDUCE(x.contiguous(), op, group))


def all_gather(x: Tensor, dim: int, ways: int, group: str) -> Tensor:
    """The parts of all ranks one after the other along ``dim``."""
    return _wait(ALL_GATHER(_first(x, dim), ways, group)).movedim(0, dim)


def reduce_scatter(x: Tensor, dim: int, ways: int, group: str) -> Tensor:
    """This rank's part, along ``dim``, of the sum."""
    return _wait(REDUCE_SCATTER(_first(x, dim), "sum", ways, group)).movedim(0, dim)


def all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], group: str) -> Tensor:
    """Rows of dim 0: ``sent[i]`` of them go to rank i, ``received[i]`` come from it."""
    return _wait(ALL_TO_ALL(x.contiguous(), list(received), list(sent), group))


def exchange(x: Tensor, received: Tensor, sent: Tensor, group: str) -> Tensor:
    """As :func:`all_to_all`, with counts (ways) that are known at run time only."""
    leaving, coming = sent.tolist(), received.tolist()
    for size in (*leaving, *coming):
        holds(size >= 0)
    holds(sum(leaving) == x.shape[0])
    return all_to_all(x, coming, leaving, group)


def holds(condition: Any) -> None:
    """Let the trace know that ``condition``, of sizes that are known at run time only, is true."""
    _check(condition)  # type: ignore[no-untyped-call]


def _first(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, 0).contiguous()
