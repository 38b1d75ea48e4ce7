"""All ranks start from the same weights: those of rank 0, or an error (``Plan(initial=...)``).

Until the first program lays them out, every rank holds all tensors whole. Their bits are compared then, in one pass
over memory, and only what differs is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autopar.communication.agreement import ranks_text
from autopar.communication.connect import Connection
from autopar.communication.digests import digest
from autopar.dtensors.dtensor import local_of
from autopar.errors import RanksDifferError
from autopar.ir.layout import Layout

logger = logging.getLogger("autopar")
SHOWN = 4


def agree_on_whole(tensors: Mapping[str, Tensor], connection: Connection, initial: str) -> None:
    """Give whole ``tensors`` by name the numbers of rank 0, in place; collective over the mesh.

    Raises RanksDifferError where ranks have other numbers and ``initial`` is "checked".
    """
    agreement, comm = connection.comm.agreement, connection.comm
    names = [name for name, tensor in tensors.items() if not local_of(tensor).is_meta]
    numbers = torch.tensor([digest(local_of(tensors[name])) for name in names], dtype=torch.int64)
    differing = [names[place] for place in agreement.differing(numbers)]
    if not differing:
        return
    if initial == "checked":
        raise RanksDifferError(_message(differing, agreement.everyone(digest(local_of(tensors[differing[0]])))))
    if comm.rank == 0:
        logger.warning("%s differ between the ranks: all take those of rank 0", _named(differing))
    with torch.no_grad():
        for name in differing:
            local = local_of(tensors[name])
            sent = local.contiguous()
            comm.from_first(sent)
            if sent is not local:
                local.copy_(sent)


def check_copies(tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout], connection: Connection) -> None:
    """Raise RanksDifferError unless ranks that hold the same part of one of ``tensors`` hold the same numbers.

    ``layouts`` by name; a tensor without one is whole. Collective over the mesh; what pipeline stages hold is compared
    within each.
    """
    comm, stage = connection.comm, connection.of_stage()
    names = [name for name, tensor in tensors.items() if not local_of(tensor).is_meta]
    numbers = [digest(local_of(tensors[name])) for name in names]
    wrong: set[str] = set()
    for axis in stage.mesh.names:
        split = {name for name, layout in layouts.items() if axis in layout.axes}
        held = [number * (name not in split) for name, number in zip(names, numbers)]
        others = comm.exchange(torch.tensor(held, dtype=torch.int64, device=comm.device), axis)
        wrong |= {names[place] for place in (others != others[0]).any(0).nonzero().flatten().tolist()}
    everyone: list[Any] = comm.agreement.everyone(sorted(wrong)) if _any(bool(wrong), connection) else []
    named = sorted({name for names in everyone for name in names})
    if named:
        ranks = [rank for rank, names in enumerate(everyone) if names]
        raise RanksDifferError(
            f"{_named(named)} differ between {ranks_text(ranks)}, which hold the same part\n"
            "Way out: load or change weights on every rank alike (model.load_state_dict on all of them)."
        )


def _any(own: bool, connection: Connection) -> bool:
    flag = torch.tensor([int(own)])
    connection.comm.agreement.reduce(flag)
    return bool(flag.item())


def _message(differing: list[str], numbers: list[Any]) -> str:
    groups: dict[Any, list[int]] = {}
    for rank, number in enumerate(numbers):
        groups.setdefault(number, []).append(rank)
    said = ", others than ".join(ranks_text(ranks) for ranks in list(groups.values())[:SHOWN])
    return (
        f'{_named(differing)} differ between the ranks, and Plan(initial="checked") asks for equal ones\n'
        f"  {differing[0]}: one on {said}\n"
        "Way out: the same seed before the model is built, the same file loaded on every rank; or "
        'Plan(initial="rank0"): all take those of rank 0.'
    )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""
    return f"parameters or buffers {', '.join(names[:SHOWN])}{more}"
