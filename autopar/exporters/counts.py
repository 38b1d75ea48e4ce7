"""``counts.pt2``: what one microbatch contributes to the sums over the whole batch that weigh its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import ExportError
from autopar.exporters.job import Job
from autopar.exporters.rank_module import plain_name
from autopar.ir.node import value
from autopar.ir.program import PipelinedProgram
from autopar.ir.tables import InputKind
from autopar.ir.torch_export import export_as_run
from autopar.pipeline import microbatches

FILE = "counts.pt2"


class _Counts(nn.Module):
    """The summands of a whole microbatch, of those inputs that they are made of."""

    def __init__(self, program: PipelinedProgram, held: dict[str, Tensor]) -> None:
        super().__init__()
        assert program.counts is not None
        self._program, self._names = program, {name: f"held_{number}" for number, name in enumerate(held)}
        for name, tensor in held.items():
            self.register_buffer(self._names[name], tensor)
        self._needed = [bool(node.users) for node, _ in program.counts.placeholders(InputKind.INPUT)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        inputs: list[Any] = [next(given) if needed else None for needed in self._needed]
        held = {name: getattr(self, own) for name, own in self._names.items()}
        return tuple(microbatches.counts(self._program, inputs, held, 1.0))


def write_counts(job: Job, program: PipelinedProgram) -> dict[str, Any]:
    """The manifest's entry: the inputs of the file, whole, and the names under which stages take the sums.

    The file is left out where nothing is counted. Raises ExportError where weights are needed that are not given.
    """
    counted = program.counts
    if counted is None:
        return {"inputs": [], "outputs": []}
    if any(node.users for node, _ in counted.placeholders(InputKind.WHOLE)):
        raise ExportError(
            "a mean of the inputs over the whole batch is taken before the loss, and a file knows one microbatch\n"
            "Way out: Plan(microbatches=1), or that mean as an input of the model."
        )
    held = dict(counted.constants)
    for node, entry in counted.placeholders(InputKind.BUFFER):
        if node.users and job.tensors is None:
            raise ExportError(
                f"the loss of a microbatch is weighed by buffer '{entry.target}', which the export is not given\n"
                "Way out: autopar.export(..., weights_from=model)."
            )
        if node.users and job.tensors is not None:
            held[entry.target] = job.tensors.find(entry.names, value(node).shape)
    taken = [(node, entry) for node, entry in counted.placeholders(InputKind.INPUT) if node.users]
    module = _Counts(program, held)
    examples = [torch.ones(value(node).shape, dtype=value(node).dtype) for node, _ in taken]
    job.told(f"writing {FILE}")
    with torch.no_grad():
        exported = export_as_run(module, tuple(examples))
    torch.export.save(exported, job.directory / FILE)
    return {
        "file": FILE,
        "inputs": [plain_name(entry.target) for _, entry in taken],
        "outputs": [str(number) for number in range(len(counted.outputs))],
    }
