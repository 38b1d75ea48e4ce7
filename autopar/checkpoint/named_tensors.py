"""The tensors of a model under the names of its state dict, as the slices that this rank holds.

On a pipeline, a rank holds the tensors of its stages, and knows names, shapes and dtypes of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.dtensors.dtensor import local_of
from autopar.dtensors.piecewise import dtensor
from autopar.dtensors.slices import Slices, slices_of
from autopar.ir.stacked_parameters import is_stacked, member_names
from autopar.mesh import PIPELINE
from autopar.module import held_by
from autopar.weights.absent import Table
from autopar.weights.parameters import Weights


@dataclass(frozen=True)
class Named:
    """A parameter or buffer: its first name, all its names (tied ones have several), and the tensor or its outline.

    Attributes:
        outline: a meta tensor like one that only other pipeline ranks hold; None for one that this rank holds.
        first: of an ordinary tensor on a rank of a pipeline, and whether it is on the first rank that holds it; of a
            DTensor, whether it is on the first pipeline rank that does. None where there is no pipeline.
        member: the number of a parameter of the model that is held in a stack (``weights/stacks.py``); ``tensor`` is
            the stack then.
    """

    names: tuple[str, ...]
    persistent: bool
    places: tuple[tuple[Table, str], ...]
    outline: Tensor | None = None
    first: bool | None = None
    member: int | None = None

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape if self.member is None else self.tensor.shape[1:]

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.tensor.itemsize

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def tensor(self) -> Tensor:
        table, key = self.places[0]
        return table[key] if self.outline is None else self.outline

    @property
    def held(self) -> bool:
        """Whether this rank's pipeline stages have it."""
        return self.outline is None

    @property
    def slices(self) -> Slices:
        found = slices_of(self.tensor)
        found = found if self.member is None else found.at(self.member)
        if self.first is None:
            return found
        return replace(found, first=self.first and (found.first or not isinstance(self.tensor, DTensor)))


def named_tensors(model: nn.Module) -> list[Named]:
    """Every parameter and buffer that this rank holds, once, in the order of the state dict."""
    return [entry for entry in every_tensor(model) if entry.held]


def every_tensor(model: nn.Module) -> list[Named]:
    """Every parameter and buffer of the unmodified model once, in the order of the state dict."""
    found: list[Named] = []
    for entry in every_held(model):
        names = member_names(entry.name, entry.tensor.shape[0]) if is_stacked(entry.name) else ()
        found += [replace(entry, names=(name,), member=number) for number, name in enumerate(names)] or [entry]
    return found


def every_held(model: nn.Module) -> list[Named]:
    """Every parameter and buffer that the module has once, one for each stack, in the order of the state dict."""
    weights = held_by(model).weights
    absent = {(id(one.table), one.key): one.outline for one in weights.absent}
    found: dict[int, Named] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key, held in table.items():
                outline = absent.get((id(table), key)) if held is None else None
                tensor = held if outline is None else outline
                if tensor is None:
                    continue
                name, before = f"{path}.{key}" if path else key, found.get(id(tensor))
                keeps = table is module._parameters or key not in module._non_persistent_buffers_set
                found[id(tensor)] = Named(
                    (*before.names, name) if before else (name,),
                    keeps or bool(before and before.persistent),
                    (*before.places, (table, key)) if before else ((table, key),),
                    outline,
                    _is_first(weights, name, tensor) if outline is None else None,
                )
    return list(found.values())


def emptied(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names, and what an optimizer made before the stages were cut has in place of parameters of other ranks."""
    for missing in held_by(model).weights.absent:
        if missing.emptied is not None:
            yield missing.name, missing.emptied


def _is_first(weights: Weights, name: str, tensor: Tensor) -> bool | None:
    """See :attr:`Named.first`."""
    if weights.connection is None or not weights.connection.mesh.is_pipelined:
        return None
    here = weights.connection.comm.coordinates
    if here[PIPELINE] != weights.first.get(name, 0):
        return False
    return isinstance(tensor, DTensor) or not any(place for axis, place in here.items() if axis != PIPELINE)


def home_of(model: nn.Module) -> torch.device:
    """The device for tensors of ``model`` that have none yet."""
    connection = held_by(model).weights.connection
    return connection.comm.device if connection else torch.device("cpu")


def materialise(model: nn.Module, entries: list[Named]) -> None:
    """Memory, with nothing in it yet, for those of ``entries`` that are on the meta device."""
    device = home_of(model)
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
