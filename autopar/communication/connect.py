"""From a mesh to running processes: torchrun's environment, the DeviceMesh, one process group per axis.

Those over several axes at once are made later (``groups.py``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, ProcessGroup, rendezvous  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopar.communication.agreement import Agreement, differences, digest_of
from autopar.communication.channels import group_back
from autopar.communication.communicator import Communicator, peer_failed
from autopar.communication.digests import digest
from autopar.communication.groups import agreement_group
from autopar.communication.process_end import end_shortly
from autopar.communication.timeouts import options, set_timeout
from autopar.dtensors.dtensor_habits import take_over
from autopar.dtensors.torch_on_stages import is_stage
from autopar.errors import LaunchError, RankFailedError, RanksDifferError
from autopar.ir.program import AnyProgram, PipelinedProgram, text_digest
from autopar.mesh import ALIASES, PIPELINE, Mesh, axes_of

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
MOST_PEERS_NAMED = 16


@dataclass(frozen=True)
class Connection:
    """This process as one rank of a mesh."""

    mesh: Mesh
    device_mesh: DeviceMesh
    comm: Communicator

    dims: tuple[str, ...]  # the axis, or the merged axes, of each dim of ``device_mesh``

    @property
    def rank(self) -> int:
        return self.comm.rank

    def of_stage(self) -> Connection:
        """The ranks of this one's pipeline stage: the mesh without ``pp``, on which parameters are laid out."""
        if not self.mesh.is_pipelined:
            return self
        rest = self.mesh.of_stage
        names = tuple(name for name in self.device_mesh.mesh_dim_names or () if name != PIPELINE)
        dims = tuple(axis for axis in self.dims if axis != PIPELINE)
        of_stage = self.device_mesh[names if len(names) > 1 else names[0]]
        take_over(of_stage)
        is_stage(of_stage, partial(self.comm.all_reduce, axis=PIPELINE, op="max"))
        return Connection(rest, of_stage, self.comm, dims)

    def with_merged(self, *groups: str) -> Connection:
        """This one with one dim of the DeviceMesh for several axes, at the place of the first: ``dp_sp`` of ``dp+sp``.

        DTensor can then hold parts that are uneven. Collective over ``groups``, for which process groups are made.
        """
        group_of = {axis: group for group in groups for axis in axes_of(group)}
        dims = tuple(dict.fromkeys(group_of.get(dim, dim) for dim in self.dims))
        if dims == self.dims:
            return self
        order = [self.dims.index(axis) for dim in dims for axis in axes_of(dim)]
        ranks = self.device_mesh.mesh.permute(order).reshape([self.mesh.size(dim) for dim in dims])
        names = tuple(dim.replace("+", "_") for dim in dims)
        own = list(map(self._process_group, dims))
        mesh = DeviceMesh.from_group(own, self.device_mesh.device_type, ranks, mesh_dim_names=names)
        take_over(mesh)
        return Connection(self.mesh, mesh, self.comm, dims)

    def _process_group(self, dim: str) -> ProcessGroup:
        if dim in self.dims:
            return self.device_mesh.get_group(self.dims.index(dim))
        made = self.comm.group(dim)
        assert made is not None, "merged axes have several ranks"
        return made

    def agree(self, program: AnyProgram) -> None:
        """Raise RanksDifferError unless all ranks have the same program; all of them call this at the same time."""
        constants = {name: digest(tensor) for name, tensor in sorted(_constants(program).items())}
        agreement = self.comm.agreement
        agreement.start(digest_of((text_digest(program), constants)), lambda: "this one", "")
        if not agreement.agrees():
            raise RanksDifferError(
                "the ranks have made different programs of this call\n"
                + differences(agreement.everyone({"the program": _first_lines(program), "constants": str(constants)}))
                + "\nWay out: the same model (its attributes, tables and buffers too), mesh and plan on every rank."
            )


def _constants(program: AnyProgram) -> dict[str, Tensor]:
    programs = program.stages if isinstance(program, PipelinedProgram) else (program,)
    return {name: tensor for one in programs for name, tensor in one.constants.items()}


def _first_lines(program: AnyProgram) -> str:
    return f"{len(str(program).splitlines())} lines, number {digest_of(str(program)) % 10**6:06d}"


def launched() -> bool:
    """Whether this process can be a rank: it was started by torchrun, or a process group exists already."""
    return dist.is_initialized() or ("RANK" in os.environ and "WORLD_SIZE" in os.environ)


def connect(mesh: Mesh, timeout: float, device: torch.device, device_mesh: DeviceMesh | None = None) -> Connection:
    """Join the other ranks of ``mesh``; the process group is made if there is none.

    ``timeout`` (seconds) is from then on that of all groups of the mesh. A mesh of one rank needs no launcher.
    ``device_mesh``: one that was made already and has the axes of ``mesh``, in the same order.
    Raises LaunchError when this process is not one of ``mesh.world_size`` launched ones, RankFailedError when the
    others do not come.
    """
    end_shortly()
    if device_mesh is None and not dist.is_initialized():
        _join(mesh, timeout, device)
    elif device_mesh is None and dist.get_world_size() != mesh.world_size:
        raise LaunchError(_sizes(mesh, dist.get_world_size(), "the process group has"))
    agreement = _agreement(mesh, timeout, device_mesh)
    if device_mesh is None or (mesh.is_pipelined and not mesh.of_stage.axes):  # then it has no axis to hold DTensors
        device_mesh = _device_mesh(mesh, timeout, device)
    take_over(device_mesh)
    dims = tuple(ALIASES.get(name, name) for name in device_mesh.mesh_dim_names or ())
    return Connection(mesh, device_mesh, _communicator(mesh, device_mesh, timeout, device, agreement), dims)


def not_launched(mesh: Mesh) -> LaunchError:
    """The message for a user who calls a parallel module in a process without peers."""
    return LaunchError(
        f"{mesh} needs {mesh.world_size} processes and this is a single one, not started by torchrun.\n"
        f"Way out: {_command(mesh)}\n"
        "Without a launch there are model.program (what the ranks would run) and model.simulate(...) (run it here)."
    )


def _join(mesh: Mesh, timeout: float, device: torch.device) -> None:
    backend = BACKENDS.get(device.type)
    if backend is None:
        raise LaunchError(f"the model is on device '{device}'; ranks compute on {', '.join(BACKENDS)}")
    if not launched():
        if mesh.world_size != 1:
            raise not_launched(mesh)
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return
    processes = int(os.environ["WORLD_SIZE"])
    if processes != mesh.world_size:
        raise LaunchError(_sizes(mesh, processes, "torchrun started"))
    with _peers_needed("the start of the process group", int(os.environ["RANK"]), processes, timeout):
        limit = timedelta(seconds=timeout)
        dist.init_process_group(
            backend, timeout=limit, store=_store(limit), rank=int(os.environ["RANK"]), world_size=processes
        )


def _store(timeout: timedelta) -> Any:
    """torchrun's store, without the entries of an earlier attempt.

    torchrun (2.13) keeps one store for all its restarts, where ranks then find the addresses of dead ones and wait for
    them. On several machines the numbers of attempts may differ, so that nothing can be done here.
    """
    store = next(rendezvous("env://", timeout=timeout))[0]
    store.set_timeout(timeout)
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def _peers_needed(what: str, rank: int, world_size: int, timeout: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:
        peers = [peer for peer in range(min(world_size, MOST_PEERS_NAMED)) if peer != rank]
        raise peer_failed(what, rank, peers, timeout, problem) from None


def _device_mesh(mesh: Mesh, timeout: float, device: torch.device) -> DeviceMesh:
    axes = mesh.axes if mesh.of_stage.axes else (*mesh.axes, ("dp", 1))  # DTensors need an axis
    names, shape = tuple(name for name, _ in axes), tuple(size for _, size in axes)
    backend = dist.get_backend()
    smaller = [name for name, size in zip(names, shape) if 1 < size < mesh.world_size]  # the world has its group
    override: dict[Any, Any] = {name: options(backend, timeout) for name in smaller}
    with _peers_needed("making the process groups", dist.get_rank(), mesh.world_size, timeout):
        return init_device_mesh(device.type, shape, mesh_dim_names=names, backend_override=override or None)


def _agreement(mesh: Mesh, timeout: float, device_mesh: DeviceMesh | None) -> Agreement:
    """Of the ranks of the mesh. Raises RanksDifferError where they were started for different ones."""
    ranks = list(range(mesh.world_size)) if device_mesh is None else device_mesh.mesh.flatten().tolist()
    rank = dist.get_rank()

    def failed(what: str, problem: Exception) -> RankFailedError:
        return peer_failed(what, rank, [peer for peer in ranks if peer != rank], timeout, problem)

    with _peers_needed("the start of the mesh", rank, mesh.world_size, timeout):
        group = agreement_group(ranks, timeout)
    agreement = Agreement(group, failed)
    agreement.compare({"mesh": str(mesh)}, "the same mesh on every rank.")
    return agreement


def _communicator(
    mesh: Mesh, device_mesh: DeviceMesh, timeout: float, device: torch.device, agreement: Agreement
) -> Communicator:
    groups = {}
    for name in device_mesh.mesh_dim_names or ():
        group = device_mesh.get_group(name)
        set_timeout(group, timeout)
        groups[ALIASES.get(name, name)] = group
    back = group_back(mesh, groups[PIPELINE], timeout) if mesh.size(PIPELINE) > 1 else None
    coordinate = device_mesh.get_coordinate()
    if coordinate is None:
        raise LaunchError(f"rank {dist.get_rank()} is not on the DeviceMesh that was given ({device_mesh})")
    rank = mesh.rank(dict(zip(mesh.names, coordinate)))
    world = device_mesh.mesh.flatten().tolist()
    return Communicator(mesh, groups, rank, timeout, device, back, world, agreement)


def _sizes(mesh: Mesh, processes: int, who: str) -> str:
    return (
        f"{mesh} has {mesh.world_size} ranks, and {who} {processes} process{'es' * (processes != 1)}.\n"
        f"Way out: {_command(mesh)}\n"
        f"or a mesh of {processes} ranks."
    )


def _command(mesh: Mesh) -> str:
    script = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] not in ("", "-c") else "train.py"
    return f"torchrun --nproc-per-node {mesh.world_size} {script}"
