"""``autopar show --module`` and ``--grep``: the lines of the text form that they ask for, and no others."""

from __future__ import annotations

import pytest

from autopar.analysis.selected_text import selected
from autopar.ir.program import format_program
from tests.traces.programs import compiled


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if " = " in line]


def test_lines_are_those_of_the_text_form() -> None:
    program = compiled("data and tensors")
    every = lines(format_program(program, origins=True))
    found = lines(selected(program, pattern=r"comm\.\w*all_reduce"))
    assert found == [line for line in every if "all_reduce(" in line and "comm." in line]
    assert found


def test_a_module_with_its_parameters_and_its_backward_pass() -> None:
    program = compiled("data and tensors")
    text = selected(program, "blocks.1.mlp")
    assert [line for line in text.splitlines() if line and not line.startswith(" ")] == [
        "program mesh(dp=2 tp=2)", "forward:", "backward:", "inference:",
    ]  # fmt: skip
    for line in lines(text):
        assert "blocks.1.mlp" in line or "p_blocks_1_mlp" in line, line
    assert any(line.startswith("p_blocks_1_mlp") and "param blocks.1.mlp" in line for line in lines(text))
    assert "  ..." in text.splitlines()


def test_a_prefix_of_a_number_is_another_module() -> None:
    """``blocks.1`` is not ``blocks.10``; here: ``block`` is none."""
    with pytest.raises(ValueError, match=r"nothing in a module 'block'; near it: blocks"):
        selected(compiled("data and tensors"), "block")


def test_both() -> None:
    found = lines(selected(compiled("data and tensors"), "blocks.0", "aten.linear"))
    assert found and all("aten.linear" in line and "blocks.0" in line for line in found)


def test_a_pipeline_without_its_schedule() -> None:
    text = selected(compiled("zero bubble"), pattern="aten.linear")
    headings = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert headings[0].startswith("program mesh(pp=2)") and any(line.startswith("stage 1") for line in headings)
    assert not any("schedule" in line or line.startswith("rank") for line in text.splitlines())


@pytest.mark.parametrize(
    ("module", "pattern", "words"),
    [(None, "(", "no regular expression"), (None, "nowhere_at_all", "no line matches"), ("blocks.7", None, "near it")],
)
def test_what_is_not_there(module: str | None, pattern: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        selected(compiled("data and tensors"), module, pattern)
