"""The formats of whole training steps: Chakra execution traces and timelines; :mod:`autopar.traces` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autopar.exporters.job import Job
from autopar.traces.chakra import GROUPS, write_chakra
from autopar.traces.scheduled import write_scheduled


def chakra(job: Job) -> Mapping[str, Any]:
    """What each rank computes and sends in a step, as Chakra and ASTRA-sim read it."""
    job.told("the steps of all roles")
    files = write_chakra(job.program, job.directory, job.ranks)
    return {"groups": GROUPS, "ranks": [{"rank": rank, "file": file} for rank, file in zip(job.ranks, files)]}


def trace(job: Job) -> Mapping[str, Any]:
    """The timeline of a step by the cost model, as Perfetto reads it."""
    job.told("the steps of all roles")
    whole, *files = write_scheduled(job.program, job.directory, job.ranks)
    return {"all": whole, "ranks": files}
