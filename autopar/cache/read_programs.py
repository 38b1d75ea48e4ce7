"""Programs of directories, as they were read before: a text of thousands of lines takes its time.

What is in the directory is looked at each time: the key is a digest of all of it, so that another file is another key.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from autopar.cache.code_digests import digest, versions
from autopar.cache.compiled import folder_in_use
from autopar.cache.folder import Folder, described
from autopar.cache.kept_program import KeptProgram, Write
from autopar.cache.reasons import NotMet, Unstorable
from autopar.frontend.fingerprint import own_files
from autopar.ir.program import AnyProgram
from autopar.notes import heard
from autopar.plan import Plan
from autopar.program_files.program_file import contents_of, parsed

BESIDE = Plan()  # of which a plan is written down what differs

logger = logging.getLogger("autopar")


def read_program(directory: str | Path, write: Write | None = None) -> AnyProgram:
    """As :func:`autopar.program_files.program_file.load`; ``write`` as
    :func:`autopar.cache.compiled.cached_program` takes it.

    Raises ProgramFileError.
    """
    directory, folder = Path(directory), folder_in_use()
    manifest, contents = contents_of(directory)
    if folder is None:
        return parsed(directory, manifest, contents)
    key = digest("a directory", str(manifest["sha256"]), own_files(), *versions())
    found = _in(folder, key)
    if found is not None:
        return found
    start = time.perf_counter()
    with heard() as notes:
        program = parsed(directory, manifest, contents)
    if notes:  # what it says depends on the process
        return program
    try:
        kept = KeptProgram.of(program, BESIDE, write, whole=True)
    except Unstorable as reason:
        logger.debug("the program in %s is read again each time: %s", directory, reason)
        return program
    call = program.fingerprint.call if program.fingerprint is not None else ""
    about = described(directory.name, program.mesh, call, time.perf_counter() - start)
    folder.write(f"{key}-read", about, *kept.parts)
    return kept.read(BESIDE, may_run=True)


def _in(folder: Folder, key: str) -> AnyProgram | None:
    def read(path: Path, parts: list[bytes]) -> AnyProgram:
        try:
            return KeptProgram.from_parts(parts[1:]).read(BESIDE, may_run=folder.is_ours_alone(path))
        except Exception as problem:  # a class or an operator that this process does not know: reading it says so
            raise NotMet(repr(problem)) from None

    return folder.first(key, "the program of a directory", read)
