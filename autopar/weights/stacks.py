"""Parameters of a module that a program takes stacked: one for the experts of a list, in place of one for each.

The list's module has the stack under a key such as ``*.up.weight``, so that its full name is that of the program's
parameter, and its experts have None in place of theirs. ``state_dict`` has the stack; ``load_state_dict`` takes it, or
the tensors of the unmodified model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autopar.dtensors.dtensor import local_of
from autopar.ir.stacked_parameters import STAR, member_names

Table = dict[str, Any]  # the parameters of one module
Place = tuple[Table, str]  # a table and a key in it


@dataclass(frozen=True)
class Stack:
    """A parameter ``name`` at ``place`` for those that were at ``members``; ``outlines``: meta tensors like these.

    On a pipeline rank whose stage does not have it, None is at ``place``.
    """

    name: str
    place: Place
    members: tuple[Place, ...]
    outlines: tuple[Tensor, ...]

    @property
    def parameter(self) -> Tensor | None:
        table, key = self.place
        found: Tensor | None = table[key]
        return found

    def moved(self, tables: Mapping[int, Table]) -> Stack:
        """The same in a copy of the module; ``tables``: identity of a table of the module -> that of the copy."""
        place = tables[id(self.place[0])], self.place[1]
        members = tuple((tables[id(table)], key) for table, key in self.members)
        return replace(self, place=place, members=members)

    def apart(self) -> AbstractContextManager[None]:
        """Within this context, the model has outlines of its own parameters in place of the stack."""
        learns = self.parameter is not None and self.parameter.requires_grad
        return self.in_place([outline.requires_grad_(learns) for outline in self.outlines])

    @contextmanager
    def in_place(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Within this context, the model has ``tensors`` where it had its own parameters, and not the stack."""
        table, key = self.place
        stack = table.pop(key)
        for (own, name), tensor in zip(self.members, tensors):
            own[name] = tensor
        try:
            yield
        finally:
            for own, name in self.members:
                own[name] = None
            table[key] = stack


@contextmanager
def rows_in_place(stacks: Sequence[Stack]) -> Iterator[None]:
    """Within this context, experts of a list have their parameters: views of the stacks' rows; collective.

    So is writing to a view of rows that lie on other ranks, see :mod:`autopar.dtensors.initialising`.
    """
    with ExitStack() as shown:
        for one in stacks:
            if one.parameter is not None:
                shown.enter_context(one.in_place(one.parameter.data.unbind(0)))
        yield


def stack(root: nn.Module, name: str, places: Sequence[Place]) -> Stack:
    """Put one parameter called ``name`` in place of those at ``places``."""
    parameters: list[Tensor] = [table[key] for table, key in places]
    before, _, after = name.partition(f"{STAR}.")
    owner = root.get_submodule(before.rstrip(".")) if before else root
    whole = nn.Parameter(torch.stack([local_of(p).detach() for p in parameters]), parameters[0].requires_grad)
    outlines = tuple(nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in parameters)
    for table, key in places:
        table[key] = None
    key = f"{STAR}.{after}"
    owner._parameters[key] = whole
    owner.register_load_state_dict_pre_hook(partial(_stack_loaded, key, len(places)))  # type: ignore[no-untyped-call]
    owner.register_load_state_dict_post_hook(partial(_expected, name))  # type: ignore[no-untyped-call]
    return Stack(name, (owner._parameters, key), tuple(places), outlines)


def _stack_loaded(key: str, count: int, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    names = member_names(prefix + key, count)
    if all(name in state for name in names):
        state[prefix + key] = torch.stack([state.pop(name) for name in names])


def _expected(name: str, module: nn.Module, incompatible: Any) -> None:
    """Torch takes the key of a stack, which has dots, for that of a submodule that there is none of."""
    incompatible.unexpected_keys[:] = [key for key in incompatible.unexpected_keys if not key.endswith(name)]
