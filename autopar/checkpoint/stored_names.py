"""How the files of a Hugging Face model hold its tensors: under other names, an expert each, with dims in other order.

    model.layers.0.mlp.experts.gate_up_proj  (experts, 2 * width, hidden)           in the model
    model.layers.0.block_sparse_moe.experts.3.w1.weight  (width, hidden)            in the files: rows of expert 3
    model.layers.0.block_sparse_moe.experts.3.w3.weight  (width, hidden)

``transformers`` converts while it loads, and back while it saves. The way back, of tensors without data, gives views of
them: the strides of a view say which rectangle of the model's tensor it is. Where a conversion computes, or is no
rectangle, the tensor has the model's own name in the files too, which ``from_pretrained`` reads as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of a tensor of the model, which is a tensor of the files.

    Attributes:
        offsets, sizes: of the rectangle, along each dim of the model's tensor.
        dims: for each dim of the tensor in the files that of the model's; None for one of size 1 that it lacks.
    """

    offsets: Offsets
    sizes: tuple[int, ...]
    dims: tuple[int | None, ...]

    @classmethod
    def of_all(cls, shape: Sequence[int]) -> Rectangle:
        return cls((0,) * len(shape), tuple(shape), tuple(range(len(shape))))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the files."""
        return tuple(1 if dim is None else self.sizes[dim] for dim in self.dims)

    def common(self, offsets: Offsets, piece: Tensor) -> tuple[Offsets, Tensor] | None:
        """What it has of ``piece``, which is at ``offsets`` of the model's tensor: (offsets in the files, the view)."""
        starts = [max(pair) for pair in zip(offsets, self.offsets)]
        ends = [min(a + m, b + n) for a, m, b, n in zip(offsets, piece.shape, self.offsets, self.sizes)]
        if any(start >= end for start, end in zip(starts, ends)):
            return None
        for dim, (start, end, offset) in enumerate(zip(starts, ends, offsets)):
            piece = piece.narrow(dim, start - offset, end - start)
        kept = [dim for dim in self.dims if dim is not None]
        view = piece.permute([*kept, *(dim for dim in range(piece.dim()) if dim not in kept)])
        while view.dim() > len(kept):
            view = view.select(-1, 0)
        for place, own in enumerate(self.dims):
            view = view.unsqueeze(place) if own is None else view
        return tuple(0 if own is None else starts[own] - self.offsets[own] for own in self.dims), view


def stored_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Rectangle]]:
    """For each of ``tensors`` (of the state dict of ``model``): names in the files -> what of it they hold.

    Of ``tensors`` only shapes and dtypes count. ``model`` is an ordinary one; unless it is one of ``transformers``
    that has conversions, each name stands for itself.
    """
    wholes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    owners = {whole.untyped_storage()._cdata: name for name, whole in wholes.items()}
    found: dict[str, dict[str, Rectangle]] = {name: {} for name in wholes}
    for stored, view in _reverted(model, wholes).items():
        name = owners.get(view.untyped_storage()._cdata)
        part = _rectangle(view, wholes[name]) if name is not None else None
        if name is not None and part is not None:
            found[name][stored] = part
    for name, whole in wholes.items():
        if sum(map(_elements, found[name].values())) != whole.numel():
            found[name] = {name: Rectangle.of_all(whole.shape)}
    return found


def _elements(part: Rectangle) -> int:
    return torch.Size(part.sizes).numel()


def _rectangle(view: Tensor, whole: Tensor) -> Rectangle | None:
    """Which rectangle of ``whole``, which is contiguous, ``view`` is; None for none."""
    offset, strides = view.storage_offset(), whole.stride()
    offsets = [offset // stride % size for stride, size in zip(strides, whole.shape)]
    sizes, dims = [1] * whole.dim(), list[int | None]()
    for size, stride in zip(view.shape, view.stride()):
        fits = [dim for dim, own in enumerate(strides) if own == stride and whole.shape[dim] > 1 and dim not in dims]
        if size == 1:
            dims.append(None)
        elif len(fits) != 1 or offsets[fits[0]] + size > whole.shape[fits[0]]:
            return None
        else:
            dims.append(fits[0])
            sizes[fits[0]] = size
    return Rectangle(tuple(offsets), tuple(sizes), tuple(dims))


# ---------------------------------------------------------------- the door to transformers


class _Views(TorchFunctionMode):
    """Views stay views: their copies would be tensors of unknown origin."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))


def _reverted(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``state`` as ``save_pretrained`` would write it; itself for a model of no such library, or an older one."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return state
    if not isinstance(model, PreTrainedModel):
        return state
    with _Views():
        reverted: Mapping[str, Tensor] = revert_weight_conversion(model, dict(state))
    return reverted
