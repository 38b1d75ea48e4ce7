"""Tensors that no file has, by the model's own initialisation, with the same numbers on any mesh.

Each module that owns such tensors is initialised whole, on the CPU, from a seed that follows from its name, within a
copy of the model that is otherwise on the meta device; then every rank takes its part. So the memory needed beside the
rank's own is that of one module's own tensors.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autopar.checkpoint.named_tensors import Named, every_tensor, materialise
from autopar.errors import CheckpointError
from autopar.ir.stacked_parameters import is_stacked
from autopar.module import held_by
from autopar.weights.absent import Table


def initialise(model: nn.Module, entries: Sequence[Named], seed: int = 0) -> None:
    """Fill ``entries`` of ``model``, which may be on the meta device.

    What initialises a module is its ``reset_parameters``, then ``_init_weights(module)`` of the innermost module around
    it that has one (as Hugging Face's do), then the same of the modules around it, outwards.
    Raises CheckpointError for a tensor that neither of them fills; some of the others are filled then.
    """
    if not entries:
        return
    materialise(model, list(entries))
    on_meta = copy_on_meta(model)
    owned = itertools.groupby(sorted(entries, key=_owner), key=_owner)
    for owner, group in owned:
        members = list(group)
        module = on_meta.get_submodule(owner)
        tables = {entry.name: _table(module, entry.name) for entry in members}
        blanks = {entry.name: _blank(entry) for entry in members}
        for entry in members:
            tables[entry.name][_key(entry.name)] = blanks[entry.name]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_seed(seed, owner))
            for step in _steps(on_meta, owner):
                step()
        for entry in members:
            table, key = tables[entry.name], _key(entry.name)
            if table[key] is blanks[entry.name] and not _was_filled(table[key]):
                raise CheckpointError(_no_init(entry.name, model, owner))
            with torch.no_grad():
                entry.slices.copy_from(table[key])
            table[key] = table[key].to("meta")


def _steps(root: nn.Module, owner: str) -> Iterator[Callable[[], Any]]:
    """The functions to call, in order, so that the tensors of module ``owner`` are initialised."""
    names = owner.split(".") if owner else []
    around = [root.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    for depth in reversed(range(len(around))):
        module = around[depth]
        for name in ("reset_parameters", "_reset_parameters"):
            if callable(getattr(module, name, None)):
                yield getattr(module, name)
        inits = [getattr(outer, "_init_weights", None) for outer in reversed(around[: depth + 1])]
        init = next(filter(callable, inits), None)
        if init is not None and len(inspect.signature(init).parameters) == 1:
            yield partial(init, module)


def copy_on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model itself whose tensors are whole ones on the meta device; tied ones stay tied."""
    memo: dict[int, Any] = {}
    entries = every_tensor(model)
    outlines: dict[str, Tensor] = {}
    for entry in entries:
        tensor = entry.tensor
        empty = torch.empty(entry.shape, dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        outlines[entry.name] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        memo[id(tensor)] = outlines[entry.name]
    if held_by(model).model is not model:
        memo[id(model)] = model  # hooks of ours know the parallel module
    found: nn.Module = copy.deepcopy(held_by(model).model, memo)
    for entry in entries:
        for name in () if entry.held and entry.member is None else entry.names:  # of other stages, or of a stack
            module = found.get_submodule(name.rpartition(".")[0])
            _table(module, name)[_key(name)] = outlines[entry.name]
    for module in found.modules():
        for key in [key for key in module._parameters if is_stacked(key)]:
            del module._parameters[key]
    return found


def _blank(entry: Named) -> Tensor:
    """A whole tensor like that of ``entry``, on the CPU, filled so that elements that stay unwritten are seen."""
    blank = torch.zeros(entry.shape, dtype=entry.tensor.dtype)
    if blank.is_floating_point():
        blank.fill_(torch.nan)
    return nn.Parameter(blank, requires_grad=False) if isinstance(entry.tensor, nn.Parameter) else blank


def _was_filled(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return not bool(tensor.isnan().any())
    return tensor._version > 0


def _no_init(name: str, model: nn.Module, owner: str) -> str:
    kind = type(held_by(model).model.get_submodule(owner)).__name__
    return (
        f"'{name}' has no data and no initialisation: {kind} has no reset_parameters, and no module around it an\n"
        "_init_weights, that fills it\n"
        "Way out: give it one, or do not build the model on the meta device."
    )


def _owner(entry: Named) -> str:
    return entry.name.rpartition(".")[0]


def _key(name: str) -> str:
    return name.rpartition(".")[2]


def _table(module: nn.Module, name: str) -> Table:
    return module._parameters if _key(name) in module._parameters else module._buffers


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) >> 1
