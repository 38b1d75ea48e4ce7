"""The buffers that a model computes whenever it is built: no state dict has them, so a program keeps them."""

from __future__ import annotations

from torch import Tensor, nn

from autopar.ir.program import AnyProgram
from autopar.ir.tables import InputKind


def made_buffers_of(model: nn.Module, program: AnyProgram) -> dict[str, Tensor]:
    """The buffers that ``program`` or its source takes and that the model computes whenever it is built, by name."""
    graphs = [program, *([program.source] if program.source is not None else [])]
    taken = {name for graph in graphs for _, entry in graph.takes(InputKind.BUFFER) for name in entry.names}
    found = {
        f"{path}.{key}" if path else key: module._buffers.get(key)
        for path, module in model.named_modules()
        for key in module._non_persistent_buffers_set
    }
    return {
        name: tensor.detach()
        for name, tensor in found.items()
        if name in taken and type(tensor) is Tensor and not tensor.is_meta
    }
