"""``autopar report``: the page, the document, two programs, and failures that leave nothing."""

from __future__ import annotations

import json
from pathlib import Path

from tests.commands.test_command_line import Command, autopar_command

__all__ = ["autopar_command"]  # the fixture


def test_a_page_of_two_plans_and_its_document(autopar_command: Command, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, printed, said = autopar_command(
        "report", "mlp", "--mesh", "dp=2", "--to-mesh", "dp=1,tp=2", "-o", str(page), "--json"
    )
    assert code == 0, said
    first, second = json.loads(printed)["reports"]
    assert (first["mesh"], second["mesh"]) == ("mesh(dp=2)", "mesh(dp=1 tp=2)")
    assert "tp" in json.loads(printed)["differences"]
    assert "mesh(dp=2) against mesh(dp=1 tp=2)" in page.read_text(encoding="utf-8")


def test_a_stored_program(autopar_command: Command, tmp_path: Path) -> None:
    stored = str(tmp_path / "program")
    assert autopar_command("compile", "mlp", "--mesh", "dp=2", "-o", stored)[0] == 0
    code, printed, said = autopar_command("report", stored, "-o", str(tmp_path / "page.html"))
    assert code == 0 and "page.html" in printed, said
    code, _, said = autopar_command("report", stored, "--compare", "dp=4")
    assert code == 2 and "Way out: --compare DIR" in said


def test_failures_leave_nothing(autopar_command: Command, tmp_path: Path) -> None:
    code, _, said = autopar_command("report", "mlp", "--mesh", "dp=1", "-o", str(tmp_path / "none" / "page.html"))
    assert code == 2 and "none" in said
    code, _, said = autopar_command("report", "mlp", "--optimizer", "adamq", "-o", str(tmp_path / "page.html"))
    assert code == 2 and "adamq" in said
    code, _, said = autopar_command("report", "mlp", "--compare", "zreo=3", "-o", str(tmp_path / "page.html"))
    assert code == 2 and "zero" in said
    assert not list(tmp_path.iterdir())
