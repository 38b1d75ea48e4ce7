"""A module of torch is changed each time that it runs, however it is found."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from autopar.dtensors.late_modules import when_imported

NAME = "late_module_of_a_test"


def changed(module: ModuleType) -> None:
    module.value = f"changed {module.value}"


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{NAME}.py").write_text("value = 'own'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, NAME, raising=False)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("imported_before", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_each_run_is_changed(imported_before: bool, times: int) -> None:
    if imported_before:
        importlib.import_module(NAME)
    for _ in range(times):
        when_imported(NAME, changed)
    assert importlib.util.find_spec(NAME) is not None
    module = importlib.import_module(NAME)
    assert module.value == "changed " * times + "own"
    assert importlib.import_module(NAME).value == module.value
    assert importlib.reload(module).value == "changed " * times + "own"
    assert importlib.reload(module).value == "changed " * times + "own"
    del sys.modules[NAME]
    assert importlib.import_module(NAME).value == "changed " * times + "own"


@pytest.mark.usefixtures("late")
def test_what_nobody_finds_is_missing() -> None:
    when_imported("no_such_late_module", changed)
    assert importlib.util.find_spec("no_such_late_module") is None
