"""Seconds until the first training step of 4 ranks is done: compiled, out of the cache, from a program; DDP and FSDP2.

    python -m benchmarks.first_step
    python -m benchmarks.first_step --rounds 5 "hf:llama, 8 layers"
    python -m benchmarks.first_step --whole        from the start of torchrun on, with what each rank imports

Each run is one process group of 4 gloo processes, one thread each, on dp=4 for all, which have imported what they need
and hold the same model on the same batch when the clock starts. It stops when the first step has its gradients. The
processes are forked off one that has imported all, so that a run takes two seconds and not ten; memory that they would
share with it, which a launched process does not, is copied before the clock starts. Each round runs all sides, one
after the other, in another order each time; the first launch of a round has an empty cache. Beside the clock stand the
processor seconds of rank 0, which other work on the machine changes less. With ``--whole`` torchrun starts the ranks,
whose scripts import what their side needs (:mod:`benchmarks.launched_step`), and both figures count from there: what a
user waits for.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
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
from benchmarks import launch

RANKS, ROWS, LENGTH = 4, 8, 64
CASES: dict[str, dict[str, Any]] = {"hf:llama": {}, "hf:llama, 8 layers": {"num_hidden_layers": 8}, "hf:gpt2": {}}
COLD, WARM, STORED = "compiled", "from the cache", "from a program"
DDP, FSDP = "DDP", "FSDP2"
SIDES = (COLD, WARM, STORED, DDP, FSDP)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["autopar.compiler", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
)

Measured = dict[str, float]  # seconds, processor seconds, loss


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


def first_step(case: str, side: str, program: str) -> Measured:
    """Seconds of wrapping the model and one step, and the mean of the ranks' losses."""
    given = example(case)
    ours = side not in (DDP, FSDP)
    autopar.parallelize(nn.Linear(4, 4), autopar.Mesh(dp=RANKS))  # joins the ranks, imports the runtime
    __import__("autopar.compiler")
    warm_up(ours)
    dist.barrier()
    start, begun = time.perf_counter(), time.process_time()
    model = ready(given.model, side, program)
    loss: Tensor = model(**(given.batch if ours else part(given.batch)))["loss"]
    loss.backward()
    processor = time.process_time() - begun
    dist.barrier()
    seconds = time.perf_counter() - start
    whole = loss.detach().clone()
    if not ours:
        dist.all_reduce(whole)
        whole /= RANKS
    return {"seconds": seconds, "processor": processor, "loss": float(whole)}


def warm_up(ours: bool) -> None:
    """What torch does once in a process, for all sides: a mesh, a step of a small model of the peers."""
    if not ours:
        model = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (RANKS,)))
        model(torch.ones(2, 4)).sum().backward()


def part(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.chunk(RANKS)[dist.get_rank()] for name, tensor in batch.items()}


def rank_of(pipe: Connection, rank: int, port: int, cache: str, call: tuple[str, str, str]) -> None:
    """One rank of a run, in a process of its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), AUTOPAR_CACHE=cache)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    own_memory()
    pipe.send(first_step(*call))
    dist.destroy_process_group()


def own_memory() -> None:
    """Have pages of this process that it shares with the one it was forked off, as if it had imported all itself.

    To look at an object of Python is to write to it: each page that is met first would be copied under the clock.
    """
    with open("/proc/self/maps") as file:
        mappings = [line.split() for line in file]
    for span, access, *_ in mappings:
        first, last = (int(address, 16) for address in span.split("-"))
        if access == "rw-p":
            for page in range(first, last, mmap.PAGESIZE):
                ctypes.memmove(page, page, 1)


def launched(cache: str, *call: str) -> Measured:
    """What rank 0 of :data:`RANKS` processes measures. Raises EOFError where it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    pipes = [SERVER.Pipe() for _ in range(RANKS)]
    given = [(theirs, rank, port, cache, call) for rank, (_, theirs) in enumerate(pipes)]
    processes = [SERVER.Process(target=rank_of, args=arguments, daemon=True) for arguments in given]
    for process, (_, theirs) in zip(processes, pipes):
        process.start()
        theirs.close()
    found: Measured = pipes[0][0].recv()
    for process in processes:
        process.join()
    return found


def whole_launch(cache: str, case: str, side: str, program: str) -> Measured:
    """As :func:`launched`, of ranks that torchrun starts. Raises subprocess.CalledProcessError where one fails."""
    with tempfile.NamedTemporaryFile() as file:
        given = example(case)
        torch.save((given.model, given.batch), file.name)
        options = ["--side", side if side in (DDP, FSDP) else "autopar", "--example", file.name]
        options += ["--program", program] if side == STORED else []
        options += ["--launched", str(time.clock_gettime(time.CLOCK_MONOTONIC))]
        found: Measured = launch.launched("benchmarks.launched_step", RANKS, options, {"AUTOPAR_CACHE": cache})
    return found


def measured(case: str, rounds: int, whole: bool) -> dict[str, list[Measured]]:
    """What each round has measured, by side."""
    run = whole_launch if whole else launched
    found: dict[str, list[Measured]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        given, program, cache = example(case), f"{folder}/program", f"{folder}/cache"
        autopar.compile_program(given.model, autopar.Mesh(dp=RANKS), None, (), given.batch).save(program)
        for number in range(rounds):
            shutil.rmtree(cache, ignore_errors=True)
            others = [STORED, DDP, FSDP]
            for side in (COLD, WARM, *others[number % 3 :], *others[: number % 3]):
                found[side].append(run(cache, case, side, program))
    losses = [one["loss"] for runs in found.values() for one in runs]
    assert max(losses) - min(losses) < 1e-3 * max(losses), losses  # DDP's is a mean of the ranks' means
    return found


def table_of(found: dict[str, dict[str, list[Measured]]], load: Sequence[float]) -> Table:
    title = f"seconds to the first step of {RANKS} ranks; load {load[0]:.0f}, {load[1]:.0f}, {load[2]:.0f}"
    table = Table("model", "", *SIDES, f"{WARM} / {DDP}", title=title, title_justify="left")
    for case, runs in found.items():
        for what, label in (("seconds", "clock"), ("processor", "processor of rank 0")):
            times = {side: [one[what] for one in several] for side, several in runs.items()}
            medians = [f"{statistics.median(times[side]):.2f}" for side in SIDES]
            ratio = statistics.median(warm / ddp for warm, ddp in zip(times[WARM], times[DDP]))
            table.add_row(case, label, *medians, f"{ratio:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_step", description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="count from the start of torchrun on")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    given = parser.parse_args()
    found = {case: measured(case, given.rounds, given.whole) for case in given.cases or CASES}
    Console(width=120).print(table_of(found, os.getloadavg()))


if __name__ == "__main__":
    main()
