"""The program of a call: out of the cache if it is there, else compiled and kept, once for all ranks of a launch."""

from __future__ import annotations

import atexit
import logging
import operator
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autopar.cache.assumptions import assumptions_of, listed, met
from autopar.cache.between_machines import Delivery
from autopar.cache.code_digests import digest
from autopar.cache.entry import Header, live_guard, stored_guard
from autopar.cache.folder import Folder, described, most_bytes, place
from autopar.cache.kept_program import KeptProgram, Write
from autopar.cache.key import Request, facts_of, key_of
from autopar.cache.once import Turn, folder_of_launch, is_one_of_many, remove_folder_of_launch, turn
from autopar.cache.packing import packed, unpacked
from autopar.cache.reasons import NotMet, Unstorable
from autopar.ir.graph_pass import DUMP
from autopar.ir.guards import Guards
from autopar.ir.made_buffers import made_buffers_of
from autopar.ir.model_runs import model_runs
from autopar.ir.program import AnyProgram
from autopar.notes import heard, start_log, warn
from autopar.observation.trace_record import TraceRecord, records_of_traces
from autopar.plan import Plan

Found = tuple[AnyProgram, Guards]
COMPARED = 8  # entries of other keys, to say why a program is not there

logger = logging.getLogger("autopar")


def cached_program(request: Request, write: Write | None = None) -> Found:
    """The program of ``request``, the same whether it was compiled now or before, and what it assumes.

    ``write``: makes the Python that is kept with the program, for :class:`autopar.ir.stored_graph.Shelf`.

    Raises the errors of :func:`autopar.compiler.compile_program`.
    """
    start_log()
    folder = folder_in_use()
    if folder is None:
        return _compiled(request)
    try:
        facts = {name: digest(fact) for name, fact in facts_of(request).items()}
    except Unstorable as reason:
        logger.debug("compiling, and not keeping it: %s", reason)
        return _compiled(request)
    key = key_of(facts)
    found = _in(folder, key, request)
    if found is not None:
        return found
    longest = request.plan.timeout / 2
    with turn(folder, key, longest) as mine:
        found = _in(folder, key, request) if mine.waited else None
        if found is None:
            delivery = Delivery(key)
            found = _delivered(folder, delivery.taken(longest), request, write)
        if found is None:
            _say_why(folder, key, facts)
            found = _made(folder, key, facts, request, mine, delivery, write)
    return found


def folder_in_use() -> Folder | None:
    """The cache; where nothing can be written there, a folder that the ranks of this launch share; None for none."""
    path = place()
    if path is None or DUMP in os.environ:  # then somebody wants to see the passes at work
        return None
    folder = Folder(path, most_bytes())
    if folder.ready():
        return folder
    return _shared_folder() if is_one_of_many() else None


@cache
def _shared_folder() -> Folder | None:
    path = folder_of_launch()
    if path is None:
        return None
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK")) == "0":
        atexit.register(remove_folder_of_launch, path)
    return Folder(path, most_bytes())


# ---------------------------------------------------------------- finding


def _in(folder: Folder, key: str, request: Request) -> Found | None:
    """The entry of ``key`` whose assumptions hold for this model and in this process."""

    def read(path: Path, parts: list[bytes]) -> Found:
        start = time.perf_counter()
        is_ours = folder.is_ours_alone(path)
        program, guards, renewed = _of_entry(request, *parts[1:], may_run=is_ours)
        if renewed is not None and is_ours:
            folder.write(path.stem, parts[0], renewed, *parts[2:])
        logger.debug("%s was compiled before (%.2f s)", path.name, time.perf_counter() - start)
        return program, guards

    return folder.first(key, "the compiled program", read)


def _delivered(folder: Folder, entry: list[bytes], request: Request, write: Write | None) -> Found | None:
    """The program of an ``entry`` that another machine gave, put into the folder; None if it does not serve.

    The Python of it is written here: what comes over a network is data.
    """
    if not entry:
        return None
    name, *parts = entry
    try:
        program, guards, _ = _of_entry(request, *parts[1:], may_run=False)
        kept = KeptProgram.of(program, request.plan, write)
    except NotMet as reason:
        logger.debug("what another machine compiled does not serve: %s", reason)
        return None
    except Exception as problem:
        logger.warning("what another machine compiled cannot be read (%r)", problem)
        return None
    logger.debug("%s was compiled on another machine", name.decode())
    folder.write(name.decode(), *parts[:2], *kept.parts)
    return _read(kept, request, may_run=True), guards


def _of_entry(
    request: Request, header_bytes: bytes, *program: bytes, may_run: bool
) -> tuple[AnyProgram, Guards, bytes | None]:
    """With another header, where that would be told sooner next time.

    ``may_run``: whether the Python that is kept with it is what this user has written. Raises NotMet.
    """
    header: Header = unpacked(header_bytes, request.plan)
    looks = [live_guard(stored, request.model) for stored in header.looks]
    leaves = request.leaves
    if looks and any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
        raise NotMet("Python looks at values in the inputs, which have none")
    for values in looks:
        change = values.change(leaves)
        if change:
            raise NotMet(change)
    guards, assumptions = met(header.assumptions, request.model)
    found = _read(KeptProgram.from_parts(program), request, may_run=may_run)
    guards.values.extend(looks)
    for note in header.notes:
        warn(note, stacklevel=5)
    if all(map(operator.is_, assumptions, header.assumptions)):
        return found, guards, None
    return found, guards, packed(replace(header, assumptions=assumptions), request.plan)


def _say_why(folder: Folder, key: str, facts: Mapping[str, str]) -> None:
    """What differs from the entry that is most alike, for who wants to know."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    best: list[str] | None = None
    for file in folder.files()[:COMPARED]:
        content = folder.read(file.path)
        if content is None or file.path.name.startswith(key):
            continue
        try:
            header: Header = unpacked(content[1], Plan())
        except Exception:
            continue
        other = [name for name in dict.fromkeys((*facts, *header.facts)) if facts.get(name) != header.facts.get(name)]
        best = other if best is None or len(other) < len(best) else best
    reason = f"the one most like it differs in {listed(best)}" if best else "there is none like it"
    logger.debug("compiling, since the cache has no such program: %s", reason)


# ---------------------------------------------------------------- making


def compile_program(*call: Any) -> AnyProgram:
    """The compiler's. A launch whose programs are all there does not load it: its modules take 30 MB."""
    from autopar.compiler import compile_program

    return compile_program(*call)


def _compiled(request: Request) -> Found:
    model_runs()
    from autopar.observation.observation import guards_of_traces

    with guards_of_traces() as guards:
        program = compile_program(
            request.model,
            request.mesh,
            request.plan,
            request.args,
            request.kwargs,
            request.layouts,
            request.homes,
            request.like,
        )
    if request.plan.verify:
        from autopar.proof.verify import prove  # after the guards: what it traces is not what the program assumes

        prove(request.model, program, request.args, request.kwargs)
    return program, guards


def _made(
    folder: Folder,
    key: str,
    facts: Mapping[str, str],
    request: Request,
    mine: Turn,
    delivery: Delivery,
    write: Write | None,
) -> Found:
    start = time.perf_counter()
    try:
        with records_of_traces() as records, heard() as notes:
            found = _compiled(request)
    except BaseException as problem:
        mine.left_nothing(type(problem).__name__)
        delivery.give([])
        raise
    seconds = time.perf_counter() - start
    try:
        kept = KeptProgram.of(found[0], request.plan, write)
        name, about = _entry(key, facts, request, found, records, tuple(dict.fromkeys(notes)), seconds)
    except Unstorable as reason:
        logger.debug("not kept in the cache: %s", reason)
        mine.left_nothing(str(reason))
        delivery.give([])
        return found
    parts = [*about, *kept.parts]
    if not folder.write(name, *parts):
        mine.left_nothing("it could not be written")
    delivery.give([name.encode(), *parts])
    return _read(kept, request, may_run=True), found[1]


def _read(kept: KeptProgram, request: Request, *, may_run: bool) -> AnyProgram:
    """The program for ``request``, whose graphs are read when somebody looks into them."""
    program = kept.read(request.plan, may_run=may_run)
    return replace(program, made_buffers=made_buffers_of(request.model, program))


def _entry(
    key: str,
    facts: Mapping[str, str],
    request: Request,
    found: Found,
    records: Sequence[TraceRecord],
    notes: tuple[str, ...],
    seconds: float,
) -> tuple[str, list[bytes]]:
    """The name of an entry, and the parts that are not the program. Raises Unstorable."""
    program, guards = found
    assumptions = assumptions_of(records, guards, request.model, program.out_spec)
    call = program.fingerprint.call if program.fingerprint is not None else ""
    about = described(type(request.model).__name__, request.mesh, call, seconds)
    looks = tuple(stored_guard(guard, request.model) for guard in guards.values)
    header = packed(Header(dict(facts), assumptions, looks, notes), request.plan)
    states = [part for one in assumptions for pair in sorted(one.state.items()) for part in pair]
    seen = [repr(look.seen) for guard in guards.values for look in guard.looks]
    return f"{key}-{digest(*states, *seen)[:8]}", [about, header]


def prove_derived(model: nn.Module, program: AnyProgram, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """For ``Plan(verify=True)``: raise ProofError for a program of a family of sizes that is not the model's."""
    from autopar.proof.verify import prove

    model_runs()
    prove(model, program, args, kwargs, is_derived=True)
