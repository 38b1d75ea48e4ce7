"""The errors a user can meet. Each message names the thing, the numbers and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from types import UnionType
from typing import get_args

NEAR = 3  # names that are shown
SHOWN = 80  # characters of a value


class AutoparError(Exception):
    """Base of every error that autopar raises about a model, a program or a run."""


class TraceError(AutoparError):
    """The model cannot be captured as one graph (data-dependent control flow, hidden autograd.Function, ...)."""


class UnknownOperatorError(AutoparError):
    """An operator has no splitting rule."""


class WrongRuleError(AutoparError):
    """A splitting rule does not agree with its operator."""


class IndivisibleError(AutoparError):
    """A dim does not divide by the size of the axis that should split it."""


class SequenceError(AutoparError):
    """An axis cannot split the sequence of the model, or not as the plan asks."""


class NoSequenceError(SequenceError):
    """The model has no sequence that an axis could split."""


class NothingSplitError(AutoparError):
    """An axis would leave nearly all of its work whole on every rank."""


class NoExpertsError(NothingSplitError):
    """The model has no experts that an axis could deal out."""


class StageError(AutoparError):
    """The model cannot be cut into the required pipeline stages."""


class InvariantError(AutoparError):
    """A pass got, or returned, a program that breaks a contract."""


class NumericsError(AutoparError):
    """The traced or parallel program disagrees with the eager model."""


class LaunchError(AutoparError):
    """The program was started on processes that do not fit its mesh."""


class RanksDifferError(LaunchError):
    """The ranks of a mesh do not do the same: another plan, seed, model, weights, batch or call."""


class ExportError(AutoparError):
    """A program cannot be written in a format of other tools, or what was written is wrong."""


class ProgramFileError(AutoparError):
    """A program on disk is damaged, incomplete or of another format version."""


class CheckpointError(AutoparError):
    """A checkpoint, or weights on disk, are damaged, incomplete, or belong to another model."""


class ScheduleError(AutoparError):
    """A pipeline schedule would compute something twice or never, mix up messages, wait for ever or hold too much."""


class ProofError(AutoparError):
    """A program could not be proved to compute its model, or what was handed in for a proof is no program."""


class RankFailedError(AutoparError):
    """A peer rank ended or stopped answering while this rank waited for it."""


def check_kind(argument: str, value: object, kinds: type | UnionType, way_out: str) -> None:
    """Raise ValueError for an argument that is something else, with ``way_out``: what a right one looks like."""
    if isinstance(value, kinds):
        return
    written = f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {value!r}"
    shown = written if len(written) <= SHOWN else f"{written[:SHOWN]}..."
    alternatives = get_args(kinds) or (kinds,)
    wanted = " or ".join(kind.__name__ for kind in alternatives if kind is not type(None))
    raise ValueError(f"{argument} is {' '.join(shown.split())}, and not a {wanted}\nWay out: {way_out}")


def unknown_name(problem: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that there is not, with near ones and all: ``Plan has no choice 'zeros'; ...``."""
    names = list(known)
    return f"{problem} {name!r}{near_names(name, names)}\nWay out: one of {', '.join(names)}."


def near_names(name: object, known: Iterable[str]) -> str:
    """``: did you mean 'zero'?``, or nothing where no name of ``known`` is near."""
    near = get_close_matches(str(name), list(known), NEAR, 0.6)
    return f": did you mean {' or '.join(map(repr, near))}?" if near else ""
