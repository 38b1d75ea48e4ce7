"""``autopar train`` that is killed, stopped and resumed: the same losses as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autopar.data.token_sources import byte_tokens
from autopar.data.token_stream import Tokens, TokenStream
from autopar.mesh import Mesh
from autopar.training import loop
from autopar.training.log import Log
from tests.command_line import Outcome, autopar
from tests.launch import run_ranks
from tests.selection import slow_but

ROOT = Path(__file__).parents[2]
TINY = ["--config", "vocab=288", "--config", "layers=1", "--config", "width=48", "--config", "heads=12"]
SMALL = ["train", "llama", *TINY, "--length", "8", "--plan", "check_numerics=false"]
KILLED = """
import os, signal
from autopar.__main__ import main
from autopar.data.token_stream import TokenStream

read = TokenStream.__call__

def killed(text, number, *share):
    if number == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(text, number, *share)

TokenStream.__call__ = killed
main()
"""


def train(*arguments: str) -> Outcome:
    """``autopar train *arguments`` of the small model."""
    return autopar(*SMALL, *arguments)


def stopped_rank(at: int, rank: int, *arguments: str) -> Outcome:
    """As :func:`autopar`; one rank gets SIGTERM while it reads the batch ``at``."""
    read: Callable[..., Any] = TokenStream.__call__

    def signalled(text: TokenStream, number: int, *share: Any) -> Any:
        if number == at and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return read(text, number, *share)

    TokenStream.__call__ = signalled  # type: ignore[method-assign]
    return train(*arguments)


@contextmanager
def started(*command: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A command of Python's, with what it prints in ``cwd/printed``; not left running."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "AUTOPAR_CACHE": str(cwd / "cache")}
    with (cwd / "printed").open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=cwd, env=environment, stdout=printed, stderr=printed, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def records(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def losses(log: Path) -> list[float]:
    """By step, of the last time that each was done."""
    found = {record["step"]: record["loss"] for record in records(log) if "loss" in record}
    assert list(found) == list(range(len(found))), "no step is missing"
    return list(found.values())


@pytest.mark.slow
def test_a_killed_rank(tmp_path: Path) -> None:
    """One of 4 ranks is killed at step 7: all start again from the last checkpoint, and end as if it had not been."""
    run = ["--mesh", "dp=2,tp=2", "--zero", "3", "--steps", "10", "--no-compare"]
    saved = ["--checkpoint", "saved", "--every", "2", "--keep", "2", "--resume", "--log-file", "killed.jsonl"]
    (tmp_path / "killed.py").write_text(KILLED)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", "2", "killed.py"]
    with started(*torchrun, *SMALL, *run, *saved, cwd=tmp_path) as process:
        code = process.wait(timeout=200)
    printed = (tmp_path / "printed").read_text()
    assert code == 0, printed
    assert [code for code, *_ in run_ranks(train, 4, *run, "--log", str(tmp_path / "whole.jsonl"))] == [0] * 4
    assert losses(tmp_path / "killed.jsonl") == losses(tmp_path / "whole.jsonl"), "bit for bit"
    steps = [record["step"] for record in records(tmp_path / "killed.jsonl") if "loss" in record]
    events = [record for record in records(tmp_path / "killed.jsonl") if "event" in record]
    assert [event["event"] for event in events] == ["resumed"]
    again = events[0]["step"]
    assert again in (4, 6), "the checkpoint of step 6 may have been cut off, that of step 4 is complete"
    assert steps == [*range(7), *range(again, 10)]
    assert "no checkpoint in saved yet: starting at step 0" in printed
    assert f"resumed from saved/step-{again:08d}: starting at step {again}" in printed
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["step-00000008", "step-00000010"]


def test_stopped_and_resumed(tmp_path: Path) -> None:
    """SIGTERM to one rank of two: both end the step, save and stop; another mesh goes on from there."""
    run = ["--steps", "5", "--no-compare", "--accumulate", "2"]
    whole, log, saved = (str(tmp_path / name) for name in ("whole.jsonl", "log.jsonl", "saved"))
    assert train(*run, "--mesh", "1", "--log", whole)[0] == 0
    kept = [*run, "--checkpoint", saved, "--log", log, "--resume"]
    stopped = run_ranks(stopped_rank, 2, 5, 1, *kept, "--mesh", "dp=2", "--zero", "1")
    assert [code for code, *_ in stopped] == [0, 0]
    assert f"stopped by SIGTERM after 3 of 5 steps; saved {saved}/step-00000003" in stopped[0][2]
    code, out, _ = train(*kept, "--mesh", "1", "--json")
    document = json.loads(out)
    assert code == 0 and document["first_step"] == 3 and document["checkpoint"] == f"{saved}/step-00000005"
    torch.testing.assert_close(losses(Path(log)), losses(Path(whole)), rtol=0, atol=1e-5)
    assert document["losses"] == losses(Path(log))[3:]
    assert [record["event"] for record in records(Path(log)) if "event" in record] == ["stopped", "resumed"]
    code, out, _ = train(*kept, "--mesh", "1")
    assert code == 0 and "has 5 steps already" in out


@pytest.mark.slow
def test_stopped_and_resumed_on_other_meshes(tmp_path: Path) -> None:
    """The same on three meshes and stages, one after the other."""
    run = ["--steps", "7", "--no-compare", "--accumulate", "2"]
    whole, log, saved = (str(tmp_path / name) for name in ("whole.jsonl", "log.jsonl", "saved"))
    assert train(*run, "--mesh", "1", "--log", whole)[0] == 0
    kept = [*run, "--checkpoint", saved, "--log", log, "--resume"]
    stopped = run_ranks(stopped_rank, 2, 5, 1, *kept, "--mesh", "dp=2", "--zero", "1")
    assert [code for code, *_ in stopped] == [0, 0]
    assert f"stopped by SIGTERM after 3 of 7 steps; saved {saved}/step-00000003" in stopped[0][2]
    (code, _, err), _ = run_ranks(train, 2, *kept, "--mesh", "tp=2", "--steps", "5")
    assert code == 0 and f"resumed from {saved}/step-00000003" in err
    (code, *_), _ = run_ranks(train, 2, *kept, "--mesh", "sp=2", "--steps", "6")
    assert code == 0
    (code, out, _), _ = run_ranks(train, 2, *kept, "--mesh", "dp=2", "--zero", "3", "--json")
    document = json.loads(out)
    assert code == 0 and document["first_step"] == 6 and document["checkpoint"] == f"{saved}/step-00000007"
    torch.testing.assert_close(losses(Path(log)), losses(Path(whole)), rtol=0, atol=1e-5)
    assert document["losses"] == losses(Path(log))[6:]
    assert [record["event"] for record in records(Path(log)) if "event" in record] == ["stopped", *["resumed"] * 3]
    code, out, _ = train(*kept, "--mesh", "1")
    assert code == 0 and "has 7 steps already" in out


@pytest.mark.slow
def test_what_started_the_ranks_is_stopped(tmp_path: Path) -> None:
    command = ["autopar", *SMALL, "--mesh", "dp=2", "--steps", "1000000", "--no-compare"]
    with started(*command, "--checkpoint", "saved", "--log", "log", cwd=tmp_path) as process:
        log, end = tmp_path / "log", time.monotonic() + 120
        while not (log.exists() and log.read_text()) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    assert code == 0, (tmp_path / "printed").read_text()
    *steps, event = records(log)
    assert event == {"event": "stopped", "step": len(steps), "checkpoint": f"saved/step-{len(steps):08d}"}
    assert (tmp_path / event["checkpoint"] / "checkpoint.json").exists()
    assert f"stopped by SIGTERM after {len(steps)} of 1000000 steps" in (tmp_path / "printed").read_text()


# ---------------------------------------------------------------- one device


@pytest.mark.slow
def test_the_parameters_of_a_pipeline_are_those_of_the_model() -> None:
    run = ["--steps", "1", "--no-compare"]
    whole = json.loads(train(*run, "--mesh", "1", "--json")[1])["parameters"]
    (code, out, _), _ = run_ranks(train, 2, *run, "--mesh", "pp=2")
    assert code == 0 and f"{whole:,} parameters, on mesh(pp=2)" in " ".join(out.split())


def test_what_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = ["--mesh", "1", "--steps", "3", "--accumulate", "2", "--clip", "0.5"]
    code, out, _ = train(*run, "--log", str(log), "--json")
    document = json.loads(out)
    assert code == 0 and document["largest_difference"] <= 1e-4
    for number, record in enumerate(records(log)):
        assert record["step"] == number and record["loss"] == document["losses"][number]
        assert record["grad_norm"] > 0.5, "the norm before clipping"
        assert record["peak_memory_bytes_most"] == record["peak_memory_bytes"] > 50e6
        assert record["tokens_per_second"] == pytest.approx(2 * 12 * 8 / record["seconds"], rel=0.01)


def test_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    code, _, err = train("--mesh", "1", "--steps", "4", "--no-compare", "--log-every", "3", "--peak-tflops", "1")
    first, *lines = err.splitlines()
    assert code == 0 and "4 steps; the first one compiles" in first
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 3/4", "step 4/4"]
    assert all("grad norm" in line and "tokens/s" in line and "mfu" in line for line in lines)
    code, out, err = train("--mesh", "1", "--steps", "2", "--no-compare", "--json", "--log", str(tmp_path / "log"))
    first, *lines = map(json.loads, err.splitlines())
    assert code == 0 and first == {"event": "started", "mesh": {"dp": 1}, "steps": 2}
    assert lines == records(tmp_path / "log"), "the lines are those of the log"
    assert [line["loss"] for line in lines] == json.loads(out)["losses"]


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = train("--mesh", "dp=2", "--wandb")
    assert code == 2 and "--wandb needs the package 'wandb'" in err, "before any rank is started"


def test_a_lower_precision_has_its_own_tolerance() -> None:
    code, out, _ = train("--mesh", "1", "--steps", "3", "--precision", "bf16", "--recompute", "full")
    assert code == 0 and "tolerance 0.05: the parallel one computes in bfloat16" in out


def test_a_directory_with_checkpoints_is_not_begun_again(tmp_path: Path) -> None:
    kept = ["--mesh", "1", "--steps", "1", "--no-compare", "--checkpoint", str(tmp_path / "saved")]
    code, out, _ = train(*kept)
    assert code == 0 and "1 steps done; saved" in out
    code, _, err = train(*kept)
    assert code == 2 and "the latest of step 1" in err and "--resume" in err
    code, _, err = train(*kept, "--resume", "--batch", "6")
    assert code == 2 and "--batch 12 --length 8" in err


def test_what_is_not_finite_pushes_no_good_checkpoint_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, count = loop.loss_after, itertools.count(1)

    def loss_after(model: Any, batch: Any) -> torch.Tensor:
        return usual(model, batch) * (1.0 if next(count) <= 2 else torch.nan)

    monkeypatch.setattr(loop, "loss_after", loss_after)
    saving = ["--checkpoint", str(tmp_path), "--every", "1", "--keep", "1"]
    code, _, err = train(*saving, "--steps", "5", "--mesh", "1", "--no-compare")
    assert code == 0 and "is not finite: no checkpoint is saved; the last good one is of step 2" in err, err
    (saved,) = tmp_path.glob("step-*")
    assert saved.name == "step-00000002" and json.loads((saved / "checkpoint.json").read_text())["finite"]


def test_resume_needs_a_directory() -> None:
    code, _, err = train("--resume")
    assert code == 2 and "--checkpoint DIR" in err


def test_a_place_in_another_text() -> None:
    text = TokenStream(byte_tokens(bytes(range(100))), batch=2, length=10)
    assert text.batches_before(text.place(7)) == 7
    for other, said in ((bytes(100), "another text"), (bytes(range(99)), "another text, of 99 bytes; this has 100")):
        with pytest.raises(ValueError, match=said):
            text.batches_before(TokenStream(byte_tokens(other), 2, 10).place(7))
    with pytest.raises(ValueError, match="--batch 4 --length 10"):
        text.batches_before(TokenStream(byte_tokens(bytes(range(100))), 4, 10).place(7))
    older = {"batches": 7, "batch": 2, "length": 10, "bytes": 100, "checksum": zlib.crc32(bytes(range(100)))}
    assert text.batches_before(older) == 7, "as autopar wrote it before it knew tokens"
    with pytest.raises(ValueError, match="another text, of 100 bytes; this has 100"):
        TokenStream(byte_tokens(bytes(100)), 2, 10).batches_before(older)
    with pytest.raises(ValueError, match="an older autopar, on the bytes of a text of 100;.*\nWay out: .*--tokenizer"):
        TokenStream(Tokens(np.arange(100), 100), 2, 10).batches_before(older)
    for foreign in (None, {"batches": 3}):
        with pytest.raises(ValueError, match="not one of autopar train"):
            text.batches_before(foreign)


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for append in (False, True, True):
        with Log(path, append) as log:
            log.write(step=1, nothing=None)
    assert records(path) == [{"step": 1}] * 3
    with Log(path, append=False):
        assert path.read_text() == ""


@pytest.mark.parametrize("mesh", slow_but([0], ["dp=1", "dp=2"]))
def test_a_step_is_traced(mesh: str, tmp_path: Path) -> None:
    """The timeline of all ranks in one file, and one file for each; those of an earlier run are gone."""
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks/rank7.json").write_text("of a run with more ranks")
    code, _, said = train("--mesh", mesh, "--steps", "2", "--no-compare", "--trace", str(tmp_path))
    assert code == 0 and "timeline of a step" in said
    ranks = Mesh.parse(mesh).world_size
    assert sorted(path.name for path in (tmp_path / "ranks").iterdir()) == ["rank0.json", "rank1.json"][:ranks]
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == set(range(ranks))
    streams = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert streams == {"compute", "runs"} | ({"communication dp"} if ranks > 1 else set())
