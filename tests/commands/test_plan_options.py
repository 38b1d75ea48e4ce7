"""The options of a plan: the same for every command, from fields of ``Plan``; files; errors as text and as JSON."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from autopar.__main__ import main
from autopar.commands.deferred import COMMANDS, Deferred
from autopar.commands.plan_options import PlanChoices
from autopar.plan import Plan
from autopar.precision import Precision

OF_A_PLAN = ("show", "check", "coverage", "train", "compile", "export", "diff")
ORDER = (0, 2, 1, 3)
# an option with its words -> the field that it sets, and the value
GIVEN: dict[str, tuple[str, Any]] = {
    "--sequence megatron": ("sequence", "megatron"),
    "--attention ring": ("attention", "ring"),
    "--expert-axes ep+tp": ("expert_axes", "ep+tp"),
    "--expert-placement layers.0=0,2,1,3": ("expert_placement", {"layers.0": ORDER}),
    "--record-load": ("record_load", True),
    "--capacity-factor 1.25": ("capacity_factor", 1.25),
    "--zero 3": ("zero", 3),
    "--no-reshard-after-forward": ("reshard_after_forward", False),
    "--recompute none": ("recompute", "none"),
    "--recompute 0.5": ("recompute", 0.5),
    "--precision bf16": ("precision", Precision("bfloat16")),
    "--precision param=bf16,reduce=float32": ("precision", Precision("bfloat16", "float32")),
    "--microbatches 4": ("microbatches", 4),
    "--microbatch-weights rows": ("microbatch_weights", "rows"),
    "--schedule zb-v": ("schedule", "zb-v"),
    "--virtual-stages 1": ("virtual_stages", 1),
    "--tensor *.o.weight=row --tensor *.up=column": ("tensor", {"*.o.weight": "row", "*.up": "column"}),
    "--inputs local": ("inputs", "local"),
    "--batch-dims mask=none": ("batch_dims", {"mask": None}),
    "--sequence-dims x=1": ("sequence_dims", {"x": 1}),
    "--lengths each": ("lengths", "each"),
    "--outputs full": ("outputs", "full"),
    "--on-unknown replicate": ("on_unknown", "replicate"),
    "--on-indivisible error": ("on_indivisible", "error"),
    "--no-check-numerics": ("check_numerics", False),
    "--prove": ("verify", True),
    "--bucket-mb 0": ("bucket_mb", 0),
    "--overlap-mb 1e3": ("overlap_mb", 1000.0),
    "--dropout-seed 7": ("seed", 7),
    "--initial checked": ("initial", "checked"),
    "--cuts layers.1,layers.2": ("cuts", ("layers.1", "layers.2")),
    "--cuts layers.1 --cuts layers.2": ("cuts", ("layers.1", "layers.2")),
    "--stage-memory-gb 80": ("stage_memory_gb", 80),
    "--compile inductor": ("compile", "inductor"),
    "--timeout 9": ("timeout", 9),
}


def chosen(*arguments: str, command: str = "show") -> PlanChoices:
    """What the command gets of ``arguments``, parsed by typer."""
    loaded = Deferred(command).loaded()
    given = loaded.make_context(command, ["mlp", *arguments]).params
    names = [entry.name for entry in PlanChoices.parameters()]
    return PlanChoices.of({name: _as_typer_gives(given[name]) for name in names})


def _as_typer_gives(value: Any) -> Any:
    return value if not isinstance(value, tuple) else list(value) or None


@pytest.mark.parametrize("text, field, value", [(text, *value) for text, value in GIVEN.items()], ids=list(GIVEN))
def test_every_field_has_an_option(text: str, field: str, value: Any) -> None:
    assert chosen(*text.split()).plan() == Plan(**{field: value})


def test_no_field_is_without() -> None:
    assert {field for field, _ in GIVEN.values()} == {entry.name for entry in fields(Plan)}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_with_a_plan_have_the_same_options(name: str) -> None:
    module, function, _ = COMMANDS[name]
    command = getattr(importlib.import_module(f"autopar.commands.{module}"), function)
    own = inspect.signature(command).parameters
    found = [parameter for parameter in PlanChoices.parameters() if own.get(parameter.name) is not None]
    assert len(found) in (0, len(PlanChoices.parameters())), "all of them or none"
    assert found or name not in OF_A_PLAN
    assert "as_json" in own, "every command has --json"


def test_what_goes_before_what(tmp_path: Path) -> None:
    """Options before --plan KEY=VALUE before files; entries of tables one by one, those of the line first."""
    file = tmp_path / "plan.toml"
    file.write_text(
        'zero = 1\nmicrobatches = 2\nschedule = "gpipe"\ncuts = ["a"]\n\n[precision]\nparam = "bf16"\n\n'
        '[tensor]\n"*.up" = "row"\n"*.down" = "row"\n'
    )
    plan = chosen("--plan", str(file), "--plan", "microbatches=4", "--zero", "3", "--tensor", "*.up=column").plan()
    assert (plan.zero, plan.microbatches, plan.schedule, plan.cuts) == (3, 4, "gpipe", ("a",))
    assert list(plan.tensor.items()) == [("*.up", "column"), ("*.down", "row")]
    assert plan.precision == Precision("bf16")
    assert chosen("--plan", str(file), "--precision", "reduce=float32").plan().precision == Precision("bf16", "float32")
    assert Plan.from_file(file) == chosen("--plan", str(file)).plan()
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    assert Plan.from_file(tmp_path / "plan.json") == plan


def test_a_schedule_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("rank 0: F0.0 B0.0")
    assert chosen("--schedule", str(tmp_path / "mine.txt")).plan().schedule == "rank 0: F0.0 B0.0"


MISTAKES = [
    ("--zero 7", "zero=7", "0, 1, 2, 3"),
    ("--zero x", "zero='x'", "0, 1, 2, 3"),
    ("--plan zeros=3", "'zeros': did you mean 'zero'?", "Way out"),
    ("--plan nothing.toml", "nothing.toml", "Way out"),
    ("--plan broken.toml", "is no TOML", "Way out"),
    ("--plan strange.toml", "strange.toml: Plan has no choice 'shedule': did you mean 'schedule'?", "Way out"),
    ("--plan list.json", "a table of choices", "Way out"),
    ("--plan tensor=column", "tensor.ENTRY=VALUE", "Way out"),
    ("--plan zero.x=column", "zero=VALUE", "Way out"),
    ("--tensor column", "--tensor column: it is not of the form", "Way out"),
    ("--precision int8", "param='int8'", "float16"),
    ("--precision paran=bf16", "'paran': did you mean 'param'?", "Way out"),
    ("--sequense megatron", "No such option", "--sequence"),
]


@pytest.mark.parametrize("arguments, said, way_out", MISTAKES, ids=[entry[0] for entry in MISTAKES])
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_mistakes(
    arguments: str,
    said: str,
    way_out: str,
    as_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.toml").write_text("zero 3")
    Path("strange.toml").write_text('shedule = "1f1b"')
    Path("list.json").write_text("[1]")
    before = sorted(Path().iterdir())
    monkeypatch.setattr(sys, "argv", ["autopar", "show", "mlp", *arguments.split(), *["--json"] * as_json])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and (err if as_json else out) == ""
    text = json.loads(out)["error"]["message"] if as_json else err
    text = " ".join(text.replace("│", " ").split())
    assert said in text and way_out in text and len((out + err).splitlines()) < 15
    assert sorted(Path().iterdir()) == before


def test_the_typer_of_a_command_is_made_of_its_bundles() -> None:
    app = typer.Typer()
    app.command()(importlib.import_module("autopar.commands.show").show)
    assert {"--zero", "--config", "--timeline"} <= {
        word for parameter in typer.main.get_command(app).params for word in parameter.opts
    }


def test_dump_is_a_directory_for_ranks_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOPAR_DUMP_DIR", "elsewhere")
    monkeypatch.chdir(tmp_path)
    for words in (["--dump", "left", "mesh", "dp=2"], ["mesh", "dp=2", "--dump=left"]):
        monkeypatch.setattr(sys, "argv", ["autopar", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code and os.environ["AUTOPAR_DUMP_DIR"] == str(tmp_path / "left")
    monkeypatch.setattr(sys, "argv", ["autopar", "mesh", "dp=2", "--dump"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
