"""What has to hold of a model for a program that was compiled in another process.

There is one part for the trace; before it another, where forward first had to make something that it then finds (a
cache, a setting): when that part holds, this process does to its model what forward would do, and looks at the second.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from autopar.cache.reasons import NotMet, Unstorable
from autopar.cache.state import Answers, Questions, answered, differences, questions_of, quickly_answered
from autopar.ir.guards import Guards
from autopar.ir.model_runs import known_since_run
from autopar.ir.same_values import MISSING
from autopar.observation.trace_record import TraceRecord

logger = logging.getLogger("autopar")


@dataclass(frozen=True)
class Assumption:
    """``state``: the answers to ``questions`` that the model gave which was compiled; ``quick``: digests of all these.

    There are several where it is always the same as others see it (another line in the file of a model).
    """

    questions: Questions
    state: dict[str, str]
    quick: tuple[str, ...] = ()


def assumptions_of(
    records: Sequence[TraceRecord], guards: Guards, model: nn.Module, outputs: pytree.TreeSpec | None
) -> tuple[Assumption, ...]:
    """Those of the program whose traces left ``records`` and ``guards``. Raises Unstorable."""
    found: list[Assumption] = []
    for number, record in enumerate(records):
        if record.moved is None:
            continue
        if number:
            raise Unstorable("forward makes something in its first call, and something else in a later one")
        with record.moved.undone():
            found.append(_assumption(questions_of([record.moved.record], None, model), model))
    return (*found, _assumption(questions_of(records, guards, model, outputs), model))


def _assumption(questions: Questions, model: nn.Module) -> Assumption:
    quick = _quick(questions, model)
    return Assumption(questions, answered(questions, model).state, (quick.quick,) if quick is not None else ())


def met(assumptions: Sequence[Assumption], model: nn.Module) -> tuple[Guards, tuple[Assumption, ...]]:
    """What ``model`` has to keep from now on; what forward would leave on it is there then.

    With the assumptions as they are told the soonest next time. Raises NotMet, and leaves the model as it was.
    """
    done: list[tuple[dict[str, Any], str, Any]] = []
    renewed = []
    try:
        for assumption in assumptions:
            answers, now = _answers(assumption, model, is_alone=len(assumptions) == 1)
            renewed.append(now)
            for table, key, value in answers.guards.effects if len(renewed) < len(assumptions) else ():
                done.append((table, key, table.get(key, MISSING)))
                table[key] = value
        return answers.guards, tuple(renewed)
    except BaseException:
        for table, key, value in reversed(done):
            table[key] = value
            if value is MISSING:
                del table[key]
        raise


def _answers(assumption: Assumption, model: nn.Module, is_alone: bool) -> tuple[Answers, Assumption]:
    ask = _quick_once if is_alone and not any(assumption.questions.effects) else _quick
    quick = ask(assumption.questions, model) if assumption.quick else None
    if quick is not None and quick.quick in assumption.quick:
        return quick, assumption
    try:
        answers = answered(assumption.questions, model)
    except Unstorable as reason:
        raise NotMet(str(reason)) from None
    changed = differences(assumption.state, answers.state)
    if changed:
        raise NotMet(f"{listed(changed)} changed")
    known = (quick.quick, *assumption.quick)[:QUICK_KEPT] if quick is not None else assumption.quick
    return answers, replace(assumption, quick=known)


def _quick(questions: Questions, model: nn.Module) -> Answers | None:
    """None where something cannot be written down, or is nested too deeply."""
    try:
        return quickly_answered(questions, model)
    except Exception as problem:
        logger.debug("compared as a table: %r", problem)
        return None


def _quick_once(questions: Questions, model: nn.Module) -> Answers | None:
    """As :func:`_quick`; what was asked already is not asked again, unless code of users' may have run since.

    So it is with programs of one family. The guards are the caller's own.
    """
    asked = known_since_run()
    for one in asked or ():
        if one.model is model and one.questions == questions:
            guards = Guards.joined([one.answers.guards])
            guards.values.clear()  # of that program
            answers: Answers = replace(one.answers, guards=guards)
            return answers
    found = _quick(questions, model)
    if found is not None and asked is not None:
        asked.append(_Asked(questions, model, found))
    return found


@dataclass(frozen=True)
class _Asked:
    questions: Questions
    model: nn.Module
    answers: Answers


QUICK_KEPT = 4
SHOWN = 4


def listed(names: Sequence[str]) -> str:
    """For a message: the first ones, and how many more there are."""
    more = f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
