"""``autopar schedule``: what it prints, its JSON and SVG, and a schedule that a user wrote."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autopar.__main__ import main
from autopar.schedules.text import parse_schedule

DOCS = Path(__file__).parent.parent.parent / "docs"

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def schedule_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """``autopar schedule *arguments`` in an empty directory: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["autopar", "schedule", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_drawing(schedule_command: Command) -> None:
    code, out, _ = schedule_command("1f1b", "--stages", "4", "--microbatches", "8")
    assert code == 0
    assert "1f1b: 4 ranks, 8 microbatches" in out
    assert "bubble     37.50% of the computing time (formula (p-1)/m: 37.50%)" in out
    assert "in flight  4, 3, 2, 1 activations at most" in out
    assert "check      passed: 160 instructions" in out
    assert sum(line.startswith("rank ") for line in out.splitlines()) == 4


def test_too_few_microbatches_for_the_formula(schedule_command: Command) -> None:
    assert (
        "(formula (p-1)/(6 m): from 4 microbatches on)"
        in schedule_command("zb-v", "--stages", "2", "--microbatches", "3")[1]
    )


def test_svg_and_text(schedule_command: Command, tmp_path: Path) -> None:
    code, out, _ = schedule_command("interleaved", "--stages", "2", "--virtual", "3", "--svg", "out.svg", "--text")
    assert code == 0
    text = out.split("\n\n")[0]
    assert parse_schedule(text).placement == (0, 1, 0, 1, 0, 1)
    picture = (tmp_path / "out.svg").read_text()
    assert "interleaved: 2 ranks of 3 stages, 4 microbatches, bubble 8.33% = (p-1)/(v m)" in picture


def test_the_picture_of_the_docs_is_what_is_drawn_now(schedule_command: Command, tmp_path: Path) -> None:
    assert schedule_command("zb-h1", "--stages", "4", "--microbatches", "8", "--svg", "out.svg")[0] == 0
    picture = DOCS / "schedule_zb_h1.svg"
    assert (tmp_path / "out.svg").read_text() == picture.read_text(), f"it changed: write {picture} again"


def test_json(schedule_command: Command) -> None:
    code, out, _ = schedule_command("zb-v", "--stages", "2", "--microbatches", "3", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["ranks"], found["microbatches"], found["placement"]) == (2, 3, [0, 1, 1, 0])
    assert found["bubble_formula"] == {"text": "(p-1)/(6 m)", "value": None}  # it holds from 4 microbatches on
    assert found["instructions"][0][0] == "F0.0"
    assert len(found["events"]) == 4 * 3 * 3
    assert {"bubble", "inner_bubble", "peak_in_flight", "check_seconds"} <= set(found)


def test_a_schedule_of_the_users_own(schedule_command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("rank 0: F0.0 F0.1 B0.0 B0.1\nrank 1: F1.0 B1.0 F1.1 B1.1\n")
    code, out, _ = schedule_command("mine.txt")
    assert code == 0
    assert "custom: 2 ranks, 2 microbatches" in out and "bubble     50.00% of the computing time (no formula)" in out
    assert "check      passed: 16 instructions" in out
    (tmp_path / "whole.txt").write_text(schedule_command("mine.txt", "--text")[1].split("\n\n")[0])
    assert "check      passed: 16 instructions" in schedule_command("whole.txt")[1]
    (tmp_path / "1f1b.txt").write_text("schedule 1f1b\nrank 0: F0.0 B0.0\nrank 1: F1.0 B1.0\n")
    assert "(no formula)" in schedule_command("1f1b.txt")[1]  # whatever it calls itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b",), "schedule 1f1b of how many pipeline ranks?\nWay out: --stages 4"),
        (("1f2b", "--stages", "4"), "there is no schedule '1f2b', and no such file\nWay out: one of gpipe, 1f1b"),
        (("zb-v", "--stages", "4", "--virtual", "3"), "schedule zb-v has 2 stages per rank, not 3"),
        (("bad.txt",), "rank 0 stands at B0.0, which needs B1.0 -> 0; rank 1 has that behind F1.1"),
        (("bad.txt", "--stages", "2"), "bad.txt says itself how large it is: leave out --stages"),
        (("twice.txt",), "schedule custom: rank 0 computes F0.0 twice, as instruction 1 and 2"),
        (("broken.txt",), "line 1, 'G0.0': no instruction"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, schedule_command: Command, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("rank 0: F0.0 B0.0 F0.1 B0.1\nrank 1: F1.0 F1.1 B1.0 B1.1\n")
    (tmp_path / "twice.txt").write_text("rank 0: F0.0 F0.0\nrank 1: F1.0\n")
    (tmp_path / "broken.txt").write_text("rank 0: F0.0 G0.0\n")
    code, out, err = schedule_command(*arguments)
    assert (code, out) == (2, "")
    assert message in err and len(err.splitlines()) < 15
