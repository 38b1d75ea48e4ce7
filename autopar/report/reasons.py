"""Why parameters are laid out as they are: the choices of the splitting passes, alike ones together."""

from __future__ import annotations

import re
from collections.abc import Iterator

from autopar.analysis.explain import explain
from autopar.analysis.layout_words import choice_words
from autopar.ir.node import value
from autopar.ir.program import AnyProgram
from autopar.ir.tables import Decision, InputKind
from autopar.report.document import Reason

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # in the path of a module
MOST_NAMES = 12
ONLY_ONE = "only one way to run it"


def reasons_of(program: AnyProgram) -> Iterator[Reason]:
    """By axis and choice; parameters of repeated blocks are one name, ``blocks.*.up.weight``."""
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for node, entry in program.placeholders(InputKind.PARAMETER):
        for axis in program.mesh.names:
            decision = program.decisions.get(axis, {}).get(node.name)
            if decision is None or program.mesh.size(axis) == 1:
                continue
            is_matrix = len(value(node).shape) == 2
            names = found.setdefault(
                (axis, choice_words(decision.chosen, is_matrix), _instead(decision, is_matrix)), {}
            )
            name = NUMBER.sub("*", entry.target)
            names[name] = names.get(name, 0) + 1
    for (axis, chosen, instead), names in found.items():
        texts = [f"{name} ({count})" if count > 1 else name for name, count in names.items()]
        more = [f"{len(texts) - MOST_NAMES} more"] if len(texts) > MOST_NAMES else []
        yield Reason(axis, chosen, (*texts[:MOST_NAMES], *more), sum(names.values()), instead)


def why(program: AnyProgram, name: str) -> tuple[str, ...]:
    """The lines of :func:`autopar.analysis.explain.explain` on a node or parameter, without axes on which there was
    nothing to choose, and without the first one, which repeats its type."""
    return tuple(line for line in explain(program, name).splitlines()[1:] if not line.endswith(ONLY_ONE))


def _instead(decision: Decision, is_matrix: bool) -> str:
    """``whole on every rank would cost 10.2 us more a step; split by rows: not possible here``."""
    texts = []
    for choice, cost in sorted(decision.alternatives.items(), key=lambda item: isinstance(item[1], str)):
        words = choice_words(choice, is_matrix)
        if isinstance(cost, str):
            texts.append(f"{words}: {cost}")
        else:
            texts.append(f"{words} would cost {abs(cost) * 1e6:.3g} us {'more' if cost >= 0 else 'less'} a step")
    return "; ".join(texts)
