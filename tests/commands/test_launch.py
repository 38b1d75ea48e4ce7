"""Ranks that are refused before they start, that end with what started them, and that say why they were lost."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from autopar.commands import this_machine
from autopar.commands.launch import FAILURES, _Restarts, note_failure
from autopar.commands.this_machine import device_of_rank, refuse_ranks
from autopar.errors import RankFailedError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RANK = "import time; from autopar.commands.orphans import end_with_launcher; end_with_launcher(); time.sleep(600)"
LAUNCHER = f"""
import os, subprocess, sys, time
os.environ["AUTOPAR_LAUNCHER"] = str(os.getpid())
ranks = [subprocess.Popen([sys.executable, "-c", {RANK!r}]) for _ in range(2)]
print(*(rank.pid for rank in ranks), flush=True)
time.sleep(600)
"""


def is_there(process: int) -> bool:
    """Whether a process runs; one that has ended may still be listed until it is waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux lists them")
def test_ranks_end_with_what_started_them() -> None:
    """It is killed; the ends of pipes that it held are kept open, so that nothing else tells its ranks."""
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as launcher:
        assert launcher.stdout is not None
        ranks = [int(word) for word in launcher.stdout.readline().split()]
        try:
            assert all(is_there(rank) for rank in ranks) and len(ranks) == 2
            launcher.kill()
            launcher.wait()
            end = time.monotonic() + 60
            while any(is_there(rank) for rank in ranks) and time.monotonic() < end:
                time.sleep(0.05)
            assert not any(is_there(rank) for rank in ranks)
        finally:
            for rank in filter(is_there, ranks):
                os.kill(rank, signal.SIGKILL)


def test_more_ranks_than_the_machine_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "_cores", lambda: 2)
    refuse_ranks(32, CPU)
    with pytest.raises(ValueError, match="64 ranks are 64 processes, and.* has 2 cores.*\nWay out.*torchrun"):
        refuse_ranks(64, CPU)
    monkeypatch.setattr(this_machine, "_cores", lambda: 96)
    refuse_ranks(64, CPU)


def test_backends_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    refuse_ranks(2, CPU)
    with pytest.raises(ValueError, match="2 ranks on CUDA devices need NCCL.*\nWay out.*--device cpu"):
        refuse_ranks(2, CUDA)
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    with pytest.raises(ValueError, match="need gloo"):
        refuse_ranks(2, CPU)


def test_devices_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of_rank("auto", 2) == CPU
    for name, said in (("cuda", "no CUDA device here\nWay out"), ("tpu", "one of auto, cpu, cuda")):
        with pytest.raises(ValueError, match=said):
            device_of_rank(name, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="8 ranks on this machine, and it has 4 CUDA devices"):
        device_of_rank("cuda", 8)
    assert device_of_rank("auto", 8) == CPU
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # under torchrun on two machines
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of_rank("auto", 8) == torch.device("cuda", 3)


def test_a_restart_says_which_rank_was_lost_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restarts = _Restarts(2, tmp_path)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv(FAILURES, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "1")

    def lost(code: int, rank: int) -> str:
        torchs = "failed (exitcode: %s) local_rank: %s (pid: %s) of binary: %s"
        restarts.emit(logging.LogRecord("", logging.ERROR, "", 0, torchs, (code, rank, 7, "python"), None))
        return capsys.readouterr().err

    assert note_failure(ValueError("x"), "the disk is full\nWay out: another one")
    assert json.loads((tmp_path / "error.json").read_text())["kind"] == "ValueError"
    assert lost(2, 1) == "autopar: rank 1 failed (the disk is full); all ranks start again, 1 more times at most\n"
    said = lost(-signal.SIGKILL, 1)
    assert "rank 1 was ended by signal SIGKILL; all" in said, "and not for the reason of the time before"
    assert lost(-signal.SIGKILL, 1) == "", "no restart is left: report_failures says it"


def test_a_rank_that_follows_ends_after_the_one_that_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    note_failure(RankFailedError("rank 0 waited for rank 1"), "rank 0 waited for rank 1")
    assert len(waits) == 1
    note_failure(ValueError("no"), "no")
    assert len(waits) == 1
