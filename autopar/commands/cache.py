"""``autopar cache``: the compiled programs that are kept from launch to launch."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from autopar.cache.folder import PLACE, SIZE, File, Folder, most_bytes, place
from autopar.commands.options import Json
from autopar.commands.tables import print_json, stdout, table
from autopar.errors import AutoparError


def cache_command(
    clear: Annotated[bool, typer.Option("--clear", help="delete all of them")] = False,
    as_json: Json = False,
) -> None:
    """Say where compiled programs are kept from launch to launch, how large they are, and of what; or delete them.

    AUTOPAR_CACHE=DIR keeps them in another folder, AUTOPAR_CACHE=0 nowhere; AUTOPAR_CACHE_SIZE=2GB is what they may
    have together, the longest unused go first. AUTOPAR_LOG=debug says at each launch why a program was compiled.
    """
    from autopar.ir.traffic import size_text

    path = place()
    if path is None:
        raise AutoparError(f"there is no cache: {PLACE}=0\nWay out: another value, or none.")
    folder = Folder(path, most_bytes())
    if clear:
        count = folder.clear()
        print_json({"deleted": count}) if as_json else print(f"{count} programs deleted from {path}")
        return
    files = folder.files()
    total = sum(file.bytes for file in files)
    if as_json:
        rows = [{"file": file.path.name, "bytes": file.bytes, **_about(folder, file)} for file in files]
        print_json({"folder": str(path), "bytes": total, "most_bytes": most_bytes(), "programs": rows})
        return
    print(f"{path}: {len(files)} programs, {size_text(total)} of {size_text(most_bytes())} ({PLACE}, {SIZE})")
    if files:
        columns = ("model", "mesh", "call", "compiled in", "size", "used")
        stdout().print(table("", columns, [_row(folder, file) for file in files]))


def _row(folder: Folder, file: File) -> tuple[str, ...]:
    from autopar.ir.traffic import size_text

    about = _about(folder, file)
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used))
    seconds = f"{about.get('seconds', '?')} s"
    return (*(about.get(name, "?") for name in ("model", "mesh", "call")), seconds, size_text(file.bytes), used)


def _about(folder: Folder, file: File) -> dict[str, str]:
    parts = folder.read(file.path)
    return dict(json.loads(parts[0])) if parts else {}
