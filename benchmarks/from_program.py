"""Seconds until the first training step of 4 ranks is done: compiled by every rank, and from a program on disk.

    python -m benchmarks.from_program

Both runs are one process group of 4 gloo processes, one thread each, which have imported what they need and hold the
same model on the same batch when the clock starts. It stops when the first step has its gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import autopar
from autopar.zoo.named import Example, named_model
from benchmarks.launch import launched

CASES = {"hf:llama": {}, "hf:llama, 8 layers": {"num_hidden_layers": 8}, "hf:gpt2": {}}
MESH, ROWS, LENGTH, ROUNDS = autopar.Mesh(dp=2, tp=2), 8, 64, 3


def example(case: str) -> Example:
    return named_model(case.partition(",")[0], CASES[case], ROWS, LENGTH)


def first_step(case: str, directory: str | None) -> dict[str, float]:
    """On each rank: seconds of ``parallelize`` and one step, and its loss."""
    given = example(case)
    autopar.parallelize(torch.nn.Linear(4, 4), autopar.Mesh(dp=2, tp=2))  # joins the ranks, imports the runtime
    __import__("autopar.compiler")
    dist.barrier()
    start = time.perf_counter()
    if directory is None:
        parallel = autopar.parallelize(given.model, MESH)
    else:
        parallel = autopar.parallelize(given.model, program=directory)
    loss = parallel(**given.batch)["loss"]
    loss.backward()
    dist.barrier()
    return {"seconds": time.perf_counter() - start, "loss": float(loss.detach())}


def worker(found: Path, case: str, directory: str) -> None:
    result = first_step(case, None if directory == "-" else directory)
    if dist.get_rank() == 0:
        found.write_text(json.dumps(result))
    dist.destroy_process_group()


def measured(case: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = example(case)
        start = time.perf_counter()
        autopar.compile_program(given.model, MESH, None, (), given.batch).save(Path(folder, "program"))
        once = time.perf_counter() - start
        runs: dict[str, list[Any]] = {"-": [], f"{folder}/program": []}
        for _ in range(ROUNDS):
            for directory, results in runs.items():
                results.append(launched("benchmarks.from_program", 4, [case, directory]))
    compiled, stored = (statistics.median(run["seconds"] for run in results) for results in runs.values())
    losses = {run["loss"] for results in runs.values() for run in results}
    assert len(losses) == 1, losses
    print(f"{case:20} compiled {compiled:6.2f} s, from the program {stored:6.2f} s = {stored / compiled:.2f}", end="")
    print(f"; compiled and written once {once:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", type=Path)
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker, *given.rest)
        return
    for case in CASES:
        measured(case)


if __name__ == "__main__":
    main()
