"""Families of programs, as they were fitted before: the same programs make the same family.

Fitting reads all nodes of the programs of four lengths. What comes out depends on these programs and on nothing of the
model beside them, so it is kept under a digest of how they are stored. That they are the model's is compared with each
of them, where it comes out of the cache (:mod:`autopar.cache.compiled`).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from autopar.cache.code_digests import digest, versions
from autopar.cache.compiled import folder_in_use
from autopar.cache.folder import Folder, described
from autopar.cache.packing import may_be_packed, packed_apart, unpacked_apart
from autopar.cache.reasons import Unstorable
from autopar.families.constants import Beginning
from autopar.families.family import Family, Point, fit
from autopar.families.forms import Evaluator, NoForm
from autopar.families.sizes import Range, Scheme
from autopar.frontend.fingerprint import own_files
from autopar.ir.program import AnyProgram, text_digest
from autopar.ir.stored_graph import shelf_of

NO_FAMILY = b"none"

may_be_packed(Family, Evaluator, Beginning, Range, Scheme)

logger = logging.getLogger("autopar")


def fitted(points: Sequence[Point], scheme: Scheme) -> Family:
    """As :func:`autopar.families.family.fit`, whether it was fitted now or before. Raises NoForm."""
    folder, contents = folder_in_use(), [_content_of(point.program) for point in points]
    if folder is None or None in contents:
        return fit(points, scheme)
    described = [part for point, content in zip(points, contents) for part in (repr(dict(point.sizes)), str(content))]
    key = digest("a family", own_files(), *versions(), repr(scheme), *described)
    found = _in(folder, key, points[0].program)
    if found is not None:
        return found
    start = time.perf_counter()
    try:
        family = fit(points, scheme)
    except NoForm as reason:
        folder.write(f"{key}-family", _about(points[0].program, str(scheme), start), NO_FAMILY, str(reason).encode())
        raise
    try:
        parts = _parts(family)
    except Unstorable as reason:
        logger.debug("the family is fitted again each time: %s", reason)
        return family
    folder.write(f"{key}-family", _about(family.template, str(family), start), *parts)
    return family


def _content_of(program: AnyProgram) -> str | None:
    """A digest of ``program`` as it is stored; None where it is not, or where somebody may have changed its graphs."""
    graphs = list(program.graphs.values())
    shelf = shelf_of(graphs[0])
    if shelf is None or shelf.content is None or not all(shelf_of(graph) is shelf for graph in graphs):
        return None
    return shelf.content()


def _about(program: AnyProgram, sizes: str, start: float) -> bytes:
    return described("a family", program.mesh, sizes, time.perf_counter() - start)


def _parts(family: Family) -> list[bytes]:
    """Raises Unstorable."""
    kept = copy.copy(family)
    kept.template = replace(family.template, made_buffers={})
    outside, graphs, _ = packed_apart(kept, family.template.plan)
    return [text_digest(family.template).encode(), outside, graphs]


def _in(folder: Folder, key: str, first: AnyProgram) -> Family | None:
    """``first``: the program of the first point, as this process has it. Raises NoForm, where that was found before."""

    def read(path: Path, parts: list[bytes]) -> Family | NoForm:
        _, text, *rest = parts
        if text == NO_FAMILY:
            return NoForm(rest[0].decode())
        outside, graphs = rest
        family: Family = unpacked_apart(outside, graphs, first.plan, text.decode(), None)
        family.template = replace(family.template, made_buffers=first.made_buffers)
        return family

    found = folder.first(key, "the family", read)
    if isinstance(found, NoForm):
        raise found
    return found
