"""Resident memory of a rank after ten steps, beyond that of the same rank before the model was made, against DDP.

    python -m benchmarks.process_size

Each side runs in processes of its own, which have all imported autopar: the difference is what compiling leaves, or
what a launch has that finds its program in the cache ("warm").
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import autopar
from benchmarks.contenders import RATE, loss_of
from benchmarks.launch import launched
from benchmarks.process_memory import resident
from benchmarks.subjects import SUBJECTS, Subject

MODULE = "benchmarks.process_size"
STEPS = 10
MB = 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, default="hf-llama-256")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--side", choices=("autopar", "ddp"), help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is a rank; rank 0 writes there
    options = parser.parse_args(arguments)
    if options.worker:
        _work(SUBJECTS[options.model], options.side, options.worker)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        caches = {"autopar": "0", "cold": folder, "warm": folder, "ddp": "0"}
        for name, cache in caches.items():
            arguments = ["--model", options.model, "--side", "ddp" if name == "ddp" else "autopar"]
            found = launched(MODULE, options.ranks, arguments, {"AUTOPAR_CACHE": cache})
            print(f"{name:8}{found / MB:8.1f} MB", flush=True)
    return 0


def _work(subject: Subject, side: str, found: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model, batch = subject.build(), subject.batch(0)
    start = resident()
    if side == "autopar":
        mesh = autopar.Mesh(dp=dist.get_world_size())
        parallel: nn.Module = autopar.parallelize(model, mesh, example_inputs=batch)
    else:
        parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=RATE)
    for _ in range(STEPS):
        loss_of(parallel(**batch)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        found.write_text(json.dumps(resident() - start))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
