"""Outputs that a model returns and a program does not, as a cache of keys and values: None is in their place.

A loop that decodes by hand passes that None to the next call, with one token, and would get the logits of this token
alone. So who has been given no cache may not pass it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils import _pytree as pytree

from autopar.calls.calls import Call
from autopar.errors import InvariantError
from autopar.ir.program import AnyProgram

OTHER_NAMES = {"cache", "past_key_values", "cache_params"}  # transformers has one for another, by its version


class MissingOutputs:
    """The names of those of one module, which are known once it has been called."""

    def __init__(self) -> None:
        self._names = set[str]()

    def learn(self, program: AnyProgram) -> None:
        """Of ``program``, which runs now: an output class of a library lists no field that the model left at None."""
        spec = program.out_spec
        if spec is None or spec.type is dict or not program.static_outputs:
            return
        none = {position for position, found in program.static_outputs if found is None}
        output = pytree.tree_unflatten(range(spec.num_leaves), spec)
        if isinstance(output, Mapping):
            self._names |= {name for name, position in output.items() if isinstance(position, int) and position in none}
            self._names |= OTHER_NAMES if self._names & OTHER_NAMES else set()

    def passed(self, call: Call) -> list[str]:
        """Those that ``call`` passes as None."""
        return [name for name in self._names if call.kwargs.get(name, name) is None]

    def check(self, call: Call) -> None:
        """Raise InvariantError where ``call``, which does not learn, passes one as None."""
        names = self.passed(call) if self._names and not torch.is_grad_enabled() else []
        if names:
            raise InvariantError(
                f"{names[0]}=None is passed on from a call before: a parallel program returns no cache of keys and "
                "values, and the logits would be those of these tokens alone\n"
                "Way out: pass all tokens so far in each call, with use_cache=False (examples/generate.py); or "
                f"autopar.gather(model), whose generate() has a cache. In other calls leave out {names[0]}."
            )
