"""``if mask.any():`` around what is done with the rows of the mask: traced as if the answer were always yes.

Where no row is selected, the same operators on no row add nothing. The model runs once with yes for every such question
and once with no, and :mod:`autopar.selections.empty_selections` sees that they differ by what is put back alone. That a
selection stands in the branch of its own question, and of no other, is seen in two ways: no question is asked in one
of the runs only (a question within the branch of another, ``break``), and each selection implies the last question
that was asked before it. The condition says so: it is that of the rows and of the answer, which
:func:`autopar.rules.hits.without_hits` leaves out or refuses.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autopar.observation.source_lines import Place, place_of_user
from autopar.selections.hit_loops import narrowed

_ANY = (torch.any, Tensor.any)
_COUNTS = (torch.sum, Tensor.sum, torch.count_nonzero, Tensor.count_nonzero)
_NOT = (torch.logical_not, Tensor.logical_not, Tensor.__invert__)
_MORE: dict[Any, int] = {  # a count compared with that number: whether there is any
    Tensor.__gt__: 0, Tensor.gt: 0, torch.gt: 0, Tensor.__ne__: 0, Tensor.ne: 0, torch.ne: 0, Tensor.__ge__: 1,
}  # fmt: skip
_NONE: dict[Any, int] = {Tensor.__eq__: 0, Tensor.eq: 0, torch.eq: 0, Tensor.__lt__: 1, Tensor.__le__: 0}


@dataclass(frozen=True)
class _Asked:
    """Whether ``mask`` has any true element: its number (``counts``), the answer, or the opposite of it."""

    mask: Tensor
    counts: bool
    opposite: bool = False


class AnyBranches(TorchFunctionMode):
    """Within this context some row is selected by each mask that is asked, or (``empty``) none.

    ``questions``: those that were asked, in their order.
    """

    def __init__(self, *, empty: bool) -> None:
        super().__init__()
        self.questions: list[Place] = []
        self._empty = empty
        self._asked: dict[int, _Asked] = {}
        self._alive: list[Tensor] = []
        self._flag: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        asked = self._asked.get(id(first))
        if func in (Tensor.__bool__, torch.is_nonzero) and asked is not None and (place := _branch()) is not None:
            self.questions.append(place)
            self._flag = asked.mask.any().reshape(1)
            return self._empty == asked.opposite
        if self._flag is not None:
            args = narrowed(func, args, self._flag)
        result = func(*args, **kwargs)
        found = _question(func, args, kwargs, asked)
        if found is not None:
            self._alive.append(result)
            self._asked[id(result)] = found
        return result


def _question(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], asked: _Asked | None) -> _Asked | None:
    """What ``func`` gives, where it asks whether anything is selected."""
    first = args[0] if args else None
    if func in _ANY + _COUNTS and len(args) == 1 and not kwargs and isinstance(first, Tensor):
        return _Asked(first, func in _COUNTS) if first.dtype == torch.bool and first.dim() else None
    if asked is None:
        return None
    if asked.counts and len(args) == 2 and func in _MORE and args[1] is not True and args[1] == _MORE[func]:
        return _Asked(asked.mask, False)
    if asked.counts and len(args) == 2 and func in _NONE and args[1] is not True and args[1] == _NONE[func]:
        return _Asked(asked.mask, False, opposite=True)
    return _Asked(asked.mask, False, not asked.opposite) if func in _NOT and not asked.counts else None


def _branch() -> Place | None:
    """Where the user's code decides by this answer at once; None where it keeps the answer (``flag = bool(...)``)."""
    code, at = place_of_user()
    if code is None:
        return None
    steps = [one for one in dis.get_instructions(code) if one.offset >= at]
    names = [one.opname for one in steps if one.opname not in ("UNARY_NOT", "TO_BOOL", "CACHE", "COPY")]
    decides: Callable[[str], bool] = lambda name: name.startswith(("POP_JUMP", "JUMP_IF"))  # noqa: E731
    return (code, at) if names and decides(names[0]) else None
