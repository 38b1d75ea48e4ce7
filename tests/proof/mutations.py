"""What refuses which planted bug: ``python -m tests.proof.mutations [--json] [NAME ...]`` prints the table.

Beside the layers of ``autopar.verify`` it has, for contrast, what the contracts of the compiler's last level see alone;
the layer ``float64`` alone is what ``autopar.check`` sees.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.errors import InvariantError
from autopar.ir.node import values
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.levels import SCHEDULED
from autopar.proof.rank_texts import text_of
from autopar.proof.refusal import Layer, Refusal
from autopar.proof.verify import LAYERS, verify
from tests.proof import mutations_cases, mutations_order, mutations_sums, mutations_values  # noqa: F401 - they register theirs
from tests.proof.mutated_programs import CASES, made, right
from tests.proof.planting import MUTATIONS, Codes, Mutation

CONTRACTS = "contracts"


@dataclass(frozen=True)
class Verdict:
    """``refusals``: by the layers that refuse, in order; those of a layer as it gives them."""

    mutation: Mutation
    refusals: dict[str, tuple[Refusal, ...]]
    contracts: str = ""

    @property
    def message(self) -> str:
        return str(next(iter(self.refusals.values()))[0]) if self.refusals else "accepted"

    def document(self) -> dict[str, object]:
        return {
            "bug": self.mutation.name,
            "class": self.mutation.kind,
            "program": self.mutation.case,
            "layers": list(self.refusals),
            "contracts": bool(self.contracts),
            "message": self.message,
        }


def planted(mutation: Mutation) -> tuple[AnyProgram, Codes | None]:
    """The program with the bug in it, and the code of ranks that was changed. Both differ from what is right."""
    whole = right(mutation.case)
    copy = whole.clone()
    changed = mutation.plant(copy)
    if isinstance(changed, dict):
        assert all(text_of(whole, rank) != code for rank, code in changed.items())
        return whole, changed
    program = changed if isinstance(changed, Program | PipelinedProgram) else copy
    assert described(program) != described(whole), f"{mutation.name} changes nothing"
    return program, None


def described(program: AnyProgram) -> str:
    """All that ranks run, as text."""
    parts = [words for part in program.parts for words in _graphs(part)]
    return "\n".join([*parts, str(getattr(program, "schedule", "")), str(program.joins)])


def _graphs(part: Program) -> list[str]:
    role = part.required_role
    words = [str(part.inputs), str(part.outputs), str(role.grads)]
    for graph in part.graphs.values():
        words += [f"{node.format_node()} {node.kwargs} {values(node)}" for node in graph.nodes]
    return words


def verdict(mutation: Mutation, layers: Sequence[str] = LAYERS, every: bool = True) -> Verdict:
    """What ``layers`` say of a bug; up to the first that refuses it unless ``every`` is asked."""
    program, codes = planted(mutation)
    model, batch = made(CASES[mutation.case].model)
    refusals: dict[str, tuple[Refusal, ...]] = {}
    for layer in layers:
        own = codes if layer == Layer.STRUCTURE else None  # no other layer looks at the code of single ranks
        found = verify(model, program.mesh, example_inputs=batch, program=program, codes=own, layers=(layer,))
        if found.refusals:
            refusals[str(layer)] = found.refusals
            if not every:
                break
    return Verdict(mutation, refusals, contracts(program))


def contracts(program: AnyProgram) -> str:
    """What the contracts alone refuse; "" where they accept."""
    try:
        SCHEDULED.check(program, "its last pass")
    except InvariantError as problem:
        return str(problem)
    return ""


def table(found: Sequence[Verdict]) -> str:
    lines = []
    for one in found:
        by = ", ".join(one.refusals) or "NOBODY"
        more = "; contracts" if one.contracts else ""
        lines += [f"{one.mutation.kind}: {one.mutation.name} ({one.mutation.case})", f"  refused by {by}{more}"]
        lines += [f"  {line}" for line in one.message.splitlines()]
    return "\n".join([*lines, "", *summary(found)])


def summary(found: Sequence[Verdict]) -> list[str]:
    """How many bugs each layer refuses, and first."""
    lines = [f"{len(found)} bugs of {len({one.mutation.kind for one in found})} classes"]
    for layer in LAYERS:
        refused = sum(layer in one.refusals for one in found)
        first = sum(next(iter(one.refusals), "") == layer for one in found)
        lines.append(f"  {layer:10} refuses {refused:3}, as the first {first:3}")
    lines.append(f"  {CONTRACTS:10} refuse  {sum(bool(one.contracts) for one in found):3}")
    return [*lines, f"  accepted by all: {sum(not one.refusals for one in found)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of bugs, or of classes; all by default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layer", action="append", choices=[str(layer) for layer in LAYERS])
    given = parser.parse_args()
    chosen = [one for one in MUTATIONS if not given.names or one.name in given.names or one.kind in given.names]
    found = [verdict(one, given.layer or LAYERS) for one in chosen]
    print(json.dumps([one.document() for one in found], indent=1) if given.json else table(found))


if __name__ == "__main__":
    main()
