"""Files of the cache: whole or not there, bounded, and no reason to stop where none can be written."""

from __future__ import annotations

import builtins
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from autopar import AutoparError
from autopar.cache import folder as module
from autopar.cache.folder import Folder, most_bytes, place
from autopar.cache.reasons import NotMet
from tests.cache.launches import Launches, said
from tests.selection import slow_but

KEY = "0" * 32


@pytest.fixture(autouse=True)
def nothing_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_told", set())


def folder_of(path: Path, most: int = 1 << 20) -> Folder:
    folder = Folder(path, most)
    assert folder.ready()
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "cache")
    assert folder.write(f"{KEY}-1", b"header", b"program")
    (file,) = folder.files(KEY)
    assert folder.read(file.path) == [b"header", b"program"]
    assert os.stat(folder.path).st_mode & 0o077 == 0
    assert folder.files("1" * 32) == []


@pytest.mark.parametrize("part", ["format", "sum", "length", "header", "program", "end"])
def test_damage_is_a_miss_and_deleted(part: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write(f"{KEY}-1", b"header", b"program")
    (file,) = folder.files()
    content = bytearray(file.path.read_bytes())
    start = len(module.MAGIC)
    places = {"format": 3, "sum": start + 2, "length": start + 32 + 7, "header": start + 42, "program": -2}
    if part == "end":
        del content[-1:]
    else:
        content[places[part]] ^= 1
    file.path.write_bytes(content)
    with said() as messages:
        assert folder.read(file.path) is None
    assert folder.files() == [] and "is damaged and was deleted" in messages[0]


def test_the_first_entry_that_serves_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for age, content in enumerate((b"of another model", b"unreadable", b"serves", b"older")):
        folder.write(f"{KEY}-{age}", b"header", content)
        os.utime(tmp_path / f"{KEY}-{age}.program", (1000 - age, 1000 - age))

    def read(path: Path, parts: list[bytes]) -> bytes:
        if parts[1] == b"of another model":
            raise NotMet("weight changed")
        if parts[1] == b"unreadable":
            raise ValueError("no such operator")
        return parts[1]

    with said() as messages:
        assert folder.first(KEY, "the program", read) == b"serves"
    assert [file.path.name[33] for file in folder.files()] == ["2", "0", "3"]  # used last, and what failed is gone
    assert [message for message in messages if "no such operator" in message and "was deleted" in message]
    assert folder.first("1" * 32, "the program", read) is None


WRITER = """
import os, signal, sys
from pathlib import Path
from autopar.cache import folder
folder.os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
folder.Folder(Path(sys.argv[1]), 1 << 30).write("0" * 32 + "-1", b"header", b"p" * 100000)
"""


def test_a_writer_that_is_killed_leaves_no_entry(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert folder.files() == [] and len(list(tmp_path.iterdir())) == 1
    (draft,) = tmp_path.iterdir()
    os.utime(draft, (0, 0))  # long ago
    folder.write(f"{KEY}-2", b"header", b"program")
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY}-2.program"]


def test_those_not_used_for_longest_go(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, most=1000)
    now = time.time()
    for number in range(3):
        folder.write(f"{number}", b"", b"p" * 200)
        os.utime(tmp_path / f"{number}.program", (now - 100 + number, now - 100 + number))
    folder.touch(tmp_path / "0.program")
    folder.write("3", b"", b"p" * 200)
    assert sorted(file.path.stem for file in folder.files()) == ["0", "2", "3"]
    assert not folder.write("4", b"", b"p" * 2000), "larger than all may be"
    assert len(folder.files()) == 3


def fails(number: int) -> Any:
    def raised(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return raised


def full(path: Any, mode: str = "r", *_: Any, **choices: Any) -> Any:
    """A file on a full disk."""
    return builtins.open("/dev/full" if "x" in mode else path, mode.replace("x", "w"))


TROUBLES = {
    "a full disk": (module, "open", full, "there is no room"),
    "a disk that is read only": (os, "replace", fails(errno.EROFS), "Read-only file system"),
    "a quota": (os, "replace", fails(errno.EDQUOT), "there is no room"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_it_goes_on_without(trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, instead, words = TROUBLES[trouble]
    folder = folder_of(tmp_path)
    monkeypatch.setattr(owner, name, instead, raising=False)
    with said() as messages:
        assert [folder.write(f"{number}", b"header", b"program") for number in range(3)] == [False] * 3
    assert len(messages) == 1 and words in messages[0] and "AUTOPAR_CACHE=DIR" in messages[0]
    assert list(tmp_path.iterdir()) == []


NO_PLACE = ["no folder can be made", "nothing can be written", "a full disk"]


@pytest.mark.parametrize("case", slow_but([2], NO_PLACE))
def test_a_program_is_compiled_where_it_cannot_be_kept(
    case: str, launches: Launches, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "no folder can be made":
        cache_folder.touch()
    elif case == "nothing can be written":
        cache_folder.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        monkeypatch.setattr(os, "replace", fails(errno.EROFS))
    else:
        monkeypatch.setattr(module, "open", full, raising=False)
    with said(30) as messages:
        assert [launches.launch().compiled for _ in range(2)] == [1, 1]
    assert len(messages) == 1, messages


def test_where_and_how_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / name)
    for given, wanted in (("", tmp_path / "autopar" / "programs"), ("0", None), ("off", None), ("/a/b", Path("/a/b"))):
        monkeypatch.setenv("AUTOPAR_CACHE", given)
        assert place() == wanted
    for given, size in (("", 10**9), ("500MB", 5 * 10**8), ("1.5 gb", 15 * 10**8), ("17", 17)):
        monkeypatch.setenv("AUTOPAR_CACHE_SIZE", given)
        assert most_bytes() == size
    monkeypatch.setenv("AUTOPAR_CACHE_SIZE", "much")
    with pytest.raises(AutoparError, match="Way out: a number of bytes"):
        most_bytes()


def test_clear(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write("1", b"", b"p")
    (tmp_path / f"{KEY}.lock").touch()
    (tmp_path / "other.txt").touch()
    assert folder.clear() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]
