"""What each variable of a rank's code is computed from, as one digest: two ranks that sum other things show it.

    mm_5 = aten_mm(t_2, view_17)                   digest of ("aten.mm.default", digest of t_2, digest of view_17)
    all_reduce_12 = comm.all_reduce(mm_5, "dp")    rank 1 sums mm_5 where rank 3 sums mm_7: both f32[96,96]

Two collectives of one size that stand in another order on one rank do not hang, and add what does not belong together.
Names of variables do not count, nor whether an operator writes in place; nor, between ranks, the position of a rank.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

from autopar.proof.rank_lines import Code, Line

POSITION = re.compile(r"torch\.tensor\(\d+, device=comm\.device\)|comm\.axis_index\([^)]*\)")  # of this rank
IN_PLACE = re.compile(r"_(?=\.|$)")  # aten.mul_.Tensor
NAME = re.compile(r"\b[A-Za-z_]\w*\b(?!\s*[(=])")


def walked(code: Code, of_one_rank: bool = False) -> Iterator[tuple[Line | None, Mapping[str, str]]]:
    """Each line with the digests of all variables before it, inputs by their places; None for the end.

    ``of_one_rank``: the position of the rank counts.
    """
    known = {name: f"input {place}" for place, name in enumerate(code.inputs)}
    for line in code.lines:
        yield line, known
        if line.results:
            made = _digest(line, known, of_one_rank)
            known = known | {name: f"{made}.{place}" for place, name in enumerate(line.results)}
    yield None, known


def operand_of(line: Line, known: Mapping[str, str]) -> str:
    """The digest of what a collective sends."""
    name = line.given.get("x", "")
    return known.get(name, name)


def returned_of(code: Code) -> tuple[str, ...]:
    """The digests of what a function of a rank returns, with the position of that rank."""
    *_, (_, known) = walked(code, of_one_rank=True)
    return tuple(known.get(name, name) for name in code.returned)


def _digest(line: Line, known: Mapping[str, str], of_one_rank: bool) -> str:
    call = line.text.partition(" = ")[2]
    call = call if of_one_rank else POSITION.sub("POSITION", call)
    if line.target is not None and call != "POSITION":
        call = f"{IN_PLACE.sub('', str(line.target))}({call.partition('(')[2]}"
    words = NAME.sub(lambda found: known.get(found.group(), found.group()), call)
    return hashlib.sha256(words.encode()).hexdigest()[:16]
