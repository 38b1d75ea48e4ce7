"""How the files of a Hugging Face model hold its tensors: under other names, an expert each, with dims in other order.

    model.layers.0.mlp.experts.gate_up_proj  (experts, 2 * width, hidden)           in the model
    model.layers.0.block_sparse_moe.experts.3.w1.weight  (width, hidden)            in the files: rows of expert 3
    model.layers.0.block_sparse_moe.experts.3.w3.weight  (width, hidden)

    layers.0.self_attn.q_proj.weight, .k_proj.weight, .v_proj.weight                in the model
    encoder.layers.0.attn.Wqkv.weight: their rows, one tensor after the other       in the files

``transformers`` converts while it loads, and back while it saves. The way back, of tensors without data, gives views of
them, and joins views: the strides of a view say which rectangle of the model's tensor it is. Where a conversion
computes, or is no rectangle, the tensor has the model's own name in the files too, which ``from_pretrained`` reads as
well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autopar.checkpoint.hub_names import reverted

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of a tensor of the model, which is a tensor of the files, or a rectangle of one.

    Attributes:
        offsets, sizes: of the rectangle, along each dim of the model's tensor.
        dims: for each dim of the tensor in the files that of the model's; None for one of size 1 that it lacks.
        within: of a tensor in the files that has more: where the rectangle begins in it, and its shape.
    """

    offsets: Offsets
    sizes: tuple[int, ...]
    dims: tuple[int | None, ...]
    within: tuple[Offsets, tuple[int, ...]] | None = None

    @classmethod
    def of_all(cls, shape: Sequence[int]) -> Rectangle:
        return cls((0,) * len(shape), tuple(shape), tuple(range(len(shape))))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the files."""
        return self.extent if self.within is None else self.within[1]

    @property
    def extent(self) -> tuple[int, ...]:
        """The sizes of the rectangle in the tensor in the files."""
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
        begin = self.within[0] if self.within is not None else (0,) * len(self.dims)
        places = [0 if own is None else starts[own] - self.offsets[own] for own in self.dims]
        return tuple(map(operator.add, begin, places)), view


def stored_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Rectangle]]:
    """For each of ``tensors`` (of the state dict of ``model``): names in the files -> what of it they hold.

    Of ``tensors`` only shapes and dtypes count. ``model`` is an ordinary one; unless it is one of ``transformers``
    that has conversions, each name stands for itself.
    """
    wholes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    origins = Origins(wholes)
    in_files: dict[str, list[Part]] = {}
    for stored, view in origins.watched(reverted, model).items():
        parts = origins.parts(view)
        if parts is not None and len({part.name for part in parts}) == len(parts):
            in_files[stored] = parts
    return _complete(wholes, in_files)


@dataclass(frozen=True)
class Part:
    """A rectangle of the tensor of the model that is called ``name``."""

    name: str
    rectangle: Rectangle


def _complete(wholes: Mapping[str, Tensor], in_files: dict[str, list[Part]]) -> dict[str, dict[str, Rectangle]]:
    """What :func:`stored_names` gives: a tensor that is not in the files with all of its elements has its own name,
    and so have those that share a tensor of the files with it."""
    while True:
        found: dict[str, dict[str, Rectangle]] = {name: {} for name in wholes}
        for stored, parts in in_files.items():
            for part in parts:
                found[part.name][stored] = part.rectangle
        lacking = {name for name, own in found.items() if sum(map(_elements, own.values())) != wholes[name].numel()}
        broken = [stored for stored, parts in in_files.items() if any(part.name in lacking for part in parts)]
        if not broken:
            own_names = {name: {name: Rectangle.of_all(wholes[name].shape)} for name in wholes if not found[name]}
            return {name: own_names.get(name, found[name]) for name in wholes}
        for stored in broken:
            del in_files[stored]


def _elements(part: Rectangle) -> int:
    return torch.Size(part.sizes).numel()


class Origins(TorchFunctionMode):
    """Where the elements of views, and of joined views, come from. ``wholes``: the tensors by name, without data."""

    def __init__(self, wholes: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._wholes = wholes
        self._names = {_storage(whole): name for name, whole in wholes.items()}
        self._joined: dict[int, tuple[Tensor, list[Tensor], int]] = {}  # storage -> (joined, of these views, along)

    def watched(
        self, function: Callable[[nn.Module, dict[str, Tensor]], Mapping[str, Tensor]], model: nn.Module
    ) -> Mapping[str, Tensor]:
        """The result of ``function(model, tensors)``, whose views :meth:`parts` knows."""
        with self:
            return function(model, dict(self._wholes))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:
            return args[0]  # views stay views: their copies would be tensors of unknown origin
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.stack):
            views, dim = _operands(*args, **(kwargs or {}))
            dim = dim % result.dim()
            self._joined[_storage(result)] = (
                result,
                [v.unsqueeze(dim) if func is torch.stack else v for v in views],
                dim,
            )
        return result

    def parts(self, view: Tensor) -> list[Part] | None:
        """The rectangles of the tensors that make up ``view``; None where they do not, or it is not known."""
        key = _storage(view)
        if key in self._names:
            own = _rectangle(view, self._wholes[self._names[key]])
            return None if own is None else [Part(self._names[key], own)]
        joined, views, dim = self._joined.get(key, (None, [], 0))
        if joined is None or view.shape != joined.shape or view.stride() != joined.stride():
            return None
        found, start = list[Part](), 0
        for inner in views:
            parts = self.parts(inner)
            if parts is None:
                return None
            found += [replace(part, rectangle=_moved(part.rectangle, dim, start, view.shape)) for part in parts]
            start += inner.shape[dim]
        return found


def _storage(tensor: Tensor) -> int:
    found: int = tensor.untyped_storage()._cdata
    return found


def _operands(tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> tuple[Sequence[Tensor], int]:
    """The arguments of ``torch.cat`` and ``torch.stack``."""
    return tensors, dim


def _moved(inner: Rectangle, dim: int, start: int, shape: Sequence[int]) -> Rectangle:
    """``inner`` in a tensor of shape ``shape``, in which its own begins at ``start`` along ``dim``."""
    begin = list(inner.within[0]) if inner.within is not None else [0] * len(inner.dims)
    begin[dim] += start
    return replace(inner, within=(tuple(begin), tuple(shape)))


def _rectangle(view: Tensor, whole: Tensor) -> Rectangle | None:
    """Which rectangle of ``whole``, which is contiguous, ``view`` is; None for none."""
    offset, strides = view.storage_offset(), whole.stride()
    offsets = [offset // stride % size if size else 0 for stride, size in zip(strides, whole.shape)]
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
