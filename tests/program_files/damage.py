"""Programs and weights files that no writer makes: damaged anywhere, sealed again, as somebody would who means harm."""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autopar.program_files.directory import CONSTANTS, MANIFEST, SOURCE, TEXT, checksum, entry

FILES = (MANIFEST, TEXT, CONSTANTS, SOURCE)
HUGE = (2**60, 2**63, -(2**63) - 1, 10**30, 10**9, -1, 0, 1e308, float("nan"))
VALUES: tuple[Any, ...] = (None, True, "", "../../etc/passwd", "a\nb", [], {}, [[[[]]]], [None], {"": {}}, *HUGE)
TOKENS = (
    str(2**60), "9" * 30, "9" * 5000, "-1", "1e999", "nan", "[" * 40, "]" * 9, "(" * 2000, '"', '"\\n"', '"\\ud800"',
    "#", "=", ":", ",", "@dp", "@pp", "<0 1>", "?", "~", "+", "{sum:dp}", "aten.save", "aten.from_file", "aten.set_",
    "aten.resize_", "os.system", "op.attention", "comm.all_to_all", "param w", "const c", "seed", "saved", "grad loss",
    "return", "forward:", "backward:", "stage 0 of 1000000000", "tail", "rank 1000000000: F0.0",
    "schedule x microbatches=1000000000 placement=0", "mesh(dp=1000000000)", "f32[1152921504606846976]",
    "f32[4294967296,4294967296]", "i64[]", "also x", "also w", "import os", "__class__",
    "\x00", "\x0b", "\x85", "\u2028", "\ud7ff",
)  # fmt: skip


def seal(directory: Path) -> None:
    """Give the files of a program the sums that its manifest says, as anybody can compute them."""
    manifest = json.loads((directory / MANIFEST).read_bytes())
    manifest["files"] = {
        name: entry((directory / name).read_bytes()) for name in FILES[1:] if (directory / name).exists()
    }
    manifest["sha256"] = checksum(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


# ---------------------------------------------------------------- ways to damage


def flipped(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 4, 30))):
        if damaged:
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def doubled(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    return content[:start] + content[chance.randrange(len(content) + 1) :]


def lines_moved(content: bytes, chance: random.Random) -> bytes:
    """Lines that are left out, stand twice, or stand elsewhere."""
    lines = content.split(b"\n")
    for _ in range(chance.randrange(1, 4)):
        place, other = chance.randrange(len(lines)), chance.randrange(len(lines))
        move = chance.choice(("drop", "copy", "swap"))
        if move == "drop" and len(lines) > 1:
            del lines[place]
        elif move == "copy":
            lines.insert(other, lines[place])
        else:
            lines[place % len(lines)], lines[other % len(lines)] = lines[other % len(lines)], lines[place % len(lines)]
    return b"\n".join(lines)


def words_changed(content: bytes, chance: random.Random) -> bytes:
    """Words of the text become others of it, or those of TOKENS."""
    words = content.decode("utf-8", "replace").split(" ")
    for _ in range(chance.choice((1, 1, 1, 3, 10))):
        words[chance.randrange(len(words))] = chance.choice((chance.choice(TOKENS), chance.choice(words)))
    return " ".join(words).encode("utf-8", "replace")


def json_changed(content: bytes, chance: random.Random) -> bytes:
    """A value somewhere in the JSON is another one, or is gone."""
    try:
        whole = json.loads(content)
    except ValueError:
        return content[1:]
    here, place = _somewhere(whole, chance)
    if here is None:
        return b"[]"
    if chance.random() < 0.3:
        del here[place]
    else:
        here[place] = chance.choice((*VALUES, whole if chance.random() < 0.1 else "x"))
        here = None
    try:
        return json.dumps(whole).encode()
    except ValueError:  # the whole inside itself
        return b"{" * 1000


def _somewhere(value: Any, chance: random.Random) -> tuple[Any, Any]:
    """A random container in ``value``, and a place in it."""
    found: tuple[Any, Any] = (None, None)
    while isinstance(value, (dict, list)) and value:
        place = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        found, value = (value, place), value[place]
        if chance.random() < 0.25:
            break
    return found


def header_changed(content: bytes, chance: random.Random) -> bytes:
    """The header of a safetensors file, with or without its right length."""
    if len(content) < 8:
        return content
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    changed = chance.choice((json_changed, flipped, words_changed, doubled))(header, chance)
    said = chance.choice((len(changed), len(changed), len(changed), length, 2**63, 2**40, 0))
    return struct.pack("<Q", said) + changed + data


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flipped, cut, doubled)
OF_FILE = {
    MANIFEST: (*BYTES, json_changed, json_changed, json_changed, json_changed),
    TEXT: (*BYTES, lines_moved, words_changed, words_changed, words_changed, words_changed),
    CONSTANTS: (*BYTES, header_changed, header_changed),
}
OF_FILE[SOURCE] = OF_FILE[TEXT]


def damage_program(directory: Path, chance: random.Random) -> str:
    """Damage one file of the program, or exchange two; seal it again in most cases. Gives what was done."""
    there = [name for name in FILES if (directory / name).exists()]
    name = chance.choice((TEXT, *there))
    if chance.random() < 0.05:
        other = chance.choice(there)
        one, two = (directory / name).read_bytes(), (directory / other).read_bytes()
        (directory / name).write_bytes(two)
        (directory / other).write_bytes(one)
        return f"{name} and {other} exchanged"
    way = chance.choice(OF_FILE[name])
    (directory / name).write_bytes(way((directory / name).read_bytes(), chance))
    sealed = chance.random() < 0.85
    if sealed:
        try:
            seal(directory)
        except (ValueError, TypeError, RecursionError):
            sealed = False
    return f"{way.__name__} of {name}{', sealed' if sealed else ''}"


# ---------------------------------------------------------------- what must not happen

_watched: list[tuple[Path, list[str]]] = []
_STARTING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind")
_CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink")
_WRITES = 0o1 | 0o2 | 0o100  # O_WRONLY, O_RDWR, O_CREAT


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    inside, found = _watched[-1]
    if event == "open" and isinstance(arguments[0], (str, bytes, Path)):
        path = Path(str(arguments[0], "utf-8") if isinstance(arguments[0], bytes) else arguments[0]).absolute()
        writes = isinstance(arguments[2], int) and arguments[2] & _WRITES
        if writes or not path.is_relative_to(inside) and path.suffix not in (".py", ".pyc", ".so"):
            found.append(f"open {path}")
    elif event in _STARTING or event in _CHANGING:
        found.append(f"{event} {arguments!r:.100}")


@contextmanager
def watched(inside: Path) -> Iterator[list[str]]:
    """What this process does, within the context, beside reading files in ``inside``: writing, starting, connecting."""
    if not getattr(watched, "hooked", False):
        sys.addaudithook(_hook)  # for the life of the process
        watched.hooked = True  # type: ignore[attr-defined]
    found: list[str] = []
    _watched.append((inside, found))
    try:
        yield found
    finally:
        _watched.pop()
