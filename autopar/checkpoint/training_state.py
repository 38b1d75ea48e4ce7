"""The state of a training run by name, as torch's own ``state_dict`` helpers for checkpoints name it:

model.blocks.0.up.weight                          parameters and buffers
optimizer.state.blocks.0.up.weight.exp_avg        per parameter what its optimizer keeps
optimizer.param_groups.0.lr                       hyperparameters, and the names of the group's parameters

Of a stack (:mod:`autopar.weights.stacks`) it has what belongs to each of the model's own parameters, under their names.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from autopar.checkpoint.named_tensors import Named, emptied, every_held, home_of
from autopar.checkpoint.plain_values import packed
from autopar.dtensors.dtensor import local_of
from autopar.dtensors.piecewise import dtensor
from autopar.dtensors.slices import Slices, slices_of
from autopar.errors import CheckpointError
from autopar.ir.stacked_parameters import is_stacked, member_names

Nested = dict[str, Any]
Gather = Callable[[Any], list[Any]]  # the value of each rank


class Owners:
    """The parameter of the model for each parameter of an optimizer.

    On a pipeline, every rank's optimizer has the parameters of its stages; ``gather`` collects the names of all ranks.

    Raises CheckpointError for a parameter of another model, and for an optimizer whose state is not one tensor or
    number per parameter.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], gather: Gather | None = None) -> None:
        self.optimizers, self._gather, self.home = optimizers, gather, home_of(model)
        entries = every_held(model)
        self._order = {entry.name: position for position, entry in enumerate(entries)}
        self._entries = {id(entry.tensor): entry for entry in entries}
        names = {name: entry for entry in entries for name in entry.names}
        self._entries |= {id(tensor): names[name] for name, tensor in emptied(model)}
        stacks = {entry.name: entry.tensor.shape[0] for entry in entries if is_stacked(entry.name)}
        self._of_stack = {name: member_names(name, count) for name, count in stacks.items()}
        self.places = {
            member: (name, number) for name, own in self._of_stack.items() for number, member in enumerate(own)
        }  # name of the model -> the stack that holds it, and where
        self.parameters: dict[str, tuple[Optimizer, dict[str, Any], Tensor]] = {}  # name -> (.., its group, ..)
        for optimizer in optimizers:
            if isinstance(optimizer, LBFGS):
                raise CheckpointError("LBFGS keeps vectors over all parameters at once, which no other mesh could load")
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    entry = self.entry(parameter)
                    if entry.held:
                        self.parameters[entry.name] = (optimizer, group, parameter)

    def entry(self, parameter: Tensor) -> Named:
        if id(parameter) not in self._entries:
            raise CheckpointError(
                f"the optimizer has a parameter of shape {list(parameter.shape)} that the model does not have\n"
                "Way out: make the optimizer from the parallel module's parameters(), after parallelize."
            )
        return self._entries[id(parameter)]

    def members(self, name: str) -> tuple[str, ...]:
        """The names of the model for a parameter of this name: several for a stack."""
        return self._of_stack.get(name, (name,))

    def groups(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Every parameter group, of one optimizer after the other, with the names of its parameters on all ranks."""
        yield from zip([group for optimizer in self.optimizers for group in optimizer.param_groups], self._members)

    @cached_property
    def _members(self) -> list[list[str]]:
        groups = [group["params"] for optimizer in self.optimizers for group in optimizer.param_groups]
        mine = [[self.entry(parameter).name for parameter in group] for group in groups]
        if self._gather is None:
            return [[member for name in names for member in self.members(name)] for names in mine]
        ranks: list[list[list[str]]] = self._gather(mine)
        if len(set(map(len, ranks))) > 1:
            raise CheckpointError(f"ranks have {', '.join(map(str, map(len, ranks)))} groups in their optimizers")
        every = [sorted(set().union(*same), key=self._order.__getitem__) for same in zip(*ranks)]
        return [[member for name in names for member in self.members(name)] for names in every]

    def state(self) -> Nested:
        found: Nested = {}
        for name, (optimizer, _, parameter) in self.parameters.items():
            if parameter in optimizer.state:
                held = {
                    key: _held(value, parameter, f"{name}.{key}") for key, value in optimizer.state[parameter].items()
                }
                for number, member in enumerate(self.members(name)):
                    stacked = name in self._of_stack
                    found[member] = {key: _of_member(one, number) if stacked else one for key, one in held.items()}
        groups = [
            {key: slices_of(value) if isinstance(value, Tensor) else value for key, value in group.items()}
            | {"params": names}
            for group, names in self.groups()
        ]
        return {"state": found, "param_groups": groups}


def _held(value: Any, parameter: Tensor, what: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    like = value.shape == parameter.shape and isinstance(value, DTensor)
    if isinstance(parameter, DTensor) and value.numel() > 1 and not like:
        raise CheckpointError(
            f"optimizer state '{what}' is a {type(value).__name__} of shape {list(value.shape)}, and its parameter a\n"
            f"DTensor of shape {list(parameter.shape)}: it is not known which part of the state this rank has"
        )
    return slices_of(value)


def _of_member(held: Any, number: int) -> Any:
    """What a stack's state has of one member; a count of steps is that of all."""
    return held.at(number) if isinstance(held, Slices) and held.shape else held


class NewState:
    """Optimizer state with memory to load into; it is put into the optimizers once it is loaded."""

    def __init__(self, owners: Owners, metadata: Metadata) -> None:
        self._owners = owners
        self.targets: Nested = {}  # flat name -> Slices, or None for what is no tensor
        self._state: dict[str, dict[str, Any]] = defaultdict(dict)
        self._places: list[tuple[str, dict[str, Any], str]] = []  # flat name -> where its value goes
        self._groups: list[dict[str, Any]] = [{} for _ in owners.groups()]
        for flat, path in metadata.planner_data.items():
            if path[:2] == ("optimizer", "state"):
                name, number = owners.places.get(path[2], (path[2], None))
                if name in owners.parameters:  # else of another pipeline stage
                    self._add_state(flat, name, number, path[3], metadata.state_dict_metadata[flat])
            elif path[:2] == ("optimizer", "param_groups") and path[3] != "params":  # the same on every rank
                self._add(flat, self._groups[path[2]], path[3], None, metadata.state_dict_metadata[flat])

    def _add(self, flat: str, into: dict[str, Any], key: str, name: str | None, stored: Any) -> None:
        self._places.append((flat, into, key))
        self.targets[flat] = None
        if not isinstance(stored, TensorStorageMetadata):
            return
        shape, dtype = stored.size, stored.properties.dtype
        if name is None:
            into[key] = torch.empty(shape, dtype=dtype)
            self.targets[flat] = slices_of(into[key])
            return
        _, group, parameter = self._owners.parameters[name]
        into[key] = _empty_state(key, shape, dtype, group, parameter, self._owners.home)
        self.targets[flat] = slices_of(into[key])

    def _add_state(self, flat: str, name: str, number: int | None, key: str, stored: Any) -> None:
        """``number``: of the member of the stack called ``name``; None for a parameter that is no stack."""
        if number is None or not isinstance(stored, TensorStorageMetadata) or not stored.size:
            if not number:  # a step that all members have taken
                self._add(flat, self._state[name], key, name, stored)
            return
        into, (_, group, parameter) = self._state[name], self._owners.parameters[name]
        if key not in into:
            shape = torch.Size((parameter.shape[0], *stored.size))
            into[key] = _empty_state(key, shape, stored.properties.dtype, group, parameter, self._owners.home)
        self._places.append((flat, into, key))
        self.targets[flat] = slices_of(into[key]).at(number)

    def put(self) -> None:
        """Put the values into the optimizers, from :attr:`targets`."""
        for flat, into, key in self._places:
            if not isinstance(self.targets[flat], Slices):
                into[key] = self.targets[flat]
        for optimizer in self._owners.optimizers:
            optimizer.state.clear()
        for name, state in self._state.items():
            optimizer, _, parameter = self._owners.parameters[name]
            optimizer.state[parameter] = state
        for (group, _), loaded in zip(self._owners.groups(), self._groups):
            for key, value in loaded.items():
                if isinstance(group.get(key), Tensor):
                    group[key].copy_(torch.as_tensor(value))  # a scheduler, or a graph, may hold this tensor
                else:
                    group[key] = value


def _empty_state(
    key: str, shape: torch.Size, dtype: torch.dtype, group: Nested, parameter: Tensor, home: torch.device
) -> Tensor:
    """Memory placed as in torch's ``Optimizer.load_state_dict``: like the parameter, except for the step count.

    ``home``: where a parameter on the meta device will be.
    """
    device = home if local_of(parameter).is_meta else local_of(parameter).device
    if key == "step":
        on_device = group.get("capturable") or group.get("fused")
        return torch.empty(shape, dtype=dtype, device=device if on_device else "cpu")
    if not isinstance(parameter, DTensor) or shape != parameter.shape:
        return torch.empty(shape, dtype=dtype, device=device)
    local = torch.empty(local_of(parameter).shape, dtype=dtype, device=device)
    return dtensor(local, parameter.device_mesh, parameter.placements, shape)


def random_state() -> bytes:
    """The state of this process's generators: torch's, also of its CUDA device, numpy's and Python's."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return packed(
        {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy.random.get_state(), "python": random.getstate()}
    )


def set_random_state(found: Mapping[str, Any]) -> None:
    """``found``: what :func:`random_state` has packed."""
    torch.set_rng_state(found["torch"])
    if found["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["cuda"])
    numpy.random.set_state(found["numpy"])
    random.setstate(found["python"])
