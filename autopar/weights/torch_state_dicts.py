"""``torch.distributed.checkpoint.state_dict`` on a pipeline, where each rank has the tensors of its stage.

The door to what that file has inside. ``full_state_dict=True`` asks for all of a model and an optimizer: here of all
stages. Otherwise ``param_groups`` are those of all stages: a file has them once. With ``broadcast_from_rank0=True``
torch sends to all what one stage has; here rank 0 sends everything, and each stage takes its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.communication.connect import Connection
from autopar.dtensors.dtensor import full_of
from autopar.dtensors.late_modules import when_imported
from autopar.errors import InvariantError
from autopar.mesh import PIPELINE
from autopar.weights.parameters import Weights

Path = tuple[str, ...]
GROUPS, MEMBERS = "param_groups", "params"


class _Loading:
    """``is_under_way``: torch looks at what a rank has itself."""

    is_under_way = False


_loading = _Loading()


@cache
def let_torch_have_all_stages(is_pipelined: bool) -> None:
    """Let torch's functions do so for parallel modules on a pipeline, from the first on."""
    if is_pipelined:
        when_imported("torch.distributed.checkpoint.state_dict", _change)


def _change(module: Any) -> None:
    for name in ("_get_model_state_dict", "_get_optim_state_dict"):
        setattr(module, name, _gathering(getattr(module, name)))
    for name in ("_load_model_state_dict", "_load_optim_state_dict"):
        setattr(module, name, _broadcasting(getattr(module, name)))


def _gathering(usual: Any) -> Any:
    """``usual`` that gives the tensors of all stages where those of one stage would be whole."""

    def gathered(model: nn.Module, *rest: Any) -> dict[str, Any]:
        *others, info = rest
        connection = _pipeline_of(model)
        if connection is None or not info.full_state_dict:
            found: dict[str, Any] = usual(model, *rest)
            if connection is not None and GROUPS in found and not _loading.is_under_way:
                found[GROUPS] = _together(connection.comm.agreement.everyone(found[GROUPS]), (GROUPS,))
            return found
        held = usual(model, *others, replace(info, full_state_dict=False, cpu_offload=False))
        whole = of_all_stages(held, connection, "cpu" if info.cpu_offload else None)
        return whole if not info.cpu_offload or dist.get_rank() == 0 else {}

    return gathered


def _broadcasting(usual: Any) -> Any:
    """``usual`` that has all tensors from rank 0 where it would send them by the names of one stage."""

    def broadcast(model: nn.Module, *rest: Any) -> Any:
        *others, state, info = rest
        if info.broadcast_from_rank0 and _pipeline_of(model) is not None:
            box = [state if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(box, src=0)
            state, info = box[0], replace(info, broadcast_from_rank0=False)
        before, _loading.is_under_way = _loading.is_under_way, True
        try:
            return usual(model, *others, state, info)
        finally:
            _loading.is_under_way = before

    return broadcast


def _pipeline_of(model: nn.Module) -> Connection | None:
    """The connection of the parallel module that ``model`` is, or has, if that is on a pipeline."""
    for module in model.modules():
        weights = getattr(vars(module).get("_held"), "weights", None)
        if isinstance(weights, Weights) and weights.connection is not None and weights.connection.mesh.is_pipelined:
            return weights.connection
    return None


@torch.no_grad()
def of_all_stages(held: Mapping[str, Any], connection: Connection, device: str | None = None) -> dict[str, Any]:
    """The whole tensors, and other values, of a nested state dict of which this rank has ``held``; collective.

    Raises InvariantError where stages have other groups of parameters.
    """
    comm = connection.comm
    leaves = dict(_leaves(held))
    told = {path: _Outline(leaf) if isinstance(leaf, Tensor) else leaf for path, leaf in leaves.items()}
    stages: dict[int, Mapping[Path, Any]] = {}
    for rank, one in enumerate(comm.agreement.everyone(told)):
        stages.setdefault(connection.mesh.coordinates(rank)[PIPELINE], one)
    found: dict[Path, Any] = {}
    for path in dict.fromkeys(path for stage in sorted(stages) for path in stages[stage]):
        having = [stage for stage in sorted(stages) if path in stages[stage]]
        known = stages[having[0]][path]
        if isinstance(known, _Outline):
            whole = full_of(leaves[path]) if path in leaves else None  # of a stage that has it too: all its ranks do so
            mine = whole if having[0] == comm.coordinates[PIPELINE] else None
            found[path] = _over_stages(mine, known, connection).to(device or device_of(known.device, comm.device))
        else:
            found[path] = _together([stages[stage][path] for stage in having], path)
    return _nested(found)


def device_of(elsewhere: torch.device, own: torch.device) -> torch.device:
    """That of this rank for what another one has on ``elsewhere``: a GPU of its own."""
    return elsewhere if elsewhere.type == "cpu" else own


def _over_stages(mine: Tensor | None, known: _Outline, connection: Connection) -> Tensor:
    """On all ranks, what the ranks of one stage have as ``mine``."""
    if mine is None:
        mine = torch.zeros(known.shape, dtype=known.dtype)
    numbers = mine.to(connection.comm.device, torch.uint8 if known.dtype is torch.bool else known.dtype)
    return connection.comm.all_reduce(numbers, PIPELINE).to(known.dtype)


class _Outline:
    """What ranks tell each other of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device


def _leaves(held: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, value in held.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _nested(found: Mapping[Path, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for (*above, key), value in found.items():
        table = made
        for name in above:
            table = table.setdefault(name, {})
        if isinstance(value, Mapping):  # an empty one
            table.setdefault(key, {})
        else:
            table[key] = value
    return made


def _together(values: Sequence[Any], path: Path) -> Any:
    """One of ``values`` of several stages, which are alike; of groups of parameters, those with all parameters."""
    if path != (GROUPS,):
        return values[0]
    options = [[{key: group[key] for key in group if key != MEMBERS} for group in groups] for groups in values]
    if any(one != options[0] for one in options):
        raise InvariantError(
            "pipeline stages have optimizers with other groups of parameters, or other options of these: "
            f"{options[0]} and {next(one for one in options if one != options[0])}\n"
            "Way out: make the same groups on every rank, empty ones too; or autopar.Checkpoints(directory)."
        )
    names = [[name for groups in values for name in groups[n][MEMBERS]] for n in range(len(options[0]))]
    return [{MEMBERS: list(dict.fromkeys(own)), **group} for own, group in zip(names, options[0])]
