"""Where in the original safetensors files a rank's tensors are, for tools that read them there."""

from __future__ import annotations

from typing import Any

from autopar.errors import ExportError
from autopar.exporters.rank_module import Part, tensor_name
from autopar.exporters.whole_tensors import InFile, WholeTensors
from autopar.ir.layout import runs
from autopar.ir.node import Node, value
from autopar.ir.stacked_parameters import is_stacked, member_names
from autopar.ir.tables import Input, InputKind


def references(part: Part, tensors: WholeTensors) -> dict[str, dict[str, Any]]:
    """Name in the state -> the whole tensor's place in a file, and the rank's rows of each dim that is split.

    ``stack`` in place of it for one that is made of several tensors. Buffers that are in no file are left out. Raises
    ExportError for a parameter that is in no file.
    """
    found = {}
    for node, entry in part.program.placeholders(InputKind.PARAMETER, InputKind.BUFFER):
        places = _places(entry, value(node).shape, tensors)
        if places:
            found[tensor_name(entry)] = {**places, "slices": _slices(node, part)}
        elif entry.kind is InputKind.PARAMETER:
            raise ExportError(
                f"'{entry.target}' is in no safetensors file\n"
                "Way out: weights_from= the files that the model was loaded from; or weights='safetensors'."
            )
    return found


def _places(entry: Input, shape: tuple[int, ...], tensors: WholeTensors) -> dict[str, Any]:
    place = tensors.in_file(entry.names)
    if place is not None:
        return _place(place)
    if is_stacked(entry.target):
        members = [tensors.in_file((name,)) for name in member_names(entry.target, shape[0])]
        if None not in members:
            return {"stack": [_place(member) for member in members if member is not None]}
    return {}


def _place(place: InFile) -> dict[str, Any]:
    return {
        "file": str(place.path.absolute()),
        "tensor": place.name,
        "offset": place.offset,
        "bytes": place.size,
        "dtype": str(place.dtype).removeprefix("torch."),
    }


def _slices(node: Node, part: Part) -> dict[str, list[list[int]]]:
    layout = value(node).layout
    found = {}
    for dim in range(len(layout.shape)):
        owned = layout.indices(dim, part.coordinates, part.mesh)
        if owned is not None:
            found[str(dim)] = [[first, first + length] for first, length in runs(owned)]
    return found
