"""A program that is bound to the tensors of a module, for one kind of call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from autopar.calls.repeated_calls import RepeatedCall
from autopar.calls.shared_inputs import is_due
from autopar.runtime.execute import Executable
from autopar.runtime.execute_pipeline import PipelineExecutable

Bound = Executable | PipelineExecutable


@dataclass
class Entry:
    """A bound program, the ``number`` by which ranks compare its kind of call, and how many ``calls`` there were."""

    bound: Bound
    number: int
    calls: int = 0
    repeated: RepeatedCall | None = None

    @property
    def is_due(self) -> bool:
        """Whether the inputs of the next call are compared; never where a rank could run the program by itself."""
        return is_due(self.calls) and self._communicates

    @cached_property
    def _communicates(self) -> bool:
        return isinstance(self.bound, PipelineExecutable) or bool(self.bound.code.axes_of_inference)
