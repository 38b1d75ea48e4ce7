"""Seconds until the first training step of 4 ranks is done: compiled, out of the cache, from a program; DDP and FSDP2.

    python -m benchmarks.first_step
    python -m benchmarks.first_step --rounds 5 "hf:llama, 8 layers"

Each run is one process group of 4 gloo processes, one thread each, on dp=4 for all, which have imported what they need
and hold the same model on the same batch when the clock starts. It stops when the first step has its gradients. Each
round runs all of them, one after the other, in another order each time; the first launch of a round has an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import autopar
from autopar.zoo.named import Example, named_model
from benchmarks.launch import launched

RANKS, ROWS, LENGTH = 4, 8, 64
CASES: dict[str, dict[str, Any]] = {"hf:llama": {}, "hf:llama, 8 layers": {"num_hidden_layers": 8}, "hf:gpt2": {}}
COLD, WARM, STORED = "compiled", "from the cache", "from a program"
DDP, FSDP = "DDP", "FSDP2"
SIDES = (COLD, WARM, STORED, DDP, FSDP)


def example(case: str) -> Example:
    return named_model(case.partition(",")[0], CASES[case], ROWS, LENGTH)


def ready(model: nn.Module, side: str, program: str) -> nn.Module:
    """``model`` as the ranks of ``side`` call it."""
    if side == DDP:
        return DistributedDataParallel(model)
    if side == FSDP:
        for layers in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
            for layer in layers:
                fully_shard(layer)
        return fully_shard(model)
    if side == STORED:
        return autopar.parallelize(model, program=program)
    return autopar.parallelize(model, autopar.Mesh(dp=RANKS))


def first_step(case: str, side: str, program: str) -> dict[str, float]:
    """Seconds of wrapping the model and one step, and the mean of the ranks' losses."""
    given = example(case)
    ours = side not in (DDP, FSDP)
    autopar.parallelize(nn.Linear(4, 4), autopar.Mesh(dp=RANKS))  # joins the ranks, imports the runtime
    __import__("autopar.compiler")
    warm_up(ours)
    dist.barrier()
    start = time.perf_counter()
    model = ready(given.model, side, program)
    loss: Tensor = model(**(given.batch if ours else part(given.batch)))["loss"]
    loss.backward()
    dist.barrier()
    seconds = time.perf_counter() - start
    whole = loss.detach().clone()
    if not ours:
        dist.all_reduce(whole)
        whole /= RANKS
    return {"seconds": seconds, "loss": float(whole)}


def warm_up(ours: bool) -> None:
    """What torch does once in a process, for all sides: a mesh, a step of a small model of the peers."""
    if not ours:
        model = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (RANKS,)))
        model(torch.ones(2, 4)).sum().backward()


def part(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.chunk(RANKS)[dist.get_rank()] for name, tensor in batch.items()}


def worker(found: Path, case: str, side: str, program: str) -> None:
    result = first_step(case, side, program)
    if dist.get_rank() == 0:
        found.write_text(json.dumps(result))
    dist.destroy_process_group()


def measured(case: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by side."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        given, program, cache = example(case), f"{folder}/program", f"{folder}/cache"
        autopar.compile_program(given.model, autopar.Mesh(dp=RANKS), None, (), given.batch).save(program)
        for number in range(rounds):
            shutil.rmtree(cache, ignore_errors=True)
            others = [STORED, DDP, FSDP]
            for side in (COLD, WARM, *others[number % 3 :], *others[: number % 3]):
                result = launched("benchmarks.first_step", RANKS, [case, side, program], {"AUTOPAR_CACHE": cache})
                seconds[side].append(result["seconds"])
                losses.append(result["loss"])
    assert max(losses) - min(losses) < 1e-3 * max(losses), losses  # DDP's is a mean of the ranks' means
    return seconds


def table_of(found: dict[str, dict[str, list[float]]], load: Sequence[float]) -> Table:
    title = f"seconds to the first step of {RANKS} ranks; load {load[0]:.0f}, {load[1]:.0f}, {load[2]:.0f}"
    table = Table("model", *SIDES, f"{WARM} / {DDP}", title=title, title_justify="left")
    for case, seconds in found.items():
        medians = {side: statistics.median(times) for side, times in seconds.items()}
        ratio = statistics.median(warm / ddp for warm, ddp in zip(seconds[WARM], seconds[DDP]))
        table.add_row(case, *(f"{medians[side]:.2f}" for side in SIDES), f"{ratio:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_step", description=str(__doc__).splitlines()[0])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("rest", nargs="*", metavar="CASE", help=", ".join(CASES))
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker, *given.rest)
        return
    found = {case: measured(case, given.rounds) for case in given.rest or CASES}
    Console(width=120).print(table_of(found, os.getloadavg()))


if __name__ == "__main__":
    main()
