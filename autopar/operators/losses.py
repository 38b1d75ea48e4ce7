"""Cross-entropy as a sum over a count, so that a mean over tokens stays a mean over *all* tokens of all ranks.

``vocabulary_*`` and ``cross_entropy_from_parts`` compute the loss in steps when each rank has some of the classes
(vocabulary-parallel cross-entropy: Shoeybi et al. 2019, section 3): maximum, sum of exponentials and the target's
logit are reduced over the ranks; no rank ever holds all logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.operators.embedding import within
from autopar.operators.registry import operator

aten = torch.ops.aten
_LIKELIHOODS: Any = aten.nll_loss_forward.default
SUM = 2  # of losses, as aten's kernels number the ways to reduce them


@operator
def cross_entropy_sums(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """(sum of the losses, divisor of a mean); float32 for logits of 16 bits, which are too narrow for a sum of many
    losses.

    logits (C), (N, C) or (N, C, d1, ...); target without C.
    """
    wide = _wide(logits.dtype)
    of_classes = logits.dim() == 2 and target.dim() == 1  # with chances of classes the target is as the logits are
    if of_classes and wide == logits.dtype and not label_smoothing:
        # the kernel counts as it goes; aten's own, for the one of torch.nn.functional gives the sum alone
        found: tuple[Tensor, Tensor] = _LIKELIHOODS(torch.log_softmax(logits, 1), target, weight, SUM, ignore_index)
        return found
    reduction = "sum" if wide == logits.dtype else "none"
    total = F.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    return total if reduction == "sum" else total.sum(dtype=wide), count_of(target, weight, ignore_index, wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.promote_types(dtype, torch.float32)


def count_of(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """The divisor of a mean over the labels ``target``: how many count, or the sum of their weights."""
    counted = target != ignore_index
    if weight is None:
        return counted.sum().to(dtype)
    weights = weight[target.clamp(0, weight.shape[0] - 1)]
    return torch.where(counted, weights, torch.zeros_like(weights)).sum(dtype=dtype)


def _mine(width: int, rank: Tensor, classes: int) -> Tensor:
    """Which of this rank's columns are classes and not padding: bool (width)."""
    return torch.arange(width, device=rank.device) + rank * width < classes


def _class_dim(logits: Tensor, target: Tensor) -> int:
    return 0 if target.dim() == 0 else 1


def _as_column(mask: Tensor, logits: Tensor, dim: int) -> Tensor:
    return mask.reshape([-1 if d == dim else 1 for d in range(logits.dim())])


@operator
def vocabulary_maximum(logits: Tensor, target: Tensor, rank: Tensor, classes: int) -> Tensor:
    """Largest logit among this rank's classes; no gradient. logits (N, C / n, ...) -> (N, ...)."""
    dim = _class_dim(logits, target)
    logits = logits.detach()
    if logits.shape[dim] * 2 > classes or classes % logits.shape[dim]:  # the last ranks may have padding
        mine = _as_column(_mine(logits.shape[dim], rank.to(logits.device), classes), logits, dim)
        logits = logits.masked_fill(~mine, -torch.inf)
    return logits.amax(dim)


@operator
def vocabulary_sums(
    logits: Tensor,
    maximum: Tensor,
    target: Tensor,
    rank: Tensor,
    classes: int,
    label_smoothing: float,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's part of three sums: exp(logit - maximum), the target's logit and, for smoothing, all logits.

    A target that is no class, and not ``ignore_index``, is refused on every rank, as where one has all classes; not so
    without ``ignore_index`` (older programs).
    """
    dim = _class_dim(logits, target)
    width = logits.shape[dim]
    rank = rank.to(logits.device)
    shifted = logits - maximum.unsqueeze(dim)
    if classes % width:
        shifted = shifted.masked_fill(~_as_column(_mine(width, rank, classes), logits, dim), -torch.inf)
    exponentials = shifted.exp().sum(dim)
    local = target - rank * width
    here = (local >= 0) & (local < width)
    place = local.clamp(0, width - 1)
    if ignore_index is not None:
        place = torch.where(target == ignore_index, place, within(target, classes, place, width))
    picked = shifted.gather(dim, place.unsqueeze(dim)).squeeze(dim)
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    if not label_smoothing:
        return exponentials, torch.where(here, picked, zero), exponentials.new_zeros(())
    mine = _as_column(_mine(width, rank, classes), logits, dim)
    return exponentials, torch.where(here, picked, zero), torch.where(mine, shifted, zero).sum(dim)


@operator
def cross_entropy_from_parts(
    exponentials: Tensor,
    picked: Tensor,
    summed: Tensor | None,
    target: Tensor,
    classes: int,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """(sum of the losses, count) from reduced parts of :func:`vocabulary_sums`; the maximum cancels out.

    The dtypes are those of :func:`cross_entropy_sums`.
    """
    wide = _wide(exponentials.dtype)
    log_total = exponentials.log()
    losses = log_total - picked
    if summed is not None:
        losses = (1 - label_smoothing) * losses + label_smoothing * (log_total - summed / classes)
    counted = target != ignore_index
    total = torch.where(counted, losses, torch.zeros_like(losses)).sum(dtype=wide)
    return total, counted.sum().to(wide)
