"""The script for a machine with a GPU, on this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def rows(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    code = gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path), *arguments])
    return code, json.loads((tmp_path / "gpu.json").read_text())


def test_a_short_run(tmp_path: Path) -> None:
    code, found = rows(tmp_path, "--sections", "machine,attention")
    assert code == 0 and {row["section"] for row in found} == {"machine", "attention"}
    text = (tmp_path / "gpu.txt").read_text().splitlines()
    assert len(text) == len(found) and torch.__version__ in text[0]


def test_a_section_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: gpu.Run) -> None:
        raise ValueError("no such kernel\nmore")

    monkeypatch.setitem(gpu.SECTIONS, "attention", fails)  # type: ignore[arg-type]
    code, found = rows(tmp_path, "--sections", "attention,machine")
    assert code == 1 and found[0]["what"] == "FAILED" and found[0]["beside"] == "no such kernel"
    assert found[-1]["section"] == "machine"


def test_an_unknown_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rows(tmp_path, "--sections", "nothing")
    assert "one of machine, ranks" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_script(tmp_path: Path) -> None:
    code, found = rows(tmp_path)
    assert code == 0, [row for row in found if row["what"] == "FAILED"]
    assert {row["section"].replace(" ", "_") for row in found} == set(gpu.SECTIONS)
    errors = [row["beside"].split()[-1] for row in found if row["section"] == "ranks" and row["what"] != "seconds"]
    assert len(errors) == len(gpu.SIMULATED) and all(float(error) <= 1e-10 for error in errors)
