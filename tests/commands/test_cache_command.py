"""``autopar cache``: where programs are kept, of what, and how they are deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autopar.cache.folder import Folder
from tests.command_line import autopar


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setenv("AUTOPAR_CACHE", str(tmp_path / "cache"))
    found = Folder(tmp_path / "cache", 10**6)
    assert found.ready()
    about = {"model": "Net", "mesh": "mesh(dp=2)", "call": "training, x f32[4,4]", "seconds": "1.5"}
    found.write("0" * 32 + "-1", json.dumps(about).encode(), b"header", b"p" * 2000)
    return found


def run(*arguments: str, code: int = 0) -> str:
    """What ``autopar *arguments`` prints, in one line."""
    found, printed, said = autopar(*arguments)
    assert found == code, said
    return (printed + said).replace("\n", "")


def test_it_lists_and_deletes(folder: Folder) -> None:
    shown = run("cache")
    for word in (str(folder.path), "1 programs", "Net", "mesh(dp=2)", "training, x f32[4,4]", "1.5 s", "2.19 kB"):
        assert word in shown, word
    found = json.loads(run("cache", "--json"))
    assert found["bytes"] == folder.files()[0].bytes and found["programs"][0]["model"] == "Net"
    assert "1 programs deleted" in run("cache", "--clear")
    assert folder.files() == []
    assert "0 programs" in run("cache")


def test_without_a_cache_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE", "0")
    assert "AUTOPAR_CACHE=0" in run("cache", code=2)
