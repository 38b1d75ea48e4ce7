"""Programs that were compiled before, found again by the kind of call that they were compiled for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch.utils import _pytree as pytree

from autopar.calls.call_sizes import resized, shapes_of
from autopar.calls.calls import Call
from autopar.families.family import Family
from autopar.ir.asked_of_inputs import answers_of
from autopar.ir.fingerprint import CallFacts
from autopar.ir.guards import Guards, Question
from autopar.ir.program import AnyProgram


class GivenPrograms:
    """``programs`` and ``families`` as a module was given them; ``where`` they are from, for messages.

    ``facts`` gives what is known of a call, ``state`` what a program depends on beside the call: which parameters are
    trained, and their dtypes. ``guards`` (with modes or without) gives what the model has that may be read. Once that
    changes the programs are no longer of this model.
    """

    def __init__(
        self,
        programs: Sequence[AnyProgram | Family],
        where: str,
        facts: Callable[[Call], CallFacts],
        state: Callable[[], Hashable],
        guards: Callable[[bool], Guards],
    ) -> None:
        self._guards, self._model = guards, guards(False)
        self.families = tuple(program for program in programs if isinstance(program, Family))
        self.programs = tuple(program for program in programs if not isinstance(program, Family))
        self.where = where
        self._facts, self._state, self._before = facts, state, state()

    def of(self, call: Call) -> AnyProgram | None:
        """The program of this whole call; None where there is none."""
        if not self.programs or not self._holds():
            return None
        facts = self._facts(call)
        for program in self.programs:
            if program.fingerprint is not None and _is_of(program.fingerprint.call, facts, call):
                return replace(program, in_spec=pytree.tree_structure((call.args, call.kwargs)))
        return None

    def family_of(self, call: Call) -> Family | None:
        """The family of which this whole call is, inside of its range or outside; None where there is none."""
        if not self.families or not self._holds():
            return None
        shapes = shapes_of(call)
        for family in self.families:
            fingerprint, scheme = family.template.fingerprint, family.scheme
            if fingerprint is None or scheme is None or not scheme.fits(shapes):
                continue
            first = resized(call, scheme.shapes(shapes, family.points[0]))
            if _is_of(fingerprint.call, self._facts(first), call):
                return family.called(pytree.tree_structure((call.args, call.kwargs)))
        return None

    def _holds(self) -> bool:
        return self._state() == self._before and self._model.hold()

    def guards(self, program: AnyProgram | None = None) -> Guards:
        """What has to stay as it is now for a ``program`` that was found."""
        guards, known = self._guards(True), program.fingerprint if program is not None else None
        if known is not None and known.call.asks_for_gradients:
            mode = Question(torch.is_grad_enabled, torch.is_grad_enabled(), "whether gradients are enabled")
            guards.questions.append(mode)
        guards.inputs += known.call.asked_of_inputs if known is not None else ()
        return guards

    def none_of(self, call: Call) -> str:
        """Why there is none, for a message."""
        if self._state() != self._before:
            return f"the parameters have other dtypes, or others are trained, than {self.where} was compiled for"
        if not self._model.hold():
            return f"{self.where} was compiled for another state of the model: {self._model.change()}"
        calls = [str(program.fingerprint.call) for program in self.programs if program.fingerprint]
        calls += [f"{one.template.fingerprint.call}, for {one}" for one in self.families if one.template.fingerprint]
        known = "\n            ".join(calls)
        here = self._facts(call)
        return f"{self.where} was compiled for another kind of call\n  compiled  {known}\n  now       {here}"


def _is_of(known: CallFacts, facts: CallFacts, call: Call) -> bool:
    """Whether a program for calls that are ``known`` so serves ``call``, of which these are the ``facts``, now."""
    facts = facts.of_inputs(known.asked_of_inputs, answers_of(known.asked_of_inputs, call.leaves))
    return known in (facts, facts.asked(torch.is_grad_enabled()))
