"""A batch padded so that its sequences divide over the ranks of a mesh, and results without the padding again.

Padding is on the right. It has no label, and no real position attends to it: under a causal mask none can, and else an
``attention_mask`` says so, which is added where there is none. So loss and gradients are those of the batch itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.errors import SequenceError
from autopar.ir.batch import input_dims
from autopar.mesh import SEQUENCE, Mesh
from autopar.plan import Plan

Fill = float | int | bool
FILLS: dict[str, Fill] = {
    "attention_mask": 0,
    "decoder_attention_mask": 0,
    "labels": -100,  # what torch's cross-entropy ignores
    "token_type_ids": 0,
    "inputs_embeds": 0.0,
    "decoder_inputs_embeds": 0.0,
}
IDS = ("input_ids", "decoder_input_ids")
POSITIONS = ("position_ids", "decoder_position_ids")
MASK, MASKED = "attention_mask", ("input_ids", "inputs_embeds")  # the mask, and the inputs that it is for


def multiple_of(mesh: Mesh, plan: Plan | None = None) -> int:
    """What lengths have to be multiples of: two parts for each rank of ``sp``, which zig-zag order deals out."""
    ways = mesh.size(SEQUENCE) * (mesh.size("tp") if plan is not None and plan.sequence == "megatron" else 1)
    return 2 * ways if mesh.size(SEQUENCE) > 1 else ways


class PaddedBatch(dict[str, Any]):
    """The arguments of a call by name, padded. ``lengths``: input name -> (its length before, its length now)."""

    lengths: dict[str, tuple[int, int]]

    def __init__(self, batch: Mapping[str, Any], lengths: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(batch)
        self.lengths = dict(lengths)

    def unpad(self, outputs: Any, like: str | None = None, dim: int = 1) -> Any:
        """``outputs`` (a tensor, or tensors in any structure) without padding.

        Tensors whose ``dim`` is as long as a padded input get the length that this had before; others stay. ``like``:
        the input whose length they have, where several lengths became the same. A DTensor that is split along ``dim``
        stays one where the parts of its ranks allow that.

        Raises SequenceError where the length is not clear, or the parts do not allow it.
        """
        before: dict[int, set[int]] = {}
        for old, new in [self.lengths[like]] if like else self.lengths.values():
            before.setdefault(new, set()).add(old)

        def cut(tensor: Tensor) -> Tensor:
            found = before.get(tensor.shape[dim]) if tensor.dim() > dim else None
            if found is None:
                return tensor
            if len(found) > 1:
                names = ", ".join(f"'{name}' {old}" for name, (old, new) in self.lengths.items() if old in found)
                raise SequenceError(
                    f"an output of {tensor.shape[dim]} positions may have the length of several inputs: {names}\n"
                    "Way out: unpad(output, like='labels') says of which."
                )
            return _cut(tensor, dim, next(iter(found)))

        return pytree.tree_map_only(Tensor, cut, outputs)


def _cut(tensor: Tensor, dim: int, length: int) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.narrow(dim, 0, length)
    ways = [size for place, size in zip(tensor.placements, tensor.device_mesh.shape) if place.is_shard(dim)]
    parts = 1
    for size in ways:
        parts *= size
    size = tensor.shape[dim] // parts
    if -(-length // parts) != size:
        raise SequenceError(
            f"a DTensor of {tensor.shape[dim]} positions in {parts} parts of {size}: {length} positions would be in "
            f"parts of {-(-length // parts)}, which lie on other ranks\n"
            "Way out: unpad(output.full_tensor()), Plan(outputs='full'), or to_local() and this rank's positions."
        )
    # only the last part that has elements becomes shorter
    place = 0
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_shard(dim):
            place = place * tensor.device_mesh.size(mesh_dim) + tensor.device_mesh.get_local_rank(mesh_dim)
    local = tensor.to_local()
    local = local.narrow(dim, 0, min(max(length - place * size, 0), local.shape[dim]))
    shape = torch.Size(length if d == dim else s for d, s in enumerate(tensor.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def pad_batch(
    batch: Mapping[str, Any],
    model: nn.Module,
    mesh: Mesh,
    plan: Plan | None = None,
    *,
    pad_id: int | None = None,
    fills: Mapping[str, Fill] | None = None,
    causal: bool = False,
) -> PaddedBatch:
    """``batch``, the arguments of ``model`` by name, with sequences as long as ``mesh`` divides.

    Args:
        pad_id: the token of padding, by default that of ``model.config``, else 0; masked, so that any will do.
        fills: what padding is filled with, by the name of the input; for other names than Hugging Face's.
        causal: says that no position of the model depends on later ones, so that it needs no mask.

    Raises SequenceError where an input has an unknown name, or the model would look at padding.
    """
    plan, many = plan or Plan(), multiple_of(mesh, plan)
    tensors = {name: given for name, given in batch.items() if isinstance(given, Tensor)}
    dims = {name: of.sequence for name, of in zip(tensors, input_dims(list(tensors.items()), plan))}
    missing = {name: -tensors[name].shape[dim] % many for name, dim in dims.items() if dim is not None}
    lengths = {
        name: (tensors[name].shape[dim], tensors[name].shape[dim] + missing[name])
        for name, dim in dims.items()
        if dim is not None
    }
    found = dict(batch)
    if any(missing.values()):
        if pad_id is None:
            pad_id = getattr(getattr(model, "config", None), "pad_token_id", None)
        known = {**FILLS, **dict.fromkeys(IDS, pad_id or 0), **(fills or {})}
        for name, more in missing.items():
            dim = dims[name]
            assert dim is not None
            found[name] = _padded(name, tensors[name], dim, more, known) if more else tensors[name]
        if not causal:
            _mask(found, model, tensors, dims, missing)
    return PaddedBatch(found, lengths)


def _padded(name: str, tensor: Tensor, dim: int, more: int, known: Mapping[str, Fill]) -> Tensor:
    if name not in known and name not in POSITIONS:
        raise SequenceError(
            f"input '{name}' {list(tensor.shape)} lacks {more} positions (dim {dim}), and what they are filled with is "
            "not known\n"
            f"Way out: pad_batch(..., fills={{'{name}': 0}}); Plan(sequence_dims={{'{name}': None}}) if it has none."
        )
    shape = [more if d == dim else size for d, size in enumerate(tensor.shape)]
    if name in known:
        end = tensor.new_full(shape, known[name])
    else:
        last = tensor.narrow(dim, tensor.shape[dim] - 1, 1)
        steps = torch.arange(1, more + 1, dtype=tensor.dtype, device=tensor.device)
        end = last + steps.view([more if d == dim else 1 for d in range(tensor.dim())])
    return torch.cat([tensor, end], dim)


def _mask(
    found: dict[str, Any],
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    dims: Mapping[str, int | None],
    missing: Mapping[str, int],
) -> None:
    """Add the mask of what was padded, unless it is there."""
    padded = [name for name in missing if missing[name] and name not in ("labels", *POSITIONS)]
    masked = next((name for name in padded if name in MASKED), None)
    if not padded or tensors.get(MASK) is not None and dims[MASK] is not None:
        return
    accepted = inspect.signature(model.forward).parameters
    if masked is None and all(name.startswith("decoder_") for name in padded):
        return  # a decoder is causal
    given = tensors.get(MASK)
    why = (
        f"'{MASK}' {list(given.shape)} has no dim of positions that could be padded"
        if given is not None
        else f"{type(model).__name__}.forward takes no '{MASK}'"
        if MASK not in accepted
        else f"'{MASK}' is that of {' or '.join(MASKED)}"
        if masked is None
        else "with 'position_ids' alone a model may see several documents in a row, with a mask it does not"
        if POSITIONS[0] in tensors
        else ""
    )
    if why or masked is None:
        raise SequenceError(
            f"padding {', '.join(f'{name!r} by {missing[name]}' for name in padded)} could change the results, since "
            f"real positions might attend to it: {why}\n"
            "Way out: pad_batch(..., causal=True) if no position depends on later ones; or sequences that divide."
        )
    rows, length = tensors[masked].shape[0], tensors[masked].shape[1]
    mask = torch.ones(rows, length + missing[masked], dtype=torch.int64, device=tensors[masked].device)
    mask[:, length:] = 0
    found[MASK] = mask
