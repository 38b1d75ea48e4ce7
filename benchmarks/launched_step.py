"""A script as users have it, which ``python -m benchmarks.first_step --whole`` starts: one step of one side.

It imports what its side needs and no more, reads the model and its batch, and writes the seconds since the launch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launched_step", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--worker", metavar="FILE", help="what rank 0 writes")
    parser.add_argument("--launched", type=float, help="the monotonic clock when torchrun was started")
    parser.add_argument("--side", choices=("autopar", "DDP", "FSDP2"))
    parser.add_argument("--example", help="file of the model and its batch, by torch.save")
    parser.add_argument("--program", help="directory of a program, or the cache decides")
    given = parser.parse_args()
    model, batch = torch.load(given.example, weights_only=False)
    if given.side == "autopar":
        import autopar

        mesh = None if given.program else autopar.Mesh(dp=int(os.environ["WORLD_SIZE"]))
        model = autopar.parallelize(model, mesh, program=given.program)
    else:
        dist.init_process_group("gloo")
        batch = {name: tensor.chunk(dist.get_world_size())[dist.get_rank()] for name, tensor in batch.items()}
        model = wrapped(model, given.side)
    loss: Tensor = model(**batch)["loss"]
    loss.backward()
    processor = time.process_time()
    dist.barrier()
    found = {"seconds": time.clock_gettime(time.CLOCK_MONOTONIC) - given.launched, "processor": processor}
    whole = loss.detach().clone()
    if given.side != "autopar":
        dist.all_reduce(whole)
        whole /= dist.get_world_size()
    if dist.get_rank() == 0:
        Path(given.worker).write_text(json.dumps({**found, "loss": float(whole)}))
    dist.destroy_process_group()


def wrapped(model: nn.Module, side: str) -> Any:
    if side == "DDP":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layers in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for layer in layers:
            fully_shard(layer)
    return fully_shard(model)


if __name__ == "__main__":
    main()
