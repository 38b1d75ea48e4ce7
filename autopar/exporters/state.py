"""The weights of a part: its share of each whole parameter and buffer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopar.exporters.job import Job
from autopar.exporters.rank_module import Part, part_of, tensor_name
from autopar.ir.node import value
from autopar.ir.tables import Input, InputKind


def weights_of(part: Part, job: Job) -> dict[str, Tensor]:
    """By name; on the meta device where the files get no weights. Raises ExportError for one that was not given.

    With references into other files, buffers that are in none of these have their data.
    """
    found: dict[str, Tensor] = {}
    for node, entry in part.program.placeholders(InputKind.PARAMETER, InputKind.BUFFER):
        kind = value(node)
        if not _has_data(job, entry):
            tensor = torch.empty(kind.layout.local_shape(part.mesh), dtype=kind.dtype, device="meta")
        else:
            assert job.tensors is not None
            whole = job.tensors.find(entry.names, kind.shape)
            tensor = part_of(whole, node, part).to(kind.dtype).contiguous().clone()
        is_parameter = entry.kind is InputKind.PARAMETER
        found[tensor_name(entry)] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
    return found


def _has_data(job: Job, entry: Input) -> bool:
    if job.tensors is None or job.weights == "none":
        return False
    return job.weights == "safetensors" or (
        entry.kind is InputKind.BUFFER and job.tensors.in_file(entry.names) is None and job.tensors.has(entry.names)
    )
