"""Clip gradients by their global norm over all axes of a mesh. (Pascanu et al. 2013, section 3.2.)"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.communication.communicator import Communicator
from autopar.dtensors.dtensor import is_first, local_of
from autopar.mesh import PIPELINE

TINY = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@torch.no_grad()
def clip_gradients(
    grads: Iterable[tuple[Tensor, bool]],
    max_norm: float,
    norm_type: float,
    comm: Communicator,
    error_if_nonfinite: bool,
) -> Tensor:
    """Scale the gradients of all parameters of a module, in place, so that their norm is at most ``max_norm``.

    With each gradient comes whether it counts: one that several pipeline stages have does so on the first of them.

    Returns the norm that they had: of order ``norm_type``, as if all were one whole vector; the same on every rank.
    Collective: one all-reduce of one number for each axis. Raises ValueError for an order that is not above 0,
    RuntimeError for a norm that is no number if ``error_if_nonfinite``.
    """
    if not norm_type > 0:
        raise ValueError(f"clip_grad_norm_(norm_type={norm_type!r}): it is a number above 0, or inf")
    pairs = list(grads)
    found = [grad for grad, _ in pairs]
    norm = _norm([grad for grad, counts in pairs if counts], float(norm_type), comm)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the norm of order {norm_type:g} of all gradients is {float(norm)}, so they cannot be clipped\n"
            "Way out: find what made them so (a learning rate, a division by zero), or error_if_nonfinite=False."
        )
    factor = (max_norm / (norm + TINY)).clamp(max=1.0)
    dtypes = _by_dtype(found)
    for dtype, locals_ in dtypes.items():
        torch._foreach_mul_(locals_, factor.to(dtype))
    return norm.to(max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32))


def _norm(grads: list[Tensor], order: float, comm: Communicator) -> Tensor:
    """Sums are in float64, which has room for the squares. A part on several ranks is counted by the first of them."""
    mine = [grad for grad in grads if _is_counted(grad, comm) and local_of(grad).numel()]
    parts = [norm for group in _by_dtype(mine).values() for norm in torch._foreach_norm(group, order)]
    total = torch.zeros((), dtype=torch.float64, device=comm.device)
    if math.isinf(order):
        if parts:
            total = torch.stack([part.double() for part in parts]).max()
        total = total.nan_to_num(nan=math.inf, posinf=math.inf)  # a maximum over ranks may forget a NaN
    elif parts:
        total = torch.stack([part.double() for part in parts]).pow(order).sum()
    for axis in comm.mesh.names:
        total = comm.all_reduce(total, axis, "max" if math.isinf(order) else "sum")
    return total if math.isinf(order) else total.pow(1 / order)


def _is_counted(grad: Tensor, comm: Communicator) -> bool:
    """Whether this rank is the first of those that hold the same part."""
    if isinstance(grad, DTensor):
        return is_first(grad)
    return not any(position for axis, position in comm.coordinates.items() if axis != PIPELINE)


def _by_dtype(grads: Iterable[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        groups.setdefault(grad.dtype, []).append(local_of(grad))
    return groups
