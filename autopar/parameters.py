"""Parameters as DTensors: cut from whole tensors, and in state dicts always in the model's own order.

A part that is contiguous is DTensor's ``Shard(dim)``. One that is not (the rank's heads of a fused QKV weight) is
stored as ``Shard(dim)`` of a *permuted* tensor; state dicts undo the permutation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from autopar.connect import Connection
from autopar.errors import IndivisibleError
from autopar.layout import Layout, shard
from autopar.mesh import Mesh
from autopar.torch_dtensor import dtensor, local_of


@dataclass(frozen=True)
class Stored:
    """How a tensor of some layout is held: as DTensor ``placements`` of a tensor permuted along some dims.

    ``orders``: dim -> for each stored position its index in the model's own order.
    """

    layout: Layout
    placements: tuple[Placement, ...]
    orders: tuple[tuple[int, Tensor], ...] = ()

    def to_model(self, whole: Tensor) -> Tensor:
        for dim, order in self.orders:
            whole = whole.index_select(dim, order.argsort().to(whole.device))
        return whole

    def to_stored(self, whole: Tensor) -> Tensor:
        for dim, order in self.orders:
            whole = whole.index_select(dim, order.to(whole.device))
        return whole


def stored(layout: Layout, mesh: Mesh, name: str) -> Stored:
    """How ranks hold a tensor of ``layout``. Raises IndivisibleError where DTensor has no such uneven parts."""
    placements: list[Placement] = [Replicate() for _ in mesh.axes]
    orders: list[tuple[int, Tensor]] = []
    for dim, factors in enumerate(layout.dims):
        owning = [axis for axis in mesh.names if any(axis in factor.axes for factor in factors)]
        if not owning:
            continue
        for axis in owning:
            placements[mesh.names.index(axis)] = Shard(dim)
        size = layout.shape[dim]
        places = itertools.product(*(range(mesh.size(axis)) for axis in owning))
        parts = [layout.indices(dim, dict(zip(owning, place)), mesh) for place in places]
        owned = [part for part in parts if part is not None]
        if [len(part) for part in owned] != list(_chunks(size, [mesh.size(axis) for axis in owning])):
            raise IndivisibleError(
                f"{name}: dim {dim} of {size} elements cannot be stored as {layout} on {mesh}; a DTensor gives every "
                f"rank but the last ones equally many.\nWay out: a mesh whose axes {owning} divide {size}."
            )
        order = torch.cat(owned)
        if not torch.equal(order, torch.arange(size)):
            orders.append((dim, order))
    return Stored(layout, tuple(placements), tuple(orders))


def _chunks(size: int, ways: list[int]) -> Iterator[int]:
    """Sizes of DTensor's parts when a dim is split over several axes, one after the other."""
    if not ways:
        yield size
        return
    part = -(-size // ways[0])
    for position in range(ways[0]):
        yield from _chunks(max(0, min(part, size - position * part)), ways[1:])


def cut(whole: Tensor, form: Stored, connection: Connection) -> DTensor:
    """The DTensor of this rank's part of ``whole`` (model order); a meta tensor stays meta."""
    comm = connection.comm
    local = shard(whole.detach(), form.layout, connection.mesh, comm.coordinates)
    if local.shape != whole.shape or not local.is_contiguous():
        local = local.clone(memory_format=torch.contiguous_format)  # do not keep the whole tensor alive
    return dtensor(local, connection.device_mesh, _fitting(form, connection.device_mesh), whole.shape)


def _fitting(form: Stored, device_mesh: DeviceMesh) -> tuple[Placement, ...]:
    return form.placements or tuple(Replicate() for _ in range(device_mesh.ndim))


def whole_of(tensor: Tensor, form: Stored | None) -> Tensor:
    """The whole tensor in the model's order; collective."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return form.to_model(whole) if form is not None else whole


def in_model_order(tensor: DTensor, form: Stored) -> DTensor:
    """For state dicts: placed alike, but contiguous parts of the model's order; collective where that differs."""
    if not form.orders:
        return tensor
    whole = form.to_model(tensor.full_tensor())
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


def in_stored_order(value: Tensor, like: DTensor, form: Stored) -> DTensor:
    """From a state dict: a whole tensor, or a DTensor of the model's order on any placements, as ``like`` is held."""
    if isinstance(value, DTensor) and not form.orders and value.device_mesh == like.device_mesh:
        return value.redistribute(placements=like.placements)
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    whole = form.to_stored(whole.to(like.device))
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


class Weights:
    """The parameters (and split buffers) of a module tree as DTensors, in place, under their own names.

    ``layouts`` is None until :meth:`split` has said how they lie; until then every rank holds them whole.
    """

    def __init__(self, root: nn.Module, connection: Connection) -> None:
        self.root, self.connection = root, connection
        self.layouts: dict[str, Layout] | None = None
        self._forms: dict[nn.Module, dict[str, Stored]] = {}  # module -> key in it -> form

    def hold(self) -> None:
        """Every parameter becomes a DTensor that is whole on every rank; nothing is copied."""
        self._place({})

    def split(self, layouts: Mapping[str, Layout]) -> None:
        """Each rank keeps its part. A parameter that is a DTensor stays the same object, so an optimizer keeps it."""
        assert self.layouts is None, "the parameters are split already"
        self._place(layouts)
        self.layouts = dict(layouts)

    def form(self, module: nn.Module, key: str) -> Stored | None:
        return self._forms.get(module, {}).get(key)

    def _place(self, layouts: Mapping[str, Layout]) -> None:
        placed: dict[int, Tensor] = {}
        for module, table, key, name in tables(self.root):
            tensor = table[key]
            layout = layouts.get(name, Layout.whole(tensor.shape))
            if not isinstance(tensor, nn.Parameter) and not layout.axes:
                continue  # a whole buffer stays an ordinary tensor
            form = stored(layout, self.connection.mesh, name)
            self._forms_of(module)[key] = form
            if id(tensor) not in placed:
                result = self._placed(tensor, form)
                placed[id(tensor)] = placed[id(result)] = result
            table[key] = placed[id(tensor)]

    def _placed(self, tensor: Tensor, form: Stored) -> Tensor:
        held: Tensor = cut(local_of(tensor), form, self.connection)
        if not isinstance(tensor, nn.Parameter):
            return held
        held = nn.Parameter(held, requires_grad=tensor.requires_grad)
        if not isinstance(tensor, DTensor):
            return held
        torch.utils.swap_tensors(tensor, held)  # type: ignore[no-untyped-call]
        return tensor

    def _forms_of(self, module: nn.Module) -> dict[str, Stored]:
        if module not in self._forms:
            self._forms[module] = {}
            module.register_state_dict_post_hook(self._saving)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(self._loading)  # type: ignore[no-untyped-call]
        return self._forms[module]

    def _saving(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key, form in self._forms[module].items():
            value = state.get(prefix + key)
            if isinstance(value, DTensor):
                state[prefix + key] = in_model_order(value, form)

    def _loading(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key, form in self._forms[module].items():
            value, held = state.get(prefix + key), module._parameters.get(key, module._buffers.get(key))
            if isinstance(value, Tensor) and isinstance(held, DTensor) and value.shape == held.shape:
                state[prefix + key] = in_stored_order(value, held, form)


Table = dict[str, Any]  # the parameters, or the buffers, of one module


def tables(root: nn.Module) -> Iterator[tuple[nn.Module, Table, str, str]]:
    """(module, its table, key in the table, full name) of every parameter and buffer, under each of its names."""
    for path, module in root.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    yield module, table, key, f"{path}.{key}" if path else key


@contextmanager
def traceable(root: nn.Module) -> Iterator[None]:
    """Ordinary tensors in place of DTensors: the data of those that are whole here, meta tensors for the others."""
    replaced: list[tuple[Table, str, Tensor]] = []
    made: dict[int, Tensor] = {}
    for _, table, key, _ in tables(root):
        tensor = table[key]
        if isinstance(tensor, DTensor):
            replaced.append((table, key, tensor))
            if id(tensor) not in made:
                made[id(tensor)] = _ordinary(tensor)
            table[key] = made[id(tensor)]
    try:
        yield
    finally:
        for table, key, tensor in replaced:
            table[key] = tensor


def _ordinary(tensor: DTensor) -> Tensor:
    whole = all(placement.is_replicate() for placement in tensor.placements)
    plain = local_of(tensor) if whole else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(plain, requires_grad=tensor.requires_grad) if is_parameter else plain
