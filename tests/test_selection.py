"""Tests that are slow by their names are those of today: a test that moves or is renamed would run again unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import WITHOUT_A_TEST
from tests.selection import LINES, without_a_test

TESTS = Path(__file__).parent


def test_each_file_exists() -> None:
    assert not [line for line in LINES if not (TESTS / line.partition("::")[0]).exists()]


def test_each_line_means_a_test_of_those_collected(request: pytest.FixtureRequest) -> None:
    assert request.config.stash.get(WITHOUT_A_TEST, []) == []


def test_a_line_without_a_test_is_seen() -> None:
    first, *others = [line for line in LINES if line.startswith("zoo/test_zoo.py") and "*" not in line]
    assert others and without_a_test([first]) == others
    assert without_a_test([first, *others]) == [] == without_a_test(["data/test_batches.py::test_any"])
