"""A convolution with unequal padding in front and behind along one of its dims, as causal ones have it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from autopar.operators.registry import operator


@operator
def padded_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dim: int,
    before: int,
    after: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x (N, C, ...) with ``before`` and ``after`` zeros along ``dim``, convolved: (N, O, ...).

    ``padding``: of all spatial dims, 0 for ``dim``. weight (O, C / groups, taps...), bias (O).
    """
    amounts = [0, 0] * (x.dim() - dim - 1) + [before, after]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    found: Tensor = convolve(F.pad(x, amounts), weight, bias, list(stride), list(padding), list(dilation), groups)
    return found
