"""What a program was made from is kept with it, and through a directory: traced, unsplit, before any pass."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan, ProgramFileError
from autopar.compiler import compile_program, place, split_program
from autopar.frontend.numerics import input_tensors, run_graph
from autopar.frontend.trace import trace
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.ir.text import operator_name
from autopar.program_files.directory import CONSTANTS, MANIFEST, SOURCE, SOURCE_OF_TAIL, TEXT
from autopar.program_files.program_file import load, save
from tests.program_files.damage import seal


class Shifted(nn.Module):
    """A mean over rows, which passes rewrite, and a table that the model makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("shift", torch.arange(8.0), persistent=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scale = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0])
        hidden = torch.relu(self.up(x)) * scale + self.shift
        return nn.functional.cross_entropy(self.down(hidden), labels)


def compiled(mesh: Mesh, plan: Plan | None = None, rows: int = 4) -> tuple[AnyProgram, nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, batch = Shifted(), {"x": torch.randn(rows, 4), "labels": torch.arange(rows) % 4}
    return compile_program(model, mesh, plan, (), batch), model, batch


def value_of(program: AnyProgram, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss by the source of ``program``."""
    assert program.source is not None
    found: Tensor = run_graph(program.source.graph, input_tensors(program.source, model, (), batch))[0]
    return found


@pytest.mark.parametrize("axes", [{}, {"dp": 1}, {"dp": 2, "tp": 2}, {"pp": 2}], ids=str)
def test_the_source_is_what_was_traced(axes: dict[str, int], tmp_path: Path) -> None:
    """Whatever the mesh; it computes what the model does, also after it was saved and read."""
    plan = Plan(microbatches=1) if "pp" in axes else None
    program, model, batch = compiled(Mesh(**axes), plan)
    save(program, tmp_path / "out")
    for found in (program, load(tmp_path / "out")):
        assert found.source is not None and str(found.source) == str(trace(model, (), batch))
        assert (found.source.passes, found.source.in_spec) == (("trace",), program.in_spec)
        assert torch.equal(value_of(found, model, batch), model(**batch))
        assert all(stage.source is None for stage in found.parts if stage is not found)
    operators = {operator_name(node.target) for node in program.source.graph.nodes if node.op == "call_function"}  # type: ignore[union-attr]
    assert "aten.cross_entropy_loss" in operators  # which the passes have written as a sum and a count


def test_programs_between_passes_have_it() -> None:
    model, batch = Shifted(), {"x": torch.randn(4, 4), "labels": torch.arange(4)}
    traced = trace(model, (), batch)
    for program in (split_program(model, Mesh(dp=2), Plan(), (), batch), place(traced, Mesh(tp=2), Plan())):
        assert str(program.source) == str(traced)


def test_a_smaller_last_microbatch_has_its_own(tmp_path: Path) -> None:
    program, model, batch = compiled(Mesh(pp=1), Plan(microbatches=2), rows=5)
    save(program, tmp_path / "out")
    for found in (program, load(tmp_path / "out")):
        assert isinstance(found, PipelinedProgram) and found.tail is not None
        first, last = ({name: x[rows] for name, x in batch.items()} for rows in (slice(3), slice(3, 5)))
        for part, rows in ((found, first), (found.tail, last)):
            assert torch.equal(value_of(part, model, rows), model(**rows))
    assert {SOURCE, SOURCE_OF_TAIL} <= json.loads((tmp_path / "out" / MANIFEST).read_text())["files"].keys()


def test_tensors_of_program_and_source_are_stored_once(tmp_path: Path) -> None:
    """Of those that the passes have folded, the source has its own."""
    program, _, _ = compiled(Mesh(tp=2))
    assert program.source is not None and program.source.constants
    shared = {name for name, x in program.source.constants.items() if program.constants.get(name) is x}
    save(program, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.source is not None and again.source.constants.keys() == program.source.constants.keys()
    assert again.constants.keys() == program.constants.keys()
    for name, tensor in again.source.constants.items():
        assert torch.equal(tensor, program.source.constants[name])
        assert (again.constants.get(name) is tensor) == (name in shared)
    save(again, tmp_path / "again")
    for name in (MANIFEST, TEXT, CONSTANTS, SOURCE):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_directories_without_a_source_load(tmp_path: Path) -> None:
    """Older ones have none; a source that a newer save does not have is gone from the directory."""
    program, _, _ = compiled(Mesh(tp=2))
    save(program, tmp_path / "out")
    save(replace(program, source=None), tmp_path / "out")
    assert not (tmp_path / "out" / SOURCE).exists()
    again = load(tmp_path / "out")
    assert again.source is None and str(again) == str(program)


WRONG = {  # a pattern, what stands in its place, what is said
    "another input": (r"labels( *)= input ", r"labels\1= input y ", "takes x, y; the program takes x, labels"),
    "another mesh": (r"mesh\(\)", "mesh(dp=2)", "on one rank"),
    "a role": (
        r"(?m)^  return .*",
        r"\g<0>\nforward:\n  x = input : f32[]\n  return 0=x\ninference:\n  x = input : f32[]\n  return 0=x",
        "one graph on one rank",
    ),
    "an operator that opens files": (r"aten\.relu\(", "aten.from_file(", "it opens files"),
    "a constant of another size": (
        r"(const lifted_tensor_0 *: f32)\[8\]",
        r"\1[9]",
        "the program says torch.float32.9.",
    ),
    "nothing": (r"(?s).*", "", "header of a program"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_source_is_refused(kind: str, tmp_path: Path) -> None:
    pattern, instead, words = WRONG[kind]
    save(compiled(Mesh(tp=2))[0], tmp_path)
    text = (tmp_path / SOURCE).read_text()
    changed = re.sub(pattern, instead, text, count=1)
    assert changed != text
    (tmp_path / SOURCE).write_text(changed)
    with pytest.raises(ProgramFileError, match="damaged"):
        load(tmp_path)
    seal(tmp_path)
    with pytest.raises(ProgramFileError, match=f"(?s){SOURCE}.*{words}"):
        load(tmp_path)


def test_a_source_without_a_text_form_is_left_out(tmp_path: Path) -> None:
    """The program is saved all the same: it does not need it."""
    program, model, batch = compiled(Mesh(tp=2))
    assert program.source is not None
    graph = program.source.graph
    relu = next(node for node in graph.nodes if "relu" in node.name)
    relu.kwargs = {"anything": object()}
    with pytest.warns(UserWarning, match="its source is left out"):
        save(program, tmp_path)
    assert load(tmp_path).source is None
