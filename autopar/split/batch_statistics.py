"""Batch normalisation of a batch that runs in several parts, one after the other."""

from __future__ import annotations

import torch

from autopar.errors import InvariantError
from autopar.ir.node import origin, value
from autopar.ir.program import Program
from autopar.ir.tables import OutputKind

aten = torch.ops.aten


def refuse_statistics(program: Program) -> None:
    """Raise InvariantError for batch norm in training: no split of one batch into several has its statistics.

    They may be those of each microbatch where the plan has said that of its loss.
    """
    count, found = program.plan.microbatches, _normalised(program)
    if count == 1 or not found or program.plan.microbatch_weights != "exact":
        return
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    raise InvariantError(
        f"'{found[0]}'{more} normalise by statistics of the batch; each of {count} microbatches has others, so that "
        "the step would not be that of the unmodified model\n"
        'Way out: Plan(microbatch_weights="statistics") for those of each microbatch, as in accumulating gradients by '
        "hand,\nnorms over features (LayerNorm, GroupNorm), BatchNorm in eval mode, or Plan(microbatches=1)."
    )


def _normalised(program: Program) -> list[str]:
    """The modules that normalise by statistics of the batch; ``instance_norm`` is a batch norm of one row."""
    updated = [entry.target for entry in program.outputs if entry.kind is OutputKind.BUFFER_UPDATE]
    names = [name.removesuffix(".running_mean") for name in updated if name.endswith("running_mean")]
    for node in program.graph.nodes:
        functional = node.target is aten._native_batch_norm_legit_functional.default and node.args[5]
        alone = node.target is aten._native_batch_norm_legit.no_stats
        if functional or (alone and value(node.args[0]).shape[0] > 1):
            names.append(origin(node).module or node.name)
    return list(dict.fromkeys(names))
