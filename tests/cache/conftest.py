"""A cache of its own for each test, and a script in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cache.launches import Launches


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which is on."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AUTOPAR_CACHE", str(folder))
    return folder


@pytest.fixture
def launches(tmp_path: Path, cache_folder: Path) -> Launches:
    folder = tmp_path / "script"
    folder.mkdir()
    return Launches(folder)
