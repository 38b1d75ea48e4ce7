"""A forward pass on the meta device: which integers index which table, and whether the model returns a loss.

It leaves the model as it is: it runs a copy, whose tensors are on the meta device, so that nothing is computed, unless
its Python reads values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

KEEP_VALUES = {  # what gives the integers that it got, in other places
    "contiguous", "clone", "to", "long", "int", "reshape", "view", "flatten", "transpose", "permute", "t", "squeeze",
    "unsqueeze", "expand", "expand_as", "repeat", "roll", "pad", "__getitem__", "masked_fill", "movedim", "detach",
    "ravel", "unflatten", "type", "type_as", "chunk", "split", "narrow", "select", "flip", "cat", "stack",
}  # fmt: skip


@dataclass
class Rehearsal:
    """``bounds``: input -> the number of rows of the smallest table that it indexes, or of classes that it names.

    ``others``: such numbers of indices that come from no input alone. ``output``: what forward returned, on the meta
    device; None where it could not be run there.
    """

    bounds: dict[str, int] = field(default_factory=dict)
    others: list[int] = field(default_factory=list)
    output: Any = None

    def below(self, name: str, usual: int) -> int:
        """The number below which integers of the input ``name`` are legal."""
        return self.bounds.get(name, min([*self.others, *self.bounds.values()], default=usual))


def rehearse(model: nn.Module, batch: Mapping[str, Any]) -> Rehearsal:
    """Run ``model(**batch)`` on the meta device; where its Python reads values, with its weights, if it has them.

    A model that can be run in neither way gives a result without an output.
    """
    on_meta = {id(tensor): _to_meta(tensor) for tensor in (*model.parameters(), *model.buffers())}
    inputs = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in batch.items()}
    found = _run(model, on_meta, inputs, "meta")
    if found.output is None and not any(parameter.is_meta for parameter in model.parameters()):
        found = _run(model, {id(parameter): parameter for parameter in model.parameters()}, batch, "cpu")
    return found


def _run(model: nn.Module, memo: dict[int, Any], inputs: Mapping[str, Any], device: str) -> Rehearsal:
    """A forward pass of a copy of ``model``, in which ``memo`` says what stands for its tensors."""
    found = Rehearsal()
    try:
        twin = copy.deepcopy(model, memo)
        with torch.random.fork_rng(devices=[]), torch.device(device), _Watching(found, inputs):
            found.output = twin(**inputs)
    except Exception:  # whatever a user's forward does that cannot be done here: the answer is then "not known"
        return Rehearsal(found.bounds, found.others)
    return found


def _to_meta(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to("meta")
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


class _Watching(TorchFunctionMode):
    """Notes the tables that integers of the inputs index, through operators that keep their values."""

    def __init__(self, found: Rehearsal, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self._found = found
        self._names = {id(value): name for name, value in inputs.items() if isinstance(value, Tensor)}
        self._kept: list[Any] = []  # so that no id is used again

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is functional.embedding or func is functional.embedding_bag:
            self._note(_argument(args, given, 0, "input"), _argument(args, given, 1, "weight").shape[0])
        elif func is functional.cross_entropy or func is functional.nll_loss:
            logits, target = _argument(args, given, 0, "input"), _argument(args, given, 1, "target")
            if not target.dtype.is_floating_point:
                self._note(target, logits.shape[1 if logits.dim() > 1 else 0])
        result = func(*args, **given)
        if getattr(func, "__name__", "") in KEEP_VALUES:
            source = next((value for value in _tensors(args) if id(value) in self._names), None)
            for each in _tensors((result,)) if source is not None else ():
                self._names[id(each)] = self._names[id(source)]
                self._kept.append(each)
        return result

    def _note(self, indices: Any, rows: int) -> None:
        name = self._names.get(id(indices))
        if name is None:
            self._found.others.append(int(rows))
        else:
            self._found.bounds[name] = min(int(rows), self._found.bounds.get(name, int(rows)))


def _argument(args: tuple[Any, ...], given: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else given[name]


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
