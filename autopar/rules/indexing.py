"""Operators that pick elements by position: gather, index, one_hot, scatter."""

from __future__ import annotations

from typing import Any

import torch

from autopar.rules.factoring import Call, Dims, Factoring
from autopar.rules.views import generated

aten = torch.ops.aten


def gather(call: Call) -> Factoring:
    """``x.gather(dim, index)``: dims other than ``dim`` are shared where the index covers them whole."""
    source, index = call.inputs
    rank = len(source)
    dim = int(call.argument(1, "dim")) % rank if rank else 0
    names = [f"d{i}" for i in range(rank)]
    sizes: dict[str, int] = {}
    rows: list[tuple[str, ...]] = []
    picks: list[tuple[str, ...]] = []
    whole = set()
    for i, name in enumerate(names):
        shared = i != dim and source[i] == index[i]
        sizes |= {name: source[i] if shared else 2}
        rows.append((name,) if source[i] != 1 or not shared else ())
        picks.append(rows[-1] if shared else (f"p{i}",))
        if not shared:
            whole.add(name)
            sizes[f"p{i}"] = index[i]
            if i != dim:
                whole.add(f"p{i}")
    return Factoring((tuple(rows), tuple(picks)), (tuple(picks),), sizes, whole=frozenset(whole))


def index(call: Call) -> Factoring:
    """``x[i, :, j]``: indexed dims stay whole, the others and the dims of the (broadcast) indices may be split."""
    source = call.inputs[0]
    slots = list(call.args[1])
    positions = [i for i, slot in enumerate(slots) if slot is not None]
    shapes = call.inputs[1:]
    result = torch.broadcast_shapes(*shapes)
    names = [f"d{i}" for i in range(len(source))]
    sizes = dict(zip(names, source)) | {f"i{len(result) - k}": size for k, size in enumerate(result)}
    rows: Dims = tuple((n,) if s != 1 or i in positions else () for i, (n, s) in enumerate(zip(names, source)))
    whole = {names[i] for i in positions}
    sizes |= dict.fromkeys(whole, 2)

    def dims(shape: tuple[int, ...]) -> Dims:
        return tuple((f"i{len(shape) - k}",) if size != 1 else () for k, size in enumerate(shape))

    adjacent = positions == list(range(positions[0], positions[-1] + 1))
    first = positions[0] if adjacent else 0
    kept = [row for i, row in enumerate(rows) if i not in positions]
    target = (*kept[:first], *dims(tuple(result)), *kept[first:])
    return Factoring((rows, *map(dims, shapes)), (target,), sizes, whole=frozenset(whole), linear=(frozenset({0}),))


def one_hot(call: Call) -> Factoring:
    shape = call.inputs[0]
    names = [f"d{i}" for i in range(len(shape))]
    dims: Dims = tuple((name,) if size != 1 else () for name, size in zip(names, shape))
    sizes = dict(zip(names, shape)) | {"classes": 2}
    return Factoring((dims,), ((*dims, ("classes",)),), sizes, whole=frozenset({"classes"}))


RULES: dict[Any, Any] = {
    aten.gather.default: gather,
    aten.index.Tensor: index,
    aten.one_hot.default: one_hot,
    aten.new_zeros.default: generated,
}
