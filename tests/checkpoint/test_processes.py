"""Checkpoints between processes: a directory has one run; a rank that stops ends the others, a slow one does not."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autopar
from autopar import CheckpointError, Checkpoints, Mesh, Plan, RankFailedError
from autopar.checkpoint import directory_lock, files
from autopar.checkpoint.watched_files import WatchedFile
from tests.launch import run_ranks, try_ranks

SECONDS = 3.0  # of Plan(timeout=)


def save_here(directory: Path, step: int) -> str:
    try:
        Checkpoints(directory).save(step, nn.Linear(2, 2))
    except CheckpointError as problem:
        return str(problem)
    return "saved"


def save_and_be_killed(directory: Path) -> None:
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, nn.Linear(2, 2))
    os.kill(os.getpid(), signal.SIGKILL)


def test_two_runs_do_not_save_into_one_directory(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, nn.Linear(2, 2))
    (said,) = run_ranks(save_here, 1, tmp_path, 2)
    who = f"process {os.getpid()} on host {socket.gethostname()}, since 20"
    assert said.startswith(f"another run saves into this directory: {who}"), said
    assert "Way out: save to another directory" in said
    assert checkpoints.steps() == [1]
    del checkpoints
    assert run_ranks(save_here, 1, tmp_path, 2) == ["saved"]
    assert not (tmp_path / ".lock").exists()


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    assert try_ranks(save_and_be_killed, 1, tmp_path) == [None]
    assert (tmp_path / ".lock").exists()
    assert save_here(tmp_path, 2) == "saved"


def test_one_process_may_save_by_several_objects(tmp_path: Path) -> None:
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path)
    first.save(1, nn.Linear(2, 2))
    second.save(2, nn.Linear(2, 2))
    del first
    assert run_ranks(save_here, 1, tmp_path, 3) != ["saved"]
    del second
    assert run_ranks(save_here, 1, tmp_path, 3) == ["saved"]


def test_a_forked_child_does_not_give_the_lock_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = directory_lock.hold_directory(tmp_path)
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        lock.release()
    assert run_ranks(save_here, 1, tmp_path, 1) != ["saved"]
    lock.release()


HOLDERS: dict[str, tuple[Callable[[], dict[str, Any]], bool]] = {
    "this process": (lambda: {"host": socket.gethostname(), "pid": os.getpid()}, True),
    "gone": (lambda: {"host": socket.gethostname(), "pid": 2**22 + 1}, False),  # above the largest number of a process
    "elsewhere": (lambda: {"host": "node-3", "pid": 2**22 + 1}, True),
    "nobody": (dict, False),
}


@pytest.mark.parametrize("who", HOLDERS)
def test_without_locks_the_file_decides(who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*given: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(directory_lock.fcntl, "lockf", no_locks)
    content, held = HOLDERS[who]
    (tmp_path / ".lock").write_text(json.dumps(content()))
    said = save_here(tmp_path, 1)
    assert (f"delete '{tmp_path / '.lock'}'" in said) == held and (said == "saved") != held, said


# ---------------------------------------------------------------- ranks that stop, hang or are slow


def prepared(timeout: float) -> tuple[Any, int]:
    """A model on two ranks, and the number of the other one's process."""
    torch.manual_seed(0)
    model = autopar.parallelize(nn.Sequential(nn.Linear(8, 8)), Mesh(dp=2), Plan(timeout=timeout))
    model.prepare(torch.randn(4, 8))
    numbers: list[Any] = [None, None]
    dist.all_gather_object(numbers, os.getpid())
    return model, numbers[1 - dist.get_rank()]


def before(owner: Any, name: str, act: Callable[[], None]) -> None:
    """Let ``owner.name`` act first, whenever it is called."""
    usual = getattr(owner, name)

    def acting(*args: Any, **kwargs: Any) -> Any:
        act()
        return usual(*args, **kwargs)

    setattr(owner, name, acting)


STOPS = {
    "writing": (WatchedFile, "write"),
    "planning": (files.Writer, "prepare_local_plan"),
    "agreeing": (files, "path_of"),
    "finishing": (files.Writer, "finish"),
    "verifying": (files, "verify"),
    "reading": (files.LoadPlanner, "load_bytes"),
}


def stop(directory: Path, where: str, victim: int) -> str:
    model, other = prepared(SECONDS)
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, model)
    if dist.get_rank() == victim:
        before(*STOPS[where], lambda: os.kill(os.getpid(), signal.SIGSTOP))
    try:
        checkpoints.load(model) if where in ("verifying", "reading") else checkpoints.save(2, model)
    except RankFailedError as problem:
        return str(problem)
    finally:
        os.kill(other, signal.SIGKILL)
    return "no error"


CASES = [
    pytest.param(where, 1, marks=[pytest.mark.slow] * (where != "writing")) for where in STOPS if where != "finishing"
]
CASES += [pytest.param("finishing", 0, marks=pytest.mark.slow), pytest.param("writing", 0, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("where", "victim"), CASES)
def test_a_rank_that_stops_ends_the_others(where: str, victim: int, tmp_path: Path) -> None:
    said = try_ranks(stop, 2, tmp_path, where, victim, timeout=100.0)
    assert f"did not answer within {SECONDS:g} s" in str(said[1 - victim]), said
    assert Checkpoints(tmp_path).steps() == [1]
    assert save_here(tmp_path, 2) == "saved"


def hang(directory: Path) -> str:
    """Rank 1's file system does not answer; the process itself does."""
    model, _ = prepared(SECONDS)
    checkpoints = Checkpoints(directory)
    if dist.get_rank() == 1:
        before(WatchedFile, "write", lambda: time.sleep(1000.0))
    try:
        checkpoints.save(1, model)
    except RankFailedError as problem:
        return str(problem)
    return "no error"


@pytest.mark.slow
def test_a_file_system_that_does_not_answer_ends_all(tmp_path: Path) -> None:
    said = run_ranks(hang, 2, tmp_path, timeout=100.0)
    assert all("for rank 1: no byte was moved there for 3 s" in text for text in said), said
    assert Checkpoints(tmp_path).steps() == []


def save_slowly(directory: Path) -> list[int]:
    """Rank 1 takes longer than the timeout, with a sign of life now and then."""
    model, _ = prepared(1.0)
    checkpoints = Checkpoints(directory)
    if dist.get_rank() == 1:
        before(WatchedFile, "write", lambda: time.sleep(0.4))
        usual = files.Writer._written

        def several(self: Any, *given: Any) -> Any:
            for number in range(5):
                with self.fs.create_stream(directory / f"more-{number}", "wb") as stream:
                    stream.write(b"x")
            self.fs.written.clear()
            return usual(self, *given)

        files.Writer._written = several  # type: ignore[method-assign]
    checkpoints.save(1, model)
    dist.barrier()
    return checkpoints.steps()


def test_a_slow_rank_is_waited_for(tmp_path: Path) -> None:
    assert run_ranks(save_slowly, 2, tmp_path, timeout=100.0) == [[1], [1]]


def fail(directory: Path) -> list[str]:
    """Rank 1 alone cannot write, then cannot read."""
    model, _ = prepared(60.0)
    checkpoints, before_it = Checkpoints(directory), [p.clone() for p in model.parameters()]
    said = []
    for action in (lambda: checkpoints.save(1, model), lambda: checkpoints.load(model)):
        owner, name = (WatchedFile, "write") if not said else (files.LoadPlanner, "commit_tensor")
        usual = getattr(owner, name)
        if dist.get_rank() == 1:
            before(owner, name, _no_space)
        try:
            action()
        except CheckpointError as problem:
            said.append(str(problem).splitlines()[0])
        setattr(owner, name, usual)
        said.append("changed" if any(map(_unlike, before_it, model.parameters())) else "the same")
        if len(said) == 2:
            checkpoints.save(1, model)
            with torch.no_grad():
                before_it = [p.add_(1.0).clone() for p in model.parameters()]
    return said


def _no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _unlike(one: Any, other: Any) -> bool:
    return not torch.equal(one.to_local(), other.to_local())


def test_what_one_rank_cannot_do_changes_none(tmp_path: Path) -> None:
    for said in run_ranks(fail, 2, tmp_path, timeout=100.0):
        assert [said[0].split(" left")[0], *said[1:2], said[2].split(" left")[0], said[3]] == [
            "rank 1: no space", "the same", "rank 1: no space", "the same",
        ], said  # fmt: skip
    assert not list(tmp_path.glob("*.partial"))
