"""Parameters as DTensors: cut from whole tensors, and in state dicts always in the model's own order.

A part that is contiguous is DTensor's ``Shard(dim)``. The rank's heads of a fused QKV weight are not: three equal parts
are a strided shard, others (grouped-query heads) are stored as ``Shard(dim)`` of a *permuted* tensor. State dicts have
contiguous parts of the model's own order in either case.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from autopar.errors import IndivisibleError
from autopar.ir.layout import Factor, Layout, runs, shard
from autopar.mesh import Mesh
from autopar.runtime.connect import Connection
from autopar.runtime.dtensor import contiguous, dtensor, local_of, strided

Table = dict[str, Any]  # the parameters, or the buffers, of one module


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
    placements: list[Placement] = [Replicate() for _ in mesh.axes] or [Replicate()]
    orders: list[tuple[int, Tensor]] = []
    for dim, factors in enumerate(layout.dims):
        try:
            blocks, order = _dim_form(factors, mesh)
        except IndivisibleError as problem:
            raise IndivisibleError(f"'{name}' as {layout} on {mesh}: {problem}") from None
        for axis, count in blocks:
            placements[mesh.names.index(axis)] = strided(dim, count)
        if order is not None:
            orders.append((dim, order))
    return Stored(layout, tuple(placements), tuple(orders))


@lru_cache(maxsize=1024)
def _dim_form(factors: tuple[Factor, ...], mesh: Mesh) -> tuple[tuple[tuple[str, int], ...], Tensor | None]:
    """(axis, blocks) of the placements that give every rank its part of a dim, and the stored order (None: its own)."""
    owning = [axis for axis in mesh.names if any(axis in factor.axes for factor in factors)]
    if not owning or len(factors) == 1 and factors[0].axes == tuple(owning) and factors[0].ratio == (1,):
        return tuple((axis, 1) for axis in owning), None
    layout = Layout((factors,))
    ways = [mesh.size(axis) for axis in owning]
    places = list(itertools.product(*map(range, ways)))
    found = [layout.indices(0, dict(zip(owning, place)), mesh) for place in places]
    owned = [own for own in found if own is not None]
    pieces = max(1, len(runs(owned[0])))
    counts = {1, pieces, *ways, *(pieces * way for way in ways)}
    for blocks in itertools.product(sorted(counts), repeat=len(owning)):
        given = [owned_positions(layout.shape[0], place, ways, blocks) for place in places]
        if all(map(torch.equal, owned, given)):
            return tuple(zip(owning, blocks)), None
    one = [1] * len(owning)
    if [len(own) for own in owned] != [len(owned_positions(layout.shape[0], place, ways, one)) for place in places]:
        raise IndivisibleError(
            f"{layout.shape[0]} elements give the ranks uneven parts; in a DTensor only the last ranks have fewer\n"
            f"Way out: a mesh whose {' x '.join(owning)} divides {layout.shape[0]}."
        )
    return tuple((axis, 1) for axis in owning), torch.cat(owned)


def owned_positions(size: int, place: Sequence[int], ways: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """The indices that DTensor gives to ``place``: one axis after the other cuts what the ones before it left."""
    own = torch.arange(size)
    for position, way, count in zip(place, ways, blocks):
        pieces = own.split(max(1, -(-len(own) // (way * count))))  # type: ignore[no-untyped-call]
        own = torch.cat([own[:0], *pieces[position::way]])
    return own


def cut(whole: Tensor, form: Stored, connection: Connection) -> DTensor:
    """The DTensor of this rank's part of ``whole`` (model order); a meta tensor stays meta."""
    comm = connection.comm
    local = shard(whole.detach(), form.layout, connection.mesh, comm.coordinates)
    if local.shape != whole.shape or not local.is_contiguous():
        local = local.clone(memory_format=torch.contiguous_format)  # do not keep the whole tensor alive
    return dtensor(local, connection.device_mesh, form.placements, whole.shape)


def in_model_order(tensor: DTensor, form: Stored) -> DTensor:
    """For state dicts: contiguous parts of the model's order on the same axes; collective where that differs."""
    placements = tuple(map(contiguous, form.placements))
    if not form.orders and placements == form.placements:
        return tensor
    whole = form.to_model(tensor.full_tensor())
    return distribute_tensor(whole, tensor.device_mesh, placements, src_data_rank=None)


def in_stored_order(value: Tensor, like: DTensor, form: Stored) -> DTensor:
    """From a state dict: a whole tensor, or a DTensor of the model's order on any placements, as ``like`` is held."""
    if isinstance(value, DTensor) and not form.orders and value.device_mesh == like.device_mesh:
        return value.redistribute(placements=like.placements)
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    whole = form.to_stored(whole.to(like.device))
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@dataclass(frozen=True)
class Absent:
    """A parameter or buffer that only other pipeline stages hold; ``outline`` is a meta tensor like it. ``emptied``:
    what it was, of which an optimizer made before the cut still has the (now empty) parameter."""

    table: Table
    key: str
    name: str
    outline: Tensor
    emptied: Tensor | None


def _skip(key: str, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    state.pop(prefix + key, None)


class Weights:
    """The parameters (and split buffers) of a module tree as DTensors, in place, under their own names.

    ``layouts`` is None until :meth:`split` has said how they lie; until then every rank holds them whole, uncopied.
    """

    def __init__(self, root: nn.Module, connection: Connection) -> None:
        self.root, self.connection = root, connection
        self.layouts: dict[str, Layout] | None = None
        self.absent: list[Absent] = []
        self._forms: dict[nn.Module, dict[str, Stored]] = {}  # module -> key in it -> form
        if any(isinstance(table[key], DTensor) for _, table, key, _ in tables(root)):
            raise ValueError("the model has DTensor parameters already: parallelize an ordinary model, and that once")
        self._place({})

    def split(self, layouts: Mapping[str, Layout], elsewhere: Set[str] = frozenset()) -> None:
        """Each rank keeps its part. A parameter that is a DTensor stays the same object, so an optimizer keeps it.

        ``elsewhere``: names of what other pipeline stages hold; the module has them no more, an optimizer skips them.
        """
        assert self.layouts is None, "the parameters are split already"
        self._leave_out(elsewhere)
        self._place(layouts)
        self.layouts = dict(layouts)

    def _leave_out(self, names: Set[str]) -> None:
        mesh = self.connection.mesh
        outlines: dict[int, Tensor] = {}  # tied tensors stay tied
        for module, table, key, name in list(tables(self.root)):
            if name not in names:
                continue
            tensor, table[key] = table[key], None
            if id(tensor) not in outlines:
                outlines[id(tensor)] = outline(tensor)
                if isinstance(tensor, DTensor):  # whoever still has it, an optimizer, holds no memory by it
                    nothing = cut(local_of(tensor).new_empty(0), stored(Layout.whole([0]), mesh, name), self.connection)
                    held = nn.Parameter(nothing, requires_grad=tensor.requires_grad)
                    torch.utils.swap_tensors(tensor, held)  # type: ignore[no-untyped-call]
            emptied = tensor if isinstance(tensor, DTensor) else None
            self.absent.append(Absent(table, key, name, outlines[id(tensor)], emptied))
            module.register_load_state_dict_pre_hook(partial(_skip, key))  # type: ignore[no-untyped-call]

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole, in the model's order, of a tensor that is held as parameter ``name`` is (its gradient, a moment of
        the optimizer); collective."""
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        form = self.form(name)
        return form.to_model(full) if form else full

    def form(self, name: str) -> Stored | None:
        """How the tensor called ``name`` is held; None for a buffer that is an ordinary tensor."""
        module, _, key = name.rpartition(".")
        return self._forms.get(self.root.get_submodule(module), {}).get(key)

    def _place(self, layouts: Mapping[str, Layout]) -> None:
        placed: dict[int, Tensor] = {}
        for module, table, key, name in tables(self.root):
            tensor = table[key]
            layout = layouts.get(name, Layout.whole(tensor.shape))
            if not isinstance(tensor, nn.Parameter) and not layout.axes:
                if not tensor.is_meta:
                    table[key] = tensor.to(self.connection.comm.device)  # a whole buffer stays an ordinary tensor
                continue
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
            _translate_state(module, self._forms[module])
        return self._forms[module]


def _translate_state(module: nn.Module, forms: dict[str, Stored]) -> None:
    """Let state dicts of ``module`` have the model's order; ``forms`` are those of its own tensors."""

    def saving(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key, form in forms.items():
            value = state.get(prefix + key)
            if isinstance(value, DTensor):
                state[prefix + key] = in_model_order(value, form)

    def loading(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key, form in forms.items():
            value, held = state.get(prefix + key), module._parameters.get(key, module._buffers.get(key))
            if isinstance(value, Tensor) and isinstance(held, DTensor) and value.shape == held.shape:
                state[prefix + key] = in_stored_order(value, held, form)

    module.register_state_dict_post_hook(saving)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(loading)  # type: ignore[no-untyped-call]


def tables(root: nn.Module) -> Iterator[tuple[nn.Module, Table, str, str]]:
    """(module, its table, key in the table, full name) of every parameter and buffer, under each of its names."""
    for path, module in root.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    yield module, table, key, f"{path}.{key}" if path else key


@contextmanager
def traceable(root: nn.Module, absent: Sequence[Absent] = ()) -> Iterator[None]:
    """Ordinary tensors in place of DTensors: the data of those that are whole here, meta tensors for the others, and
    for those that are ``absent``."""
    replaced: list[tuple[Table, str, Tensor | None]] = []
    made: dict[int, Tensor] = {}
    for _, table, key, _ in tables(root):
        tensor = table[key]
        if isinstance(tensor, DTensor):
            replaced.append((table, key, tensor))
            if id(tensor) not in made:
                made[id(tensor)] = _ordinary(tensor)
            table[key] = made[id(tensor)]
    for missing in absent:
        replaced.append((missing.table, missing.key, None))
        missing.table[missing.key] = missing.outline
    try:
        yield
    finally:
        for table, key, tensor in replaced:
            table[key] = tensor


def _ordinary(tensor: DTensor) -> Tensor:
    if not all(placement.is_replicate() for placement in tensor.placements):
        return outline(tensor)
    plain = local_of(tensor)
    return nn.Parameter(plain, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain


def outline(tensor: Tensor) -> Tensor:
    """A meta tensor like ``tensor``, a parameter if it is one."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(plain, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain
