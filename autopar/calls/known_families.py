"""What is known of the programs of one kind of call: those of single sizes, and the families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autopar.calls.calls import Call
from autopar.families.family import Family
from autopar.families.forms import Sizes
from autopar.families.sizes import Scheme, Shapes
from autopar.ir.guards import Guards
from autopar.ir.program import AnyProgram
from autopar.ir.size_conditions import Condition
from autopar.runtime.family_code import FamilyCode


@dataclass
class Known:
    """A family that was made, its code, which sizes it is of, and the state of Python that it assumes."""

    family: Family
    code: FamilyCode
    scheme: Scheme
    guards: Guards


@dataclass(frozen=True)
class Member:
    """The program of a family for one call, with its ``code`` and the values of the family's expressions."""

    program: AnyProgram
    guards: Guards
    code: FamilyCode
    numbers: Mapping[Any, Any]


@dataclass
class Kept:
    """What is known of one kind of call.

    Attributes:
        first: its first program, as which others decide.
        guards: what all programs of this kind assume.
        points: programs that are in no family, with their shapes.
        rounds: how often further points were compiled.
        is_each: whether forward makes a number of a length, so that no family can hold for another one.
        is_in_steps: whether the model does something else at sizes between those that came, all in steps.
    """

    first: AnyProgram
    guards: Guards
    families: list[Known] = field(default_factory=list)
    points: list[tuple[Shapes, AnyProgram]] = field(default_factory=list)
    rounds: int = 0
    is_each: bool = False
    is_in_steps: bool = False

    def of(self, scheme: Scheme) -> list[tuple[Sizes, AnyProgram]]:
        """Those of :attr:`points` that ``scheme`` knows, by their sizes."""
        return [(sizes, program) for shapes, program in self.points if (sizes := scheme.sizes(shapes)) is not None]


@dataclass(frozen=True)
class Round:
    """What is known when a family is tried to be made of calls like ``call``.

    Attributes:
        scheme: which dims are sizes.
        conditions: what the model asks about them.
        known: the sizes of calls that came, first the one that is generalised.
        asked: how many those are.
        is_first: whether no further ones were tried before.
    """

    call: Call
    scheme: Scheme
    conditions: Sequence[Condition]
    known: Sequence[Sizes]
    asked: int
    is_first: bool

    def holds(self, sizes: Sizes) -> bool:
        """Whether the model does at ``sizes`` what it does at the first, as far as is known."""
        return all(condition.holds(sizes) for condition in self.conditions)
