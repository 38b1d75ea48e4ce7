"""The libraries that a page has inside: d3 and Observable Plot (charts), dagre (graphs); files of their npm packages.

``libraries/libraries.json`` pins versions and checksums. ``python -m autopar.report.bundled`` fetches the files again
with npm, and refuses those that differ.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "libraries"


@dataclass(frozen=True)
class Library:
    """``script``: its path in the package; ``file``, ``licence``: names in :data:`FOLDER`; ``sha256``: of the file."""

    package: str
    version: str
    script: str
    file: str
    licence: str
    sha256: str

    def text(self) -> str:
        """The script, without the reference to a map that a page does not have."""
        found = (FOLDER / self.file).read_text(encoding="utf-8")
        return "\n".join(line for line in found.split("\n") if not line.startswith("//# sourceMappingURL"))

    def licence_text(self) -> str:
        return f"{self.package} {self.version}\n\n{(FOLDER / self.licence).read_text(encoding='utf-8').strip()}"

    def is_intact(self) -> bool:
        return hashlib.sha256((FOLDER / self.file).read_bytes()).hexdigest() == self.sha256


def libraries() -> tuple[Library, ...]:
    """In the order in which a page runs them."""
    pinned = json.loads((FOLDER / "libraries.json").read_text(encoding="utf-8"))
    return tuple(Library(**entry) for entry in pinned.values())


def fetch(library: Library, folder: Path = FOLDER) -> None:
    """Write the script and the licence of ``library`` to ``folder``. Raises ValueError where the script is another."""
    with tempfile.TemporaryDirectory() as found:
        name = f"{library.package}@{library.version}"
        subprocess.run(["npm", "pack", "--silent", name], cwd=found, check=True, stdout=subprocess.DEVNULL)
        (packed,) = Path(found).glob("*.tgz")
        with tarfile.open(packed) as archive:
            script, licence = (_member(archive, path) for path in (library.script, "LICENSE"))
    if hashlib.sha256(script).hexdigest() != library.sha256:
        raise ValueError(f"{name}: {library.script} is not the file that libraries.json pins\nWay out: pin it anew.")
    (folder / library.file).write_bytes(script)
    (folder / library.licence).write_bytes(licence)


def _member(archive: tarfile.TarFile, path: str) -> bytes:
    found = archive.extractfile(f"package/{path}")
    assert found is not None, path
    return found.read()


if __name__ == "__main__":
    for one in libraries():
        fetch(one)
        print(f"{one.package} {one.version}: {one.file}")
