"""The commands: what they print, their exit codes, their JSON, and what a user reads who made a mistake."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import autopar.compiler
from autopar import __version__
from autopar.__main__ import MOST_LINES
from autopar.check import Reference, Report
from autopar.commands.curves import sparkline
from autopar.commands.launch import report_failures
from autopar.commands.options import read_config, read_mesh
from autopar.commands.plan_options import read_plan
from autopar.compiler import split_program
from autopar.data.batch_source import Counts
from autopar.data.parts import Share
from autopar.data.token_sources import byte_tokens, usual_text
from autopar.data.token_stream import TokenStream
from autopar.ir.graph_pass import graph_pass, run_passes
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.passes import COMPILER
from autopar.training.loop import Curve, Run
from autopar.zoo.named import named_model
from tests import command_line
from tests.command_line import Outcome

Command = Callable[..., Outcome]


@pytest.fixture
def autopar_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """``autopar *arguments`` in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    return command_line.autopar


def in_processes(*arguments: str, cwd: Path) -> Outcome:
    """``autopar *arguments`` as a user starts it, which may start ranks; one of them compiles."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", "autopar", *arguments]
    environment = {**os.environ, "PYTHONPATH": path, "AUTOPAR_CACHE": str(cwd / "cache")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400, check=False)
    return done.returncode, done.stdout, done.stderr


# ---------------------------------------------------------------- looking


def test_version_and_help(autopar_command: Command) -> None:
    assert autopar_command("--version")[:2] == (0, f"autopar {__version__}\n")
    code, out, _ = autopar_command("--help")
    assert code == 0
    assert all(name in out for name in ("show", "check", "train", "compile", "run", "replay"))


def test_show_prints_the_compiler(autopar_command: Command) -> None:
    code, out, _ = autopar_command("show", "--passes")
    named = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2] != " "]
    assert code == 0 and named == [step.name for phase in COMPILER for step in phase.passes]
    assert "optimise  (on a pipeline, each stage by itself)\n  fuse_arithmetic           " in out
    assert max(map(len, out.splitlines())) <= 110
    code, out, _ = autopar_command("show", "--passes", "--json")
    phases = json.loads(out)
    assert [phase["phase"] for phase in phases if phase["each_stage"]] == ["optimise"]
    assert list(phases[3]["passes"]) == ["differentiate"]
    assert all(len(does.split()) > 5 for phase in phases for does in phase["passes"].values())


def test_show_after_any_pass(autopar_command: Command) -> None:
    """From before the first to after the last, by the names that --passes prints."""
    for after, graphs, sums in (("trace", 0, 0), ("split_batch", 0, 1), ("differentiate", 3, 3)):
        code, out, _ = autopar_command("show", "mlp", "--mesh", "dp=2", "--after", after)
        headings = [line for line in out.splitlines() if line in ("forward:", "backward:", "inference:")]
        assert code == 0 and len(headings) == graphs
        assert (out.count("comm.all_reduce") >= sums) and (sums > 0 or "comm." not in out)


def test_show_prints_the_split_program_and_what_a_rank_sends(autopar_command: Command) -> None:
    code, out, _ = autopar_command("show", "mlp", "--mesh", "dp=2,tp=2")
    assert code == 0
    assert out.startswith("program mesh(dp=2 tp=2)\n")
    assert "param blocks.0.up.weight" in out and "f32[192@tp,48]" in out
    assert "forward:" not in out, "by default the program is shown before it is differentiated"
    assert "tp  all_reduce" in out and "backward" in out, "the tables are those of the finished program"


@pytest.mark.parametrize("after, there, missing", [
    ("trace", "aten.cross_entropy_loss", "comm."),
    ("split_batch", "comm.all_reduce", "@tp"),
    ("differentiate", "\nbackward:", "no such text"),
])  # fmt: skip
def test_show_after_a_pass(autopar_command: Command, after: str, there: str, missing: str) -> None:
    code, out, _ = autopar_command("show", "mlp", "--after", after)
    program = out.partition("\nparameters")[0]
    assert code == 0 and there in program and missing not in program


def test_show_what_a_rank_runs(autopar_command: Command) -> None:
    code, out, _ = autopar_command("show", "mlp", "--rank", "3", "--json")
    document = json.loads(out)
    assert code == 0 and document["rank"] == 3
    functions = [node.name for node in ast.parse(document["text"]).body if isinstance(node, ast.FunctionDef)]
    assert functions == ["forward", "backward"]
    inference = json.loads(autopar_command("show", "mlp", "--rank", "3", "--inference", "--json")[1])["text"]
    assert [n.name for n in ast.parse(inference).body if isinstance(n, ast.FunctionDef)] == ["inference"]


def test_show_explains_and_sums_up(autopar_command: Command) -> None:
    code, out, _ = autopar_command("show", "mlp", "--explain", "blocks.0.up.weight")
    assert code == 0 and "split by rows over tp, because" in out and "program" not in out
    out = autopar_command("show", "mlp", "--summary")[1]
    assert "split over tp" in out and "aten." not in out
    assert "mlp.py" in autopar_command("show", "mlp", "--origins")[1]


def test_show_needs_no_weights(autopar_command: Command) -> None:
    """405B of 2 layers is 30 GB in float32: they are never there."""
    code, out, _ = autopar_command(
        "show", "models.llama:llama_405b", "--config", "layers=2", "--mesh", "dp=16,tp=8", "--length", "512", "--json"
    )
    document = json.loads(out)
    assert code == 0
    assert document["parameters"]["whole_bytes"] > 20e9
    assert document["parameters"]["rank_bytes"] == pytest.approx(document["parameters"]["whole_bytes"] / 8, rel=1e-3)


# ---------------------------------------------------------------- checking


def test_check(autopar_command: Command) -> None:
    code, out, _ = autopar_command("check", "mlp", "--mesh", "tp=2", "--plan", "seed=3")
    assert code == 0 and "the same" in out and "gradient of" in out
    code, out, _ = autopar_command("check", "mlp", "--mesh", "dp=3", "--mesh", "dp=2,tp=2", "--json")
    document = json.loads(out)
    assert code == 0 and [entry["mesh"] for entry in document["meshes"]] == [{"dp": 3}, {"dp": 2, "tp": 2}]
    assert all(max(entry["gradient_errors"].values()) <= 1e-10 for entry in document["meshes"])
    assert all(entry["traffic"] for entry in document["meshes"])


@pytest.mark.parametrize("error", [1e-9, math.nan])
@pytest.mark.parametrize("meshes", [["dp=2"], ["dp=2", "dp=3"]])
def test_check_fails(
    autopar_command: Command, monkeypatch: pytest.MonkeyPatch, error: float, meshes: list[str]
) -> None:
    """One wrong gradient among right ones ends in exit code 1, also one that is not a number."""

    right = Reference.check

    def wrong(*arguments: Any) -> Report:
        report = right(*arguments)
        return replace(report, grads={**report.grads, "head.weight": error})

    monkeypatch.setattr(Reference, "check", wrong)
    code, out, _ = autopar_command("check", "mlp", *(word for mesh in meshes for word in ("--mesh", mesh)))
    assert code == 1
    assert "not the same" in out or "2 of 2 meshes differ" in out


# ---------------------------------------------------------------- mistakes

MISTAKES = [
    (["show", "nothing_here"], "there is no model 'nothing_here'"),
    (["show", "./somewhere"], "there is no model './somewhere'"),
    (["show", "models/llama"], "there is no model 'models/llama'"),
    (
        ["schedule", "1f1b", "--stages", "2", "--svg", "no-such-folder/x.svg"],
        "--svg no-such-folder/x.svg: No such file",
    ),
    (["show", "llama:nope"], "llama_405b, llama_70b"),
    (["show", "hf:nope"], "tiny: with one of llama"),
    (["show", "mlp", "--mesh", "dp=2,xx=2"], "mesh axis 'xx' is unknown"),
    (["show", "mlp", "--mesh", "dp"], "is not of the form axis=size"),
    (["show", "mlp", "--after", "nope"], "split_tensors"),
    (["show", "mlp", "--rank", "4"], "ranks 0 to 3"),
    (["show", "mlp", "--explain", "nope"], "no node or parameter 'nope'"),
    (["check", "mlp", "--plan", "sequense=megatron"], "Plan has no choice 'sequense'"),
    (["check", "mlp", "--plan", "tensor=column"], "tensor.ENTRY=VALUE"),
    (["check", "mlp", "--plan", "timeout=soon"], "timeout='soon'"),
    (["check", "mlp", "--config", "layer=2"], "has no field 'layer'"),
    (["check", "mlp", "--config", "layers"], "key=value"),
    (["check", "models.llama:llama_8b"], "too large"),
    (["train", "mlp", "--mesh", "1"], "no vocabulary"),
    (["train", "llama", "--mesh", "1"], "--config vocab=288"),
    (["train", "llama", "--text", "no-such-file"], "No such file"),
    (["train", "llama", "--device", "abacus"], "auto, cpu, cuda"),
    (["run", "no-such-directory"], "no-such-directory"),
    (["replay", "no-such-file", "--pass", "split_batch"], "cannot be read"),
    (["show"], "of which MODEL?"),
    (["show", "mlp", "--after", "nope"], "there is no pass 'nope' here; in order there are trace, canonicalize, "),
    (["replay", "no-such-file", "--pass", "nope"], "there is no pass 'nope'"),
]


@pytest.mark.parametrize("arguments, said", MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes(autopar_command: Command, arguments: list[str], said: str) -> None:
    code, out, err = autopar_command(*arguments)
    assert code == 2 and said in err, err
    assert out == "" and "Traceback" not in err and len(err.splitlines()) <= MOST_LINES


def test_debug_shows_the_traceback(autopar_command: Command) -> None:
    for arguments in (["--debug", "show", "nope"], ["show", "nope", "--debug"]):
        code, _, err = autopar_command(*arguments)
        assert code == 2 and "Traceback" in err


def test_a_fault_of_autopar(autopar_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **more: Any) -> Program:
        raise RuntimeError("this cannot happen")

    monkeypatch.setattr(autopar.compiler, "split_program", broken)
    code, _, err = autopar_command("show", "mlp")
    assert code == 3 and "a fault of autopar" in err and "this cannot happen" in err


def test_options_are_read() -> None:
    assert read_mesh("1").world_size == 1
    assert read_config(["a=2", "b=0.5", "c=true", "d=none", "e=relu", "f=1e-3"]) == {
        "a": 2, "b": 0.5, "c": True, "d": None, "e": "relu", "f": 0.001,
    }  # fmt: skip
    plan = read_plan(["sequence=megatron", "tensor.*.o.weight=row", "batch_dims.mask=none", "check_numerics=false"])
    assert plan.sequence == "megatron" and dict(plan.tensor) == {"*.o.weight": "row"}
    assert dict(plan.batch_dims) == {"mask": None} and not plan.check_numerics


# ---------------------------------------------------------------- training


def test_byte_text() -> None:
    text = TokenStream(byte_tokens(bytes(range(100))), batch=2, length=10)
    first, second, last = text(0)["input_ids"], text(1)["input_ids"], text(9)["input_ids"]
    assert first[0].tolist() == list(range(10)) and first[1].tolist() == list(range(50, 60))
    assert second[:, 0].tolist() == [10, 60], "each row goes on where it stopped"
    assert last[1].tolist() == list(range(40, 50)), "and starts over at the end of the text"
    halves = slice(5), slice(5, None)
    for rank, (rows, positions) in enumerate([(slice(1), halves[0]), (slice(1), halves[1]), (slice(1, 2), halves[0])]):
        part = text(9, Share.of(Mesh(dp=2, sp=2), rank))["labels"]
        assert torch.equal(part, text(9)["labels"][rows, positions])
    with pytest.raises(ValueError, match="the data has 3 bytes"):
        TokenStream(byte_tokens(b"abc"), 2, 10)
    assert len(usual_text()) > 100_000


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, 2.0, 3.0], 0.0, 3.0) == "▁▃▆█"
    assert len(sparkline(list(range(1000)), 0.0, 999.0, width=50)) == 50
    assert sparkline([math.nan, 1.0], 0.0, 1.0) == "!█"


def test_a_loss_that_is_no_number_is_a_difference() -> None:
    run = Run(Curve([1.0, math.nan]), Curve([1.0, 2.0]), (), 1, Counts(2, None))
    assert run.difference is not None and math.isnan(run.difference)


def test_train_on_one_device(autopar_command: Command, tmp_path: Path) -> None:
    code, out, _ = autopar_command(
        "train", "llama", "--config", "vocab=288", "--mesh", "1", "--steps", "3", "--length", "16"
    )
    assert code == 0 and "the same" in out and "tokens/s" in out


def test_train_on_two_ranks(tmp_path: Path) -> None:
    small = ["--config", "vocab=288", "--config", "layers=1", "--steps", "4", "--length", "16"]
    code, out, err = in_processes(
        "train", "llama", "--mesh", "tp=2", *small, "--json", "--log", "log.jsonl", cwd=tmp_path
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["mesh"] == {"tp": 2} and document["largest_difference"] <= 1e-4
    assert len(document["losses"]) == 4 and document["losses"][-1] < document["losses"][0]
    assert {entry["phase"] for entry in document["traffic_per_step"]} == {"forward", "backward", "clipping"}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["loss"] for line in lines] == document["losses"]


@pytest.mark.slow
def test_train_with_the_sequence_split(tmp_path: Path) -> None:
    """The losses are those of one process, and each rank makes its part of the batches only."""
    small = ["--config", "vocab=288", "--config", "layers=1", "--length", "16", "--batch", "4", "--steps", "4"]
    plan = ["--plan", "precision.param=float64", "--plan", "check_numerics=false"]
    code, out, err = in_processes("train", "llama", "--mesh", "sp=2", *small, *plan, "--json", cwd=tmp_path)
    assert code == 0, err
    document = json.loads(out)
    assert document["mesh"] == {"sp": 2} and document["largest_difference"] <= 1e-5 and len(document["losses"]) == 4
    ids = 4 * 8 * 8 // 2  # rows x positions x bytes: half of them are another rank's in zig-zag order
    reorder = [t for t in document["traffic_per_step"] if t["collective"] == "reorder" and t["phase"] == "forward"]
    assert reorder and reorder[0]["bytes"] >= ids
    code, _, err = in_processes("train", "llama", "--mesh", "sp=2", "--length", "15", cwd=tmp_path)
    assert code == 2 and "--length 15: sp=2 does not divide it" in err and "--length 16" in err


@pytest.mark.slow
def test_a_mistake_that_every_rank_sees_is_told_once(tmp_path: Path) -> None:
    arguments = ["train", "llama", "--config", "vocab=288", "--batch", "3", "--mesh", "dp=2", "--plan", "inputs=local"]
    code, _, err = in_processes(*arguments, cwd=tmp_path)
    assert code == 2
    assert err.count("does not divide") == 1 and "every rank" in err
    assert "Traceback" not in err and len(err.splitlines()) <= MOST_LINES


# ---------------------------------------------------------------- programs on disk


def test_compile_and_run(autopar_command: Command, tmp_path: Path) -> None:
    """A written program, the model's weights and a batch give the model's outputs."""
    code, out, _ = autopar_command("compile", "mlp", "-o", "out", "--mesh", "tp=2")
    assert code == 0 and "autopar run out" in out
    ast.parse((tmp_path / "out" / "stage0" / "rank.py").read_text())
    example = named_model("mlp", seed=5)
    save_file(example.model.state_dict(), tmp_path / "weights.safetensors")
    save_file(example.batch, tmp_path / "inputs.safetensors")
    files = ["--weights", "weights.safetensors", "--inputs", "inputs.safetensors", "--output", "found.safetensors"]
    code, out, err = in_processes("run", "out", *files, "--json", cwd=tmp_path)
    assert code == 0, err
    assert json.loads(out)["mesh"] == {"tp": 2}
    expected = example.model(**example.batch)
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == {"loss", "logits"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].detach())


def test_replay(autopar_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed pass leaves the program before it, on which the pass can be run again."""
    monkeypatch.setenv("AUTOPAR_DUMP_DIR", "left")
    example = named_model("mlp")
    before = split_program(example.model, Mesh(dp=2), None, (), example.batch, after="write_losses_as_sums")

    @graph_pass()
    def split_batch(program: Program) -> Program:
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        run_passes(before, [split_batch])
    code, out, _ = autopar_command("replay", "left/autopar-failed-split_batch.txt", "--pass", "split_batch")
    assert code == 0, "the fixture's directory is where the file was left"
    assert "all_reduce 0 -> 2" in out and "f32[12@dp,48]" in out


def failure(rank: int, exitcode: int, reason: dict[str, Any] | None, directory: Path) -> ProcessFailure:
    """What torchrun knows about a rank that ended; ``reason`` is what the rank has left."""
    path = directory / f"{rank}.json"
    if reason is not None:
        path.write_text(json.dumps({"timestamp": 7, **reason}))
    return ProcessFailure(rank, 1000 + rank, exitcode, str(path))


FOLLOWER = {"message": "a peer ended", "kind": "RankFailedError", "timestamp": 1}
MISTAKE = {"message": "wrong mesh", "kind": "ValueError"}


@pytest.mark.parametrize("ends, code, said", [
    ([(-15, None), (-9, None)], 2, "rank 1: ended by signal SIGKILL"),
    ([(2, FOLLOWER), (-9, None)], 2, "rank 1: ended by signal SIGKILL"),
    ([(2, FOLLOWER), (2, MISTAKE)], 2, "rank 1: wrong mesh"),
    ([(2, MISTAKE), (2, MISTAKE)], 2, "every rank: wrong mesh"),
    ([(3, {"message": "a fault", "kind": "KeyError"})], 3, "rank 0: a fault"),
    ([(1, None)], 1, ""),
])  # fmt: skip
def test_the_rank_that_failed_first_is_named(
    ends: list[tuple[int, dict[str, Any] | None]],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failures = {rank: failure(rank, *end, tmp_path) for rank, end in enumerate(ends)}
    assert report_failures(failures, 2) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("mesh", ["dp=2", "tp=2", "pp=2", "pp=2,tp=2", "pp=2,dp=2,tp=2"])
def test_explain_on_every_axis(autopar_command: Command, mesh: str) -> None:
    code, out, err = autopar_command("show", "mlp", "--mesh", mesh, "--explain", "linear")
    assert code == 0, err
    for axis in mesh.replace("=2", "").split(","):
        assert any(line.split()[:1] == [axis] for line in out.splitlines()), out
    if "pp" in mesh:
        assert "pp      stage 0" in out
