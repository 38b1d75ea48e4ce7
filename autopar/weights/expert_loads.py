"""The load of the experts, put together from what each rank has noted; collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import fx

from autopar.communication.communicator import Communicator
from autopar.ir.load import ExpertLoad, tallies
from autopar.mesh import PIPELINE


def gathered_loads(comm: Communicator, graphs: Sequence[fx.Graph]) -> dict[str, ExpertLoad]:
    """Layer -> its load since the last call, on every rank. ``graphs``: those that ranks run."""
    known = tallies([node for graph in graphs for node in graph.nodes])
    found = {}
    for layer in sorted(comm.noted):  # in one order on all ranks of a stage
        counts = comm.exchange(comm.noted[layer], known[layer].axis)
        found[layer] = known[layer].load(comm.mesh, counts.squeeze(1).cpu())
    comm.noted.clear()
    stages = comm.group(PIPELINE) if PIPELINE in comm.mesh.names else None
    if stages is None:
        return found
    of_stages: list[dict[str, ExpertLoad]] = [{}] * stages.size()
    dist.all_gather_object(of_stages, found, group=stages)
    return {layer: load for loads in of_stages for layer, load in loads.items()}
