"""Views of DTensors with a gradient that are no views, as their parts were gathered: writing to one is refused.

In torch 2.13 ``logits[1:].clamp_(max=0)``, where ranks have other rows, writes to a copy that nobody reads. (Without a
gradient such a view is a :class:`~autopar.dtensors.whole_operators.Window`.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.dtensors.dtensor import local_of, of_local, spec_of
from autopar.dtensors.whole_operators import is_view, tensors_written
from autopar.errors import InvariantError


class CopiedView(DTensor):
    """A DTensor to which nothing may be written."""

    @classmethod
    def of(cls, found: DTensor) -> CopiedView:
        made: CopiedView = torch.Tensor._dtensor__new__(  # type: ignore[attr-defined]
            cls, local_of(found), spec_of(found), requires_grad=False
        )
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(one, CopiedView) for one in tensors_written(func, args, kwargs)):
            raise InvariantError(
                f"{func} writes to a slice of an output whose parts other ranks have, where nobody would read it\n"
                "Way out: torch.where or masked_fill on the whole output; or Plan(outputs='full')."
            )
        plain_args, plain_kwargs = pytree.tree_map_only(CopiedView, _plain, (args, kwargs))
        found = func(*plain_args, **plain_kwargs)
        return pytree.tree_map_only(DTensor, CopiedView.of, found) if is_view(func) else found


def copied(found: Any) -> Any:
    """``found``, one view or several of them, as such."""
    return pytree.tree_map_only(DTensor, CopiedView.of, found)


def _plain(tensor: Tensor) -> DTensor:
    return of_local(local_of(tensor), spec_of(tensor))  # type: ignore[arg-type]
