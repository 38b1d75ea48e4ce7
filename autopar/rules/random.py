"""Random masks and numbers: one vector of positions per dim."""

from __future__ import annotations

from typing import Any

from autopar import operators
from autopar.rules.factoring import Call, Factoring


def drawn(call: Call) -> Factoring:
    """(seed, positions of dim 0, of dim 1, ...) -> a tensor whose every dim may be split."""
    names = [f"d{i}" for i in range(len(call.outputs[0]))]
    dims = tuple((name,) if size != 1 else () for name, size in zip(names, call.outputs[0]))
    return Factoring(((), *[(dim,) for dim in dims]), (dims,), dict(zip(names, call.outputs[0])))


RULES: dict[Any, Any] = dict.fromkeys((operators.random_keep, operators.random_uniform), drawn)
