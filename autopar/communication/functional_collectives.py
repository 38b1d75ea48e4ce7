"""The one door to torch's functional collectives, whose names torch is about to change (``*_tensor`` to ``*_single``).

Each returns a new tensor (except ``..._into``, and a sum ``in_place``, which is without the functional form's copy of
its operand), works along dim 0 and, except those called ``start_...``, has ended
when it returns. They are ordinary operators, so ``torch.distributed.tensor.debug.CommDebugMode`` and c10d's hooks see
them.

An all-gather is ``torch.distributed``'s own, which takes the tensor that it writes. The functional
``all_gather_into_tensor``, which allocates its own, corrupts the heap on gloo when more than about two of its results
are under way (torch 2.13.0 on CPU, in plain torch too: two processes, fifty gathers ahead of their use, a crash in five
of six runs). Its form ``_out`` does not, but CommDebugMode does not see that. The functional ``reduce_scatter_tensor``,
``all_reduce`` and ``all_to_all_single`` are safe. ``tests/communication/test_functional_collectives.py`` has fifty of
each under way.

On gloo all but large sums are messages of all ranks to all (:mod:`direct_exchange`): ``c10d::send`` and
``c10d::recv_``, which CommDebugMode does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _register_work
from torch.distributed import ProcessGroup

from autopar.communication import direct_exchange

_OPS: Any = torch.ops._c10d_functional


def _named(*names: str) -> Any:
    """The first of ``names`` that this torch has."""
    return next(getattr(_OPS, name).default for name in names if hasattr(_OPS, name))


_wait = _named("wait_tensor")
_all_reduce = _named("all_reduce")
_reduce_scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")
_all_to_all = _named("all_to_all_single")
_REDUCTIONS: dict[str, Any] = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_all_gather_into: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def wait(x: Tensor) -> Tensor:
    """``x``, a result of one of the functions ``start_...``, once it is available."""
    if direct_exchange.finish(x):
        return x
    result: Tensor = _wait(x)
    return result


def start_all_reduce(x: Tensor, group: ProcessGroup, op: str, in_place: bool = False) -> Tensor:
    """``in_place``: in the memory of ``x``, unless the way that is taken has a result of its own anyway."""
    direct = direct_exchange.start_all_reduce(x, group, op) if direct_exchange.is_possible(x, group) else None
    if direct is not None:
        return direct
    if in_place and x.is_contiguous():
        chosen: Any = dist.AllreduceOptions()
        chosen.reduceOp, chosen.asyncOp = _REDUCTIONS[op], True
        _register_work(x, group.allreduce([x], chosen))  # for wait
        return x
    result: Tensor = _all_reduce(x, op, group.group_name)
    return result


def start_all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    return start_all_gather_into(x, group, x.new_empty((group.size() * x.shape[0], *x.shape[1:])))


def start_all_gather_into(x: Tensor, group: ProcessGroup, out: Tensor) -> Tensor:
    """As :func:`start_all_gather`, into ``out``, of which ``x`` may be this rank's part."""
    if direct_exchange.is_possible(x, group):
        return direct_exchange.start_all_gather_into(x, group, out)
    _register_work(out, _all_gather_into(out, x, group=group, async_op=True))  # for wait
    return out


def start_reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    if direct_exchange.is_possible(x, group):
        return direct_exchange.start_reduce_scatter(x, group)
    result: Tensor = _reduce_scatter(x, "sum", group.size(), group.group_name)
    return result


def start_shift(x: Tensor, group: ProcessGroup, by: int) -> Tensor:
    """``x`` of this rank to the rank ``by`` further, in exchange for that of the rank ``by`` before."""
    if direct_exchange.is_possible(x, group):
        return direct_exchange.start_shift(x, group, by)
    ranks, rank = group.size(), group.rank()
    sent, received = ([int((rank + step - other) % ranks == 0) for other in range(ranks)] for step in (by, -by))
    result: Tensor = _all_to_all(x.unsqueeze(0), received, sent, group.group_name)
    return result.squeeze(0)


def all_reduce(x: Tensor, group: ProcessGroup, op: str, in_place: bool = False) -> Tensor:
    return wait(start_all_reduce(x, group, op, in_place))


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """(n, ...) of each rank -> (ranks * n, ...)."""
    return wait(start_all_gather(x, group))


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """(ranks * n, ...) of each rank -> (n, ...): this rank's part of the sum."""
    return wait(start_reduce_scatter(x, group))


def broadcast(x: Tensor, group: ProcessGroup) -> Tensor:
    """``x``, to which the first rank of the group has written what it has."""
    dist.broadcast(x, group=group, group_src=0)
    return x


def all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """(ranks * n, ...): block i goes to rank i, and block i of the result came from it."""
    ranks = group.size()
    sizes = [x.shape[0] // ranks] * ranks
    return exchange(x, group, sizes, sizes)


def exchange(x: Tensor, group: ProcessGroup, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """As :func:`all_to_all` of blocks of unequal sizes: ``sent[i]`` to rank i, ``received[i]`` from it."""
    return wait(start_exchange(x, group, sent, received))


def start_exchange(x: Tensor, group: ProcessGroup, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    if direct_exchange.is_possible(x, group):
        return direct_exchange.start_exchange(x, group, sent, received)
    result: Tensor = _all_to_all(x, list(received), list(sent), group.group_name)
    return result


def start_maximum(x: Tensor, group: ProcessGroup) -> dist.Work:
    """Let ``x`` (on the CPU) have the largest of each element over the ranks, once the result has been waited for.

    Past the dispatcher: neither CommDebugMode nor a user's hooks see it, and it takes 13 us of this thread, not 20.
    """
    chosen: Any = dist.AllreduceOptions()
    chosen.reduceOp = dist.ReduceOp.MAX
    backend: Any = group._get_backend(x.device)
    work: dist.Work = backend.allreduce([x], chosen)
    return work
