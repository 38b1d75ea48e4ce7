"""Saving over a program: whatever happens to the disk or the process, the old program or the new one is there."""

from __future__ import annotations

import os
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from autopar.errors import ProgramFileError
from autopar.ir.parse import parse
from autopar.program_files import exchange
from autopar.program_files.program_file import load, save
from tests.program_files.test_program_file import example
from tests.texts import MLP


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("call", range(6))
def test_a_save_that_dies_half_way(call: int, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up at any write or rename, also where two directories cannot change places at once."""
    save(parse(MLP), tmp_path / "out")
    if not exchanges:
        monkeypatch.setattr(exchange, "_exchanged", lambda one, other: False)
    calls = iter(range(100))
    for name in ("write_bytes", "rename", "mkdir"):
        real = getattr(Path, name)

        def limited(self: Path, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            if next(calls) == call:
                raise OSError(28, "No space left on device")
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, limited)
    with pytest.raises(ProgramFileError, match="No space left on device"):
        save(example(), tmp_path / "out")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert str(load(tmp_path / "out")) == MLP


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("call", range(6))
def test_a_save_that_is_killed(call: int, exchanges: bool, tmp_path: Path) -> None:
    """The old program is there, or the new one; without an exchange at once, under the name that the message says."""
    save(parse(MLP), tmp_path / "out")
    if os.fork() == 0:
        calls = iter(range(100))

        def killed(self: Path, *args: Any, real: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                os._exit(9)
            return real(self, *args, **kwargs)

        if not exchanges:
            exchange._exchanged = lambda one, other: False  # type: ignore[assignment]
        for name in ("write_bytes", "rename", "mkdir"):
            setattr(Path, name, partialmethod(killed, real=getattr(Path, name)))
        save(example(), tmp_path / "out")
        os._exit(0)
    os.wait()
    try:
        found = load(tmp_path / "out")
    except ProgramFileError as error:
        assert not exchanges and f"has left the one before as {tmp_path / '.out.old'}: rename it" in str(error)
        found = load(tmp_path / ".out.old")
    assert str(found) in (MLP, str(example()))
