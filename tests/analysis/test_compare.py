"""``autopar.diff``: what differs is said once for all blocks, with its numbers; the same program differs in nothing."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.analysis.compare import Amount, Change
from autopar.analysis.footprint import held, sent
from autopar.analysis.peak import peak
from autopar.ir.program import AnyProgram, Program
from autopar.program_files.program_file import load, save
from tests import command_line
from tests.traces.programs import compiled


class Net(nn.Module):
    """Three blocks alike, of two linears each."""

    def __init__(self) -> None:
        super().__init__()
        pair = lambda: nn.Sequential(nn.Linear(8, 16, bias=False), nn.GELU(), nn.Linear(16, 8, bias=False))  # noqa: E731
        self.blocks = nn.ModuleList([pair() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


@cache
def program(mesh: str, **choices: Any) -> AnyProgram:
    plan = Plan(check_numerics=False, bucket_mb=0.0, **choices)
    return autopar.compile_program(Net(), Mesh.parse(mesh), plan, (), {"x": torch.randn(8, 8)})


def test_a_program_differs_in_nothing_from_itself() -> None:
    found = autopar.diff(program("dp=2,tp=2"), program("dp=2,tp=2"))
    assert not found and str(found) == "the programs are laid out alike, send and hold the same"


def test_another_mesh() -> None:
    """Column, then row: one line for each of the two weights of all blocks."""
    found = autopar.diff(program("dp=4"), program("dp=2,tp=2"))
    assert [(one.name, one.before, one.after) for one in found.choices] == [("dp", "4", "2"), ("tp", "(none)", "2")]
    assert [one for one in found.layouts if one.kind == "parameters"] == [
        Change("parameters", "blocks.*.0.weight", 3, "f32[16,8]", "f32[16@tp,8]"),
        Change("parameters", "blocks.*.2.weight", 3, "f32[8,16]", "f32[8,16@tp]"),
    ]
    assert not any("blocks.0" in one.name or "blocks.1" in one.name for one in found.layouts)
    made = Change("values", "blocks.*.0 aten.linear", 3, "f32[8@dp,16]", "f32[8@dp,16@tp]")
    assert made in found.layouts
    assert Amount("forward tp all_reduce blocks.*.2", 0, 3) in found.operations, "of the module whose sum it is"
    assert not any(" dp " in one.name for one in found.operations), "as many over dp as before"


def test_bytes_are_those_of_the_footprint() -> None:
    before, after = program("dp=4"), program("dp=2,tp=2")
    found = autopar.diff(before, after)
    wanted: dict[str, list[int]] = {}
    for side, of in enumerate((before, after)):
        for one in sent(of):
            wanted.setdefault(f"{one.phase} {one.axis} {one.name}", [0, 0])[side] = one.bytes
    assert {one.name: [one.before, one.after] for one in found.sent} == {
        name: sides for name, sides in wanted.items() if sides[0] != sides[1]
    }
    memory = {one.name: (one.before, one.after) for one in found.memory}
    assert memory["parameters"] == (held(before).rank, held(after).rank)
    assert isinstance(before, Program) and isinstance(after, Program)
    assert memory["most in backward"] == (peak(before).backward, peak(after).backward)


def test_another_plan() -> None:
    found = autopar.diff(program("dp=2"), program("dp=2", zero=3))
    assert [(one.kind, one.name) for one in found.choices] == [("plan", "zero")]
    splits = {one.name: (one.before, one.after) for one in found.layouts if one.kind == "parameters"}
    assert splits == {
        "blocks.*.0.weight": ("f32[16,8]", "f32[16@dp,8]"),
        "blocks.*.2.weight": ("f32[8,16]", "f32[8@dp,16]"),
    }
    assert any("all_gather" in one.name and one.before == 0 for one in found.operations)


def test_what_a_block_computes_itself_is_folded_too() -> None:
    """Its number is at the end of its path, before the operator."""
    found = autopar.diff(compiled("zero bubble"), compiled("pipeline with ZeRO-1"))
    assert any(one.name == "blocks.* aten.add.Tensor" and one.count == 4 for one in found.layouts), found.layouts


def test_pipelines() -> None:
    found = autopar.diff(program("pp=1,tp=2", microbatches=2), program("pp=2,tp=2", microbatches=2))
    assert any(one.name == "forward pp send" and one.before == 0 for one in found.sent)
    assert [one.name for one in found.memory] == ["parameters"]
    assert not any(one.kind == "parameters" for one in found.layouts)


def test_json_and_text_have_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = autopar.diff(program("dp=4"), program("dp=2,tp=2"))
    document = json.loads(json.dumps(found.to_json()))
    assert set(document) == {"choices", "layouts", "operations", "sent", "memory"}
    lines = str(found).splitlines()
    assert max(map(len, lines)) < 120
    for one in found.layouts:
        assert any(one.name in line and f"{one.before} -> {one.after}" in line for line in lines)


def test_long_lists_are_cut_in_text_only() -> None:
    many = tuple(Change("values", f"m{n}", 1, "a", "b") for n in range(100))
    found = autopar.diff(program("dp=4"), program("dp=2,tp=2"))
    text = str(type(found)((), many, (), (), ()))
    assert text.splitlines()[-1] == "  and 60 more; all of them: autopar diff --json"


# ---------------------------------------------------------------- the command


def command(*arguments: str) -> tuple[int, str, str]:
    return command_line.autopar("diff", *arguments)


def test_two_programs_on_disk(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a", "b")]
    for name, of in zip(names, (program("dp=4"), program("dp=2,tp=2"))):
        save(of, name)
    code, printed, _ = command(*names)
    assert code == 0 and printed.rstrip() == str(autopar.diff(load(names[0]), load(names[1])))
    assert "blocks.*.0.weight" in printed
    code, printed, _ = command(names[0], names[0], "--json")
    assert code == 0 and not any(json.loads(printed).values())


def test_a_model_with_two_plans() -> None:
    code, printed, _ = command("mlp", "--mesh", "dp=2", "--to-plan", "zero=3")
    assert code == 0 and "plan  zero    0 -> 3" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["mlp"], "compared with what?"), (["nowhere", "there"], "there is no directory nowhere")],
)
def test_what_cannot_be_compared(arguments: list[str], words: str) -> None:
    code, _, said = command(*arguments)
    assert code == 2 and words in said
