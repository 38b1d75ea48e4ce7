"""Choices that torch's own Transformer layers make while they run, made once for a graph.

* A mask is compared with the causal one by value. A graph serves every mask, so it keeps the mask; a constant one is
  recognised later, by a pass.
* Without gradients, ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` call one fused kernel for the whole
  layer, which no rule could split: the graph has their ordinary operators.
* ``nn.LSTM`` and its kin keep a list of their parameters, which export mistakes for an assignment of the model.
* Without gradients, and with padding at the end of each row, ``nn.TransformerEncoder`` packs the rows into a nested
  tensor. Only one effect of it is visible outside: the padding comes out as zeros. The graph writes them.
* ``nn.BatchNorm`` with ``momentum=None`` makes a number of its counter of batches, another one in each step. The graph
  divides by the counter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import transformer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import has_torch_function


def packs_padding(model: nn.Module) -> bool:
    """Whether some layer of ``model`` gives other values at padding when no gradients are required."""
    return any(isinstance(m, nn.TransformerEncoder) and getattr(m, "use_nested_tensor", False) for m in model.modules())


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Make torch's Transformer layers run ordinary operators, with the results that the caller's mode would give."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    fast = enabled and not has_torch_function((torch.empty(0),))  # a mode that sees each call keeps torch from using it
    gradients = torch.is_grad_enabled()
    forward = nn.TransformerEncoder.forward

    def encode(
        self: nn.TransformerEncoder,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if not fast or mask is not None or src_key_padding_mask is None or not _packs(self, src, gradients):
            return forward(self, src, mask, src_key_padding_mask, is_causal)
        norm, self.norm = self.norm, None
        try:
            encoded = forward(self, src, mask, src_key_padding_mask, is_causal)
        finally:
            self.norm = norm
        encoded = _zero_at_padding(encoded, src_key_padding_mask, getattr(self, "mask_check", True))
        return encoded if norm is None else norm(encoded)

    def is_hint(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.object(nn.TransformerEncoder, "forward", encode),
            mock.patch.object(transformer, "_detect_is_causal_mask", is_hint),
            mock.patch.object(_BatchNorm, "forward", _averaging(_BatchNorm.forward)),
        ):
            warnings.filterwarnings("ignore", message=r"The tensor attributes? self\.(\w+\.)*_flat_weights\[")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _averaging(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def normalise(self: Any, input: Tensor) -> Tensor:
        running = self.running_mean, self.running_var
        if self.momentum is not None or not self.training or self.num_batches_tracked is None:
            return forward(self, input)
        self._check_input_dim(input)
        self.num_batches_tracked.add_(1)
        of_batch = mean, variance = torch.zeros_like(running[0]), torch.zeros_like(running[1])
        made = functional.batch_norm(input, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        for buffer, statistic in zip(running, of_batch):
            share = 1.0 / self.num_batches_tracked.to(buffer.dtype)
            buffer.copy_((1.0 - share) * buffer + share * statistic)
        return made

    return normalise


def _packs(encoder: nn.TransformerEncoder, src: Tensor, gradients: bool) -> bool:
    """The conditions of ``nn.TransformerEncoder.forward`` that do not depend on values."""
    first = encoder.layers[0]
    if not getattr(encoder, "use_nested_tensor", False) or first.training or src.dim() != 3:
        return False
    if torch.is_autocast_enabled():
        return False
    return not (gradients and (src.requires_grad or any(p.requires_grad for p in first.parameters())))


def _zero_at_padding(encoded: Tensor, mask: Tensor, checked: bool) -> Tensor:
    """``encoded`` (B, T, C) with zeros where ``mask`` (B, T) hides; if ``checked``, only if all rows end in padding."""
    hidden = mask if mask.dtype == torch.bool else mask != 0
    if checked:
        length = (~hidden).sum(dim=1, keepdim=True)  # (B, 1)
        at_end = torch.arange(hidden.shape[1], device=hidden.device) >= length  # (B, T)
        hidden = hidden & ((hidden != at_end).sum() == 0)
    return encoded.masked_fill(hidden.unsqueeze(-1), 0.0)
