"""Commands on meshes with a pipeline: show, check, compile and run, train, save and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from autopar import Plan
from autopar.models import gpt
from tests.command_line import Outcome, autopar
from tests.launch import run_ranks

SMALL = ["--config", "vocab=288", "--config", "layers=2", "--config", "width=48", "--config", "heads=12"]


def test_show(tmp_path: Path) -> None:
    arguments = ["show", "gpt", "--mesh", "pp=2,tp=2", "--plan", "microbatches=4", "--batch", "8"]
    code, text, _ = autopar(*arguments, "--summary", "--timeline", "--timeline-svg", str(tmp_path / "picture.svg"))
    assert code == 0
    assert "slowest stage over mean" in text
    assert "schedule 1f1b: 2 pipeline ranks, 2 stages, 4 microbatches, bubble 25.00% of the computing time" in text
    assert "rank 1" in text and "split over pp" in text
    assert (tmp_path / "picture.svg").read_text().startswith("<svg")
    document = json.loads(autopar(*arguments, "--json")[1])
    assert [stage["stage"] for stage in document["stages"]["stages"]] == [0, 1]
    assert document["schedule"]["bubble"] == 0.25
    assert {entry["axis"] for entry in document["traffic"]} == {"pp", "tp"}
    assert document["parameters"]["split_bytes"]["pp"] > 0


def test_show_refuses_a_schedule_without_a_pipeline() -> None:
    code, _, said = autopar("show", "gpt", "--mesh", "dp=2", "--timeline")
    assert code == 2 and "mesh(dp=2) has no pipeline to draw" in said and "Traceback" not in said


def test_check() -> None:
    code, text, _ = autopar("check", "gpt", "--mesh", "pp=2,dp=2", "--plan", "microbatches=3", "--batch", "6", "--json")
    (found,) = json.loads(text)["meshes"]
    assert code == 0 and found["passed"]
    assert found["parameters"]["rank_bytes"] < found["parameters"]["whole_bytes"]


def run_of(directory: Path, *more: str) -> Outcome:
    return autopar("run", str(directory), *more)


def test_compile_and_run(tmp_path: Path) -> None:
    """Seven rows in four microbatches: the whole outputs of a saved program, of weights and inputs in files."""
    plan = ["--plan", "microbatches=4", "--plan", "schedule=interleaved"]
    code, _, said = autopar("compile", "gpt", "-o", str(tmp_path / "out"), "--mesh", "pp=2", *plan, "--batch", "7")
    assert code == 0, said
    torch.manual_seed(3)
    model = gpt.build().eval()
    batch = gpt.example_batch(model, 7)
    safetensors.torch.save_model(model, str(tmp_path / "weights"))
    safetensors.torch.save_file(batch, str(tmp_path / "inputs"))
    files = [f"--{name}={tmp_path / name}" for name in ("weights", "inputs", "output")]
    results = run_ranks(run_of, 2, tmp_path / "out", *files)
    assert [code for code, _, _ in results] == [0, 0], results
    found = safetensors.torch.load_file(str(tmp_path / "output"))
    with torch.no_grad():
        expected = model(**batch)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-5), name
    random = run_ranks(run_of, 2, tmp_path / "out", "--json")
    assert random[0][0] == 0 and json.loads(random[0][1])["traffic"]


def train(*arguments: str) -> Outcome:
    sizes = ["--length", "8", "--batch", "8"]
    return autopar("train", "gpt", *SMALL, *sizes, "--plan", "check_numerics=false", *arguments)


def losses(log: Path) -> list[float]:
    return [record["loss"] for record in map(json.loads, log.read_text().splitlines()) if "loss" in record]


def test_train_and_resume(tmp_path: Path) -> None:
    saved = ["--checkpoint", str(tmp_path / "saved"), "--every", "2", "--clip", "0.5"]
    pipeline = ["--mesh", "pp=2", "--schedule", "interleaved", "--virtual-stages", "2", "--microbatches", "3"]
    first = run_ranks(train, 2, *pipeline, "--steps", "3", "--log", str(tmp_path / "first.jsonl"), *saved, "--json")
    assert [code for code, *_ in first] == [0, 0], first
    document: dict[str, Any] = json.loads(first[0][1])
    assert (document["mesh"], document["schedule"], document["microbatches"]) == ({"pp": 2}, "interleaved", 3)
    assert document["largest_difference"] < 1e-4, "rank 0 trained the unmodified model too"
    rest = ["--steps", "5", "--resume", "--no-compare", *saved]
    again = run_ranks(train, 2, "--mesh", "pp=2", *rest, "--log", str(tmp_path / "again.jsonl"))
    assert [code for code, *_ in again] == [0, 0], again
    alone = run_ranks(train, 1, "--mesh", "1", "--steps", "5", "--clip", "0.5", "--log", str(tmp_path / "one.jsonl"))
    assert alone[0][0] == 0
    found = losses(tmp_path / "first.jsonl") + losses(tmp_path / "again.jsonl")
    expected = losses(tmp_path / "one.jsonl")
    assert len(found) == 5 and max(abs(a - b) for a, b in zip(found, expected)) < 1e-4


def test_train_refuses_accumulation_of_microbatches() -> None:
    code, _, said = train("--mesh", "pp=2", "--accumulate", "2")
    assert code == 2 and "--accumulate does not go with microbatches" in said


def test_plan_checks_schedules() -> None:
    refused = {
        "schedule='1f2b'.*it is one of 'gpipe', '1f1b'": {"schedule": "1f2b"},
        r"virtual_stages=0\): a whole number": {"virtual_stages": 0},
        "schedule='zb-v', virtual_stages=3.*has 2 stages per rank": {"schedule": "zb-v", "virtual_stages": 3},
        "has its own stages": {"schedule": "schedule mine:", "virtual_stages": 2},
    }
    for message, choices in refused.items():
        with pytest.raises(ValueError, match=message):
            Plan(**choices)
    assert Plan(schedule="interleaved", virtual_stages=3).virtual_stages == 3
