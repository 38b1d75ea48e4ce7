"""Losses that are means over a DTensor's elements, and lookups in one, which ranks have in parts: on whole tensors.

In torch 2.13 the mean of such a loss is the mean of the ranks' means, wrong where they have unequally many elements,
and its gradient is over the count of this rank's: that of ``mse_loss(weight, anchor)`` comes out as many times too
large as there are ranks. A plain tensor beside it is refused, as torch refuses it elsewhere: it may be one rank's part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.dtensors.dtensor import spec_of
from autopar.dtensors.whole_operators import on_whole
from autopar.errors import InvariantError

aten = torch.ops.aten
Handler = Callable[[Any, Any, Any], Any]
MEANS = {
    *(aten.mse_loss.default, aten.mse_loss_backward.default),
    *(aten.smooth_l1_loss.default, aten.smooth_l1_loss_backward.default),
    *(aten.huber_loss.default, aten.huber_loss_backward.default),
    *(aten.binary_cross_entropy.default, aten.binary_cross_entropy_backward.default),
    *(aten.binary_cross_entropy_with_logits.default, aten.soft_margin_loss.default),
    *(aten.soft_margin_loss_backward.default, aten.nll_loss_forward.default, aten.nll_loss_backward.default),
    *(aten.nll_loss2d_forward.default, aten.nll_loss2d_backward.default),
}
LOOKED_UP = {aten.embedding.default, aten.embedding_dense_backward.default}  # what torch gives cannot be finished


def handler(is_ours: Callable[[Tensor], bool], usual: Handler) -> Handler:
    """What computes operators of :data:`MEANS` and :data:`LOOKED_UP`: on whole tensors where ours is in parts."""

    def mean(operator: Any, args: Any, kwargs: Any) -> Any:
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, DTensor)]
        if any(is_ours(one) and any(hasattr(at, "dim") for at in spec_of(one).placements) for one in tensors):
            refuse_plain(operator, args, kwargs)
            return on_whole(operator, args, kwargs)
        return usual(operator, args, kwargs)

    return mean


def refuse_plain(operator: Any, args: Any, kwargs: Any) -> None:
    """Raise InvariantError where a plain tensor of several elements is among the arguments."""
    tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    plain = [list(one.shape) for one in tensors if not isinstance(one, DTensor) and one.numel() > 1]
    if plain:
        split = [list(one.shape) for one in tensors if isinstance(one, DTensor)]
        raise InvariantError(
            f"{operator} got mixed torch.Tensor and DTensor, shapes {plain[0]} and {split}: is the first whole, or one "
            "rank's part?\nWay out: compute the loss inside of the model; or make it of a DTensor "
            "(torch.ones_like(parameter), DTensor.from_local), or the others whole (output.full_tensor())."
        )
