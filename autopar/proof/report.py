"""What ``autopar.verify`` gives: what each layer has shown of a program, what it refuses, what it could not say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autopar.errors import ProofError
from autopar.ir.program import AnyProgram
from autopar.proof.refusal import Layer, Refusal, Shown

WORDS = {
    Layer.STRUCTURE: "structure: order, messages, memory and types of the code that ranks run",
    Layer.RELATIONS: "relations: which ranks hold the same value",
    Layer.FIELD: "field: all ranks, executed exactly over a prime field, against the traced model",
    Layer.FLOAT64: "float64: all ranks, simulated, against the model itself",
}
MOST_SHOWN = 6  # refusals of a layer


@dataclass(frozen=True)
class Verification:
    """The proof of one program.

    Attributes:
        program: what was looked at.
        layers: what each layer has shown, in order; those behind one that refuses are still tried.
        reduced: in words, the smaller model that the layers which compute ran, "" where they ran the program itself.
    """

    program: AnyProgram
    layers: tuple[Shown, ...]
    reduced: str = ""

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Everything that is wrong, in the order of the layers."""
        return tuple(refusal for shown in self.layers for refusal in shown.refusals)

    @property
    def unproved(self) -> tuple[str, ...]:
        """What no layer could say anything of, and why."""
        return tuple(words for shown in self.layers for words in shown.unproved)

    @property
    def proved(self) -> bool:
        """Whether every layer that was asked for has shown all of its part."""
        return not self.refusals and not self.unproved

    @property
    def seconds(self) -> float:
        return sum(shown.seconds for shown in self.layers)

    def raise_if_refused(self) -> None:
        """Raise ProofError, with the first refusals, where there are some."""
        if self.refusals:
            shown = "\n".join(f"  {refusal}" for refusal in self.refusals[:MOST_SHOWN])
            raise ProofError(
                f"the program for {self.program.mesh} does not compute its model's step:\n{shown}\n"
                "Way out: autopar.verify(model, mesh, plan) shows all of it. If nothing was changed by hand, this is a "
                "fault of autopar: please report it."
            )

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "mesh": dict(self.program.mesh.axes),
            "proved": self.proved,
            "reduced": self.reduced,
            "seconds": round(self.seconds, 3),
            "layers": [
                {
                    "layer": shown.layer.value,
                    "shown": dict(shown.facts),
                    "refusals": [refusal.document() for refusal in shown.refusals],
                    "unproved": list(shown.unproved),
                    "seconds": round(shown.seconds, 3),
                }
                for shown in self.layers
            ],
        }

    def __str__(self) -> str:
        verdict = "proved" if self.proved else "refused" if self.refusals else "not proved"
        lines = [f"{self.program.mesh}: {verdict} in {self.seconds:.1f} s"]
        if self.reduced:
            lines.append(f"  computed on {self.reduced}")
        for shown in self.layers:
            lines += [f"  {WORDS[shown.layer]} ({shown.seconds:.1f} s)", *_lines(shown)]
        return "\n".join(lines)


def _lines(shown: Shown) -> Sequence[str]:
    lines = [f"    {count:>6,} {fact}" for fact, count in shown.facts.items()]
    lines += [f"    refused: {refusal}" for refusal in shown.refusals[:MOST_SHOWN]]
    if len(shown.refusals) > MOST_SHOWN:
        lines.append(f"    ... and {len(shown.refusals) - MOST_SHOWN} more refusals")
    return [*lines, *(f"    not proved: {words}" for words in shown.unproved)]
