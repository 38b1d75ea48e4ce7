"""The libraries in the wheel are the files that are pinned, with their licences."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from autopar.report.bundled import FOLDER, libraries

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("library", libraries(), ids=lambda library: library.file)
def test_a_library_is_the_pinned_file(library) -> None:  # type: ignore[no-untyped-def]
    assert library.is_intact(), f"{library.file} was changed: python -m autopar.report.bundled fetches it again"
    assert "Permission" in library.licence_text() and "</script" not in library.text()
    assert "sourceMappingURL" not in library.text()


def test_nothing_else_is_bundled() -> None:
    pinned = {"libraries.json"} | {name for one in libraries() for name in (one.file, one.licence)}
    assert {path.name for path in FOLDER.iterdir()} == pinned


def test_the_wheel_has_the_files_of_the_page() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["autopar"]
    packed = {path for pattern in patterns for path in (ROOT / "autopar").glob(pattern)}
    files = {path for folder in ("page", "libraries") for path in (ROOT / "autopar/report" / folder).iterdir()}
    assert files <= packed
