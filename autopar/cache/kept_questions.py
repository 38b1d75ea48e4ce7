"""What forward asks about sizes, as it was seen before: a later launch does not run the model on symbols again.

Kept as a program is (:mod:`autopar.cache.compiled`): under a key of all that is known before, with what the run has
read of the model, which is compared.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autopar.cache.assumptions import assumptions_of, met
from autopar.cache.code_digests import digest
from autopar.cache.compiled import folder_in_use
from autopar.cache.folder import Folder, described
from autopar.cache.key import Request, facts_of, key_of
from autopar.cache.packing import packed, unpacked
from autopar.cache.reasons import Unstorable
from autopar.ir.model_runs import model_runs
from autopar.ir.size_conditions import Condition, Dims
from autopar.observation.trace_record import records_of_traces

logger = logging.getLogger("autopar")


def questions(*call: Any) -> list[Condition]:
    """Those of a run on symbols. A launch that finds what was asked does not load it."""
    from autopar.frontend.size_questions import questions as asked

    model_runs()
    return asked(*call)


def kept_questions(request: Request, dims: Dims, sizes: Mapping[str, int]) -> list[Condition]:
    """As :func:`autopar.frontend.size_questions.questions` of a call, whether it is asked now or was before."""
    model, args, kwargs = request.model, tuple(request.args), request.kwargs
    folder = folder_in_use()
    if folder is None:
        return questions(model, args, kwargs, dims, sizes)
    try:
        facts = {name: digest(fact) for name, fact in facts_of(request).items()}
    except Unstorable:
        return questions(model, args, kwargs, dims, sizes)
    key = key_of(facts | {"questions": repr((list(map(list, dims)), dict(sizes)))})
    found = _in(folder, key, request, tuple(sizes))
    if found is not None:
        return found
    from autopar.observation.observation import guards_of_traces

    start = time.perf_counter()
    with records_of_traces() as records, guards_of_traces() as guards:
        asked = questions(model, args, kwargs, dims, sizes)
    if not records:  # it was not seen to the end
        return asked
    try:
        assumptions = assumptions_of(records, guards, model, None)
    except Unstorable as reason:
        logger.debug("what the model asks about sizes is not kept: %s", reason)
        return asked
    call = ", ".join(f"{name}={size}" for name, size in sizes.items())
    about = described(type(model).__name__, "questions about sizes", call, time.perf_counter() - start)
    state = digest(*(part for one in assumptions for pair in sorted(one.state.items()) for part in pair))
    told = json.dumps([[one.as_json(), one.line, one.is_number] for one in asked])
    folder.write(f"{key}-{state[:8]}", about, packed(assumptions, request.plan), told.encode())
    return asked


def _in(folder: Folder, key: str, request: Request, names: Sequence[str]) -> list[Condition] | None:
    def read(path: Path, parts: list[bytes]) -> list[Condition]:
        _, assumptions, told = parts
        met(unpacked(assumptions, request.plan), request.model)
        return [
            replace(Condition.of_json(tree, names), line=str(line), is_number=bool(is_number))
            for tree, line, is_number in json.loads(told)
        ]

    return folder.first(key, "what was asked about sizes,", read)
