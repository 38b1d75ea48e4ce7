"""Outputs that a model returns and a program does not, as a cache of keys and values: None is in their place.

A loop that decodes by hand passes that None to the next call, with one token, and would get the logits of this token
alone. So who has been given no cache may not pass it.
"""

from __future__ import annotations

import torch

from autopar.calls.calls import Call
from autopar.errors import InvariantError
from autopar.ir.loss import leaf_paths
from autopar.ir.program import AnyProgram

NAMES = frozenset({"cache", "past_key_values", "cache_params"})  # a model may return one, and take another


class MissingOutputs:
    """The names of those of one module, which are known once it has been called."""

    def __init__(self) -> None:
        self._names = frozenset[str]()

    def learn(self, program: AnyProgram) -> None:
        """Of ``program``, which runs now: an output class of a library lists no field that the model left at None."""
        spec = program.out_spec
        if spec is None or spec.type is dict or not program.static_outputs:
            return
        none = {position for position, found in program.static_outputs if found is None}
        paths = [path for position, path in enumerate(leaf_paths(spec)) if position in none]
        if any(path.partition(".")[0] in NAMES for path in paths):
            self._names = NAMES

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
