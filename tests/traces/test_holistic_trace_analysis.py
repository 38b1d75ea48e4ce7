"""The timelines of real and scheduled steps, read and queried by Holistic Trace Analysis.

It is not among the packages that tests need. Where another Python has it: HTA_PYTHON=/path/to/python pytest -m slow.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autopar.mesh import Mesh
from autopar.traces.scheduled import timed, write_scheduled
from tests.launch import run_ranks
from tests.traces.programs import compiled
from tests.traces.test_timelines import traced

PYTHON = os.environ.get("HTA_PYTHON") or (sys.executable if importlib.util.find_spec("hta") else None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PYTHON is None, reason="Holistic Trace Analysis is not installed")]

# What a user would ask it: the slices by rank and stream, and how much communication is hidden behind computation.
QUERY = """
import json, logging, re, sys, warnings
logging.disable(logging.CRITICAL); warnings.simplefilter("ignore")
import hta.utils.utils as kernels
kernels.NCCL_KERNEL_RE = re.compile(r"(start_)?(all_reduce|all_gather|reduce_scatter|all_to_all)")
from hta.trace_analysis import TraceAnalysis
analysis = TraceAnalysis(trace_dir=sys.argv[1])
symbols = analysis.t.symbol_table.get_sym_table()
found = {}
for rank, frame in analysis.t.traces.items():
    frame = frame[frame["stream"] > 0].sort_values(["stream", "ts", "dur"])
    frame["until"] = frame["ts"] + frame["dur"]  # its own "end" is not shifted to the first start, as "ts" is
    rows = frame[["name", "stream", "ts", "until"]].itertuples(index=False)
    found[rank] = [(symbols[name], int(stream), float(ts), float(until)) for name, stream, ts, until in rows]
times = analysis.get_temporal_breakdown(visualize=False)
overlap = analysis.get_comm_comp_overlap(visualize=False)
print(json.dumps({"slices": found, "times": times.to_dict("list"), "overlap": overlap.to_dict("list")}))
"""


def asked(directory: Path) -> Any:
    assert PYTHON is not None
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [PYTHON, "-c", QUERY, str(directory)],
        env={**environment, "HTA_DISABLE_NS_ROUNDING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def check_streams(slices: list[Any]) -> None:
    """None overlaps within a stream."""
    for before, then in zip(slices, slices[1:]):
        assert before[1] != then[1] or before[3] <= then[2] + 0.01, (before, then)


@pytest.mark.parametrize(
    ("mesh", "plan"), [("dp=2", {"bucket_mb": 0.01, "overlap_mb": 0.0}), ("dp=2,tp=2", {"zero": 3})]
)
def test_a_real_step(mesh: str, plan: dict[str, Any], tmp_path: Path) -> None:
    size = Mesh.parse(mesh).world_size
    results = run_ranks(traced, size, mesh, plan, str(tmp_path))
    found = asked(tmp_path)
    assert sorted(map(int, found["slices"])) == list(range(size))
    for rank, ran in enumerate(results):
        slices = found["slices"][str(rank)]
        check_streams(slices)
        names = sorted(name for of_axis in ran.nodes.values() for name in of_axis)
        computing = {"forward", "backward", "forward_for_loss"}
        assert sorted(name for name, *_ in slices if name not in computing) == names, "one slice for each collective"
    assert all(0 < percent <= 100 for percent in found["times"]["compute_time_pctg"])
    assert all(0 <= percent <= 100 for percent in found["overlap"]["comp_comm_overlap_pctg"])


def test_a_scheduled_step(tmp_path: Path) -> None:
    """Its busy times are those of the cost model."""
    program = compiled("data and tensors")
    write_scheduled(program, tmp_path)
    found = asked(tmp_path / "ranks")
    (own,) = timed(program)
    busy = sum(one.end_s - one.start_s for one in own if one.operation.what == "compute") * 1e6
    for rank in range(4):
        check_streams(found["slices"][str(rank)])
        assert found["times"]["compute_time(us)"][rank] == pytest.approx(busy, abs=0.01 * len(own))
    assert max(found["overlap"]["comp_comm_overlap_pctg"]) < 100
