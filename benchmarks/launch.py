"""Run a benchmark's module again as the ranks of a process group, under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist


def launched(module: str, ranks: int, arguments: Sequence[object], environment: Mapping[str, str] | None = None) -> Any:
    """What rank 0 of ``python -m module --worker FILE *arguments`` writes to FILE as JSON; one thread a process.

    Nothing comes out of the cache of compiled programs, unless ``environment`` says so.

    Raises subprocess.CalledProcessError where a rank fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", module, "--worker", str(found), *map(str, arguments)]
        own = {"OMP_NUM_THREADS": "1", "AUTOPAR_CACHE": "0", **(environment or {})}
        subprocess.run(command, check=True, env={**os.environ, **own})
        return json.loads(found.read_text())


def of_any_rank(why: str) -> str:
    """The first reason that a rank has, if any, or "". Collective.

    A peer that cannot be made on one rank takes part on none, or the others would wait for it.
    """
    reasons: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, why)
    return next((f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason), "")
