"""The tensors of a model under the names that its state dict has, as the slices that this rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.module import ParallelModule
from autopar.parameters import Stored, Table, tables
from autopar.slices import Slices, slices_of
from autopar.torch_dtensor import dtensor, local_of


@dataclass(frozen=True)
class Named:
    """A parameter or buffer: its first name, all its names (tied ones have several), and where it is held."""

    names: tuple[str, ...]
    form: Stored | None
    persistent: bool
    places: tuple[tuple[Table, str], ...]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def tensor(self) -> Tensor:
        table, key = self.places[0]
        return table[key]  # type: ignore[no-any-return]

    @property
    def slices(self) -> Slices:
        return slices_of(self.tensor, self.form)


def named_tensors(model: nn.Module) -> list[Named]:
    """Every parameter and buffer once, in the order of the state dict."""
    weights = model._weights if isinstance(model, ParallelModule) else None
    found: dict[int, Named] = {}
    for module, table, key, name in tables(model):
        before = found.get(id(table[key]))
        keeps = table is module._parameters or key not in module._non_persistent_buffers_set
        found[id(table[key])] = Named(
            (*before.names, name) if before else (name,),
            weights.form(name) if weights else None,
            keeps or bool(before and before.persistent),
            (*before.places, (table, key)) if before else ((table, key),),
        )
    return list(found.values())


def settled(model: nn.Module) -> bool:
    """Whether it is known what part of each parameter this rank holds."""
    return not isinstance(model, ParallelModule) or model._weights is None or model._weights.layouts is not None


def materialise(model: nn.Module, entries: list[Named]) -> None:
    """Memory, with nothing in it yet, for those of ``entries`` that are on the meta device."""
    connection = model._connection if isinstance(model, ParallelModule) else None
    device = connection.comm.device if connection else torch.device("cpu")
    for entry in entries:
        tensor = entry.tensor
        if not local_of(tensor).is_meta:
            continue
        empty: Tensor = torch.empty_like(local_of(tensor).detach(), device=device)
        if isinstance(tensor, DTensor):
            empty = dtensor(empty, tensor.device_mesh, tensor.placements, tensor.shape)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            torch.utils.swap_tensors(tensor, empty)  # type: ignore[no-untyped-call]  # so that an optimizer keeps it
        else:
            for table, key in entry.places:
                table[key] = empty
