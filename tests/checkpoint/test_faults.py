"""Checkpoints where something goes wrong: flipped bits, a full disk, failures half-way, numbers that are not finite."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import autopar
from autopar import CheckpointError, Checkpoints
from autopar.checkpoint import files

Numbers = dict[str, Any]


class Run:
    """A small model in training, with all that a checkpoint of it holds."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.5)
        for _ in range(1 + seed):
            self.model(torch.randn(8, 16)).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def save(self, checkpoints: Checkpoints, step: int, data: Any = None) -> None:
        checkpoints.save(step, self.model, self.optimizer, scheduler=self.scheduler, data=data)

    def load(self, checkpoints: Checkpoints, step: int | None = None) -> Any:
        return checkpoints.load(self.model, self.optimizer, scheduler=self.scheduler, step=step)

    def numbers(self) -> bytes:
        """Every number of the run, the states of random generators among them."""
        state = self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()
        generators = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
        return pickle.dumps((*(_plain(part) for part in state), *map(_plain, generators)))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone().numpy().tobytes(), str(value.dtype)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else repr(value)


def refused(run: Run, checkpoints: Checkpoints, match: str) -> None:
    """The latest checkpoint cannot be loaded, and nothing of the run has changed then."""
    before = run.numbers()
    with pytest.raises(CheckpointError, match=match):
        run.load(checkpoints)
    assert run.numbers() == before


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "checkpoint.json"])
def test_a_flipped_bit_is_seen(name: str, tmp_path: Path) -> None:
    saved, other, draw = Run(0), Run(1), random.Random(name)
    saved.save(Checkpoints(tmp_path), 1)
    path = tmp_path / "step-00000001" / name
    content, exact = path.read_bytes(), saved.numbers()
    for _ in range(25):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        if name == "checkpoint.json" and _means_the_same(content, bytes(damaged)):
            continue  # a space that became another one
        refused(other, Checkpoints(tmp_path), "damaged|not what autopar writes|no complete|reads format")
    path.write_bytes(content)
    saved.load(Checkpoints(tmp_path))
    assert saved.numbers() == exact


def _means_the_same(content: bytes, damaged: bytes) -> bool:
    try:
        return bool(json.loads(content) == json.loads(damaged))
    except ValueError:
        return False


def test_the_other_checkpoints_are_named(tmp_path: Path) -> None:
    run = Run(0)
    for step in (3, 5):
        run.save(Checkpoints(tmp_path), step)
    (tmp_path / "step-00000005" / "__0_0.distcp").write_bytes(b"")
    refused(run, Checkpoints(tmp_path), r"load\(\.\.\., step=3\)")
    assert run.load(Checkpoints(tmp_path), step=3).step == 3


def test_a_load_that_fails_half_way_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, other, usual, count = Run(0), Run(1), files.LoadPlanner.commit_tensor, iter(range(1000))
    saved.save(Checkpoints(tmp_path), 1)

    def fail_later(*given: Any) -> None:
        if next(count) == 5:
            raise OSError("the disk is gone")
        usual(*given)

    monkeypatch.setattr(files.LoadPlanner, "commit_tensor", fail_later)
    refused(other, Checkpoints(tmp_path), "the disk is gone")
    monkeypatch.undo()
    other.load(Checkpoints(tmp_path))
    assert other.numbers() == saved.numbers()


def test_a_scheduler_that_refuses_its_state_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, other = Run(0), Run(1)
    saved.save(Checkpoints(tmp_path), 1)

    def refuse(state: Any) -> None:
        raise KeyError("warmup")

    monkeypatch.setattr(other.scheduler, "load_state_dict", refuse)
    refused(other, Checkpoints(tmp_path), "the scheduler does not take the state that was saved: KeyError")


def onto_a_full_disk(directory: Path, checkpoints: Checkpoints, step: int) -> None:
    """Let the next file of tensors be written to a device that is always full."""
    partial = files.partial_of(files.path_of(directory, step), checkpoints._writer)
    partial.mkdir()
    (partial / "__0_0.distcp").symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk(wait: bool, tmp_path: Path) -> None:
    run, checkpoints = Run(0), Checkpoints(tmp_path)
    run.save(checkpoints, 1)
    onto_a_full_disk(tmp_path, checkpoints, 2)
    with pytest.raises(CheckpointError, match=r"rank 0: no space left in .* bytes that are free"):
        checkpoints.save(2, run.model, run.optimizer, wait=wait)
        checkpoints.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", ".lock"}
    run.save(checkpoints, 2)  # as soon as there is space
    assert checkpoints.steps() == [1, 2]


def spoilt(run: Run) -> Run:
    with torch.no_grad():
        next(run.model.parameters())[0, 0] = torch.nan
    return run


def test_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        Run(0).save(checkpoints, step)
    for step in (4, 5, 6):
        spoilt(Run(0)).save(checkpoints, step)
    assert checkpoints.steps() == [3, 5, 6]
    with pytest.warns(UserWarning, match=r"not finite .* the latest one whose are is load\(\.\.\., step=3\)"):
        assert Run(1).load(checkpoints).step == 6
    for step in (7, 8):
        Run(0).save(checkpoints, step)
    assert checkpoints.steps() == [7, 8]


def test_infinite_buffers_are_no_fault(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.save(step, model)
    assert checkpoints.steps() == [2]


# ---------------------------------------------------------------- safetensors files


def test_weights_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*given: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, directory = nn.Linear(3, 3), tmp_path / "weights"
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", no_space)
        with pytest.raises(CheckpointError, match="no space left in .*weights"):
            autopar.save_safetensors(model, directory)
    assert list(tmp_path.iterdir()) == []
    autopar.save_safetensors(model, directory)
    assert [path.name for path in directory.iterdir()] == ["model.safetensors"]


def test_weights_that_end_half_way_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, other, usual, count = nn.Linear(3, 3), nn.Linear(3, 3), os.preadv, iter(range(10))
    autopar.save_safetensors(saved, tmp_path)
    before = {name: value.clone() for name, value in other.state_dict().items()}

    def fail_later(*given: Any) -> int:
        if next(count) == 1:
            raise OSError(errno.EIO, "Input/output error")
        return usual(*given)

    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fail_later)
        with pytest.raises(CheckpointError, match="Input/output error"):
            autopar.load_safetensors(other, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    autopar.load_safetensors(other, tmp_path)
    assert torch.equal(other.weight, saved.weight)


# ---------------------------------------------------------------- what is run while a checkpoint is read


class Calls:
    """Unpickled, it calls ``os.mkdir(path)``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def forged(directory: Path, name: str, content: bytes) -> None:
    """Put ``content`` in place of a file, with its right checksum: whoever forges a file can do that too."""
    path = directory / "step-00000001"
    (path / name).write_bytes(content)
    manifest = json.loads((path / "checkpoint.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "crc32": files.checksum(path / name)}
    manifest.pop("crc32")
    files._write_manifest(path / "checkpoint.json", manifest)


def test_the_table_of_tensors_runs_nothing(tmp_path: Path) -> None:
    Run(0).save(Checkpoints(tmp_path / "run"), 1)
    forged(tmp_path / "run", ".metadata", pickle.dumps(Calls(tmp_path / "called")))
    refused(Run(1), Checkpoints(tmp_path / "run"), "it names posix.mkdir, which no table of tensors has")
    refused(Run(1), Checkpoints(tmp_path / "run", trusted=True), "it names posix.mkdir")
    assert not (tmp_path / "called").exists()


def test_data_runs_nothing_unless_it_is_trusted(tmp_path: Path) -> None:
    run, value = Run(0), Calls(tmp_path / "called")
    with pytest.raises(CheckpointError, match=r"data=: .* holds posix.mkdir, .*\n.*trusted=True"):
        run.save(Checkpoints(tmp_path / "run"), 1, data=value)
    run.save(Checkpoints(tmp_path / "run", trusted=True), 1, data=value)
    refused(Run(1), Checkpoints(tmp_path / "run"), "holds posix.mkdir, which only code that stands in it could restore")
    assert not (tmp_path / "called").exists()
    run.load(Checkpoints(tmp_path / "run", trusted=True))
    assert (tmp_path / "called").exists()


def test_plain_data_comes_back(tmp_path: Path) -> None:
    data = {"epoch": 3, "order": numpy.arange(5), "seen": [torch.ones(2), None, 1.5, "x", {1, 2}], 4: (True, b"z")}
    Run(0).save(Checkpoints(tmp_path), 1, data=data)
    found = Run(1).load(Checkpoints(tmp_path)).data
    assert repr(found) == repr(data)


def test_checkpoints_without_checksums_load(tmp_path: Path) -> None:
    saved, other = Run(0), Run(1)
    saved.save(Checkpoints(tmp_path), 1)
    path = tmp_path / "step-00000001" / "checkpoint.json"
    manifest = json.loads(path.read_text())
    files_of_it = {name: entry["bytes"] for name, entry in manifest.pop("files").items()}
    for key in ("crc32", "finite"):
        del manifest[key]
    path.write_text(json.dumps({**manifest, "format": 1, "files": files_of_it}))
    other.load(Checkpoints(tmp_path))
    assert other.numbers() == saved.numbers()


def test_names_of_files_do_not_lead_elsewhere(tmp_path: Path) -> None:
    Run(0).save(Checkpoints(tmp_path / "run"), 1)
    path = tmp_path / "run" / "step-00000001"
    shutil.move(path / "__0_0.distcp", tmp_path / "elsewhere")
    manifest = json.loads((path / "checkpoint.json").read_text())
    manifest["files"]["../../elsewhere"] = manifest["files"].pop("__0_0.distcp")
    manifest.pop("crc32")
    files._write_manifest(path / "checkpoint.json", manifest)
    refused(Run(1), Checkpoints(tmp_path / "run"), "is no name of a file in this directory")
