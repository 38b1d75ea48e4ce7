"""The profile of real steps: each rank writes what ``torch.profiler`` saw, with the names of the model's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity

from autopar.errors import LaunchError
from autopar.module import held_by


@contextmanager
def profile(model: nn.Module, directory: str | Path) -> Iterator[torch.profiler.profile]:
    """Profile what this rank does inside; write ``directory/rank0.json``, by its number, when that ends well.

    What the program of ``model`` runs is in ranges with the name of the pass and of the module
    (``backward layers.0.mlp``), each collective in one with its axis and the module whose sum it finishes
    (``all_reduce over tp: layers.0.mlp.down (forward)``). The file is in the trace event format, for Perfetto; the
    profiler that is given has tables (``key_averages()``) once the context has ended. Each graph is compiled again
    where it is first profiled, so run a step before.

    Raises LaunchError for a model that is not parallel, OSError for a directory that cannot be made.
    """
    connection = held_by(model).weights.connection
    if connection is None:
        raise LaunchError(
            "autopar.profile labels the program of a parallel model, and this one is not parallel, or has no ranks\n"
            "Way out: autopar.parallelize(model, mesh) on every rank; torch.profiler for a model by itself."
        )
    where, comm = Path(directory), connection.comm
    where.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if comm.device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        before, comm.is_profiled = comm.is_profiled, True
        try:
            yield profiler
        finally:
            comm.is_profiled = before
    path = where / f"rank{comm.rank}.json"
    draft = path.with_name(f".{path.name}.draft.json")
    try:
        profiler.export_chrome_trace(str(draft))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
