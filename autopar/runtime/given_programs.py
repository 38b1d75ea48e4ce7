"""Programs that were compiled before, found again by the kind of call that they were compiled for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from torch.utils import _pytree as pytree

from autopar.ir.fingerprint import CallFacts
from autopar.ir.guards import Guards
from autopar.ir.program import AnyProgram
from autopar.runtime.calls import Call


class GivenPrograms:
    """``programs`` as a module was given them; ``where`` they are from, for messages.

    ``facts`` gives what is known of a call, ``state`` what a program depends on beside the call: which parameters are
    trained, and their dtypes. ``guards`` (with modes or without) gives what the model has that may be read. Once that
    changes the programs are no longer of this model.
    """

    def __init__(
        self,
        programs: Sequence[AnyProgram],
        where: str,
        facts: Callable[[Call], CallFacts],
        state: Callable[[], Hashable],
        guards: Callable[[bool], Guards],
    ) -> None:
        self._guards, self._model = guards, guards(False)
        self.programs, self.where = tuple(programs), where
        self._facts, self._state, self._before = facts, state, state()

    def of(self, call: Call) -> AnyProgram | None:
        """The program of this whole call; None where there is none."""
        if not self.programs or self._state() != self._before or not self._model.hold():
            return None
        facts = self._facts(call)
        for program in self.programs:
            if program.fingerprint is not None and program.fingerprint.call == facts:
                return replace(program, in_spec=pytree.tree_structure((call.args, call.kwargs)))
        return None

    def guards(self) -> Guards:
        """What has to stay as it is now for a program that was found."""
        return self._guards(True)

    def none_of(self, call: Call) -> str:
        """Why there is none, for a message."""
        if self._state() != self._before:
            return f"the parameters have other dtypes, or others are trained, than {self.where} was compiled for"
        if not self._model.hold():
            return f"{self.where} was compiled for another state of the model: {self._model.change()}"
        known = "\n            ".join(str(program.fingerprint.call) for program in self.programs if program.fingerprint)
        here = self._facts(call)
        return f"{self.where} was compiled for another kind of call\n  compiled  {known}\n  now       {here}"
