"""``autopar.parallelize``: from a model and a mesh to the parallel module that this process runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.mesh import Mesh
from autopar.module import ParallelModule
from autopar.plan import Plan
from autopar.runtime.connect import Connection, connect, launched


def parallelize(
    model: nn.Module,
    mesh: Mesh | DeviceMesh,
    plan: Plan | None = None,
    *,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
) -> ParallelModule:
    """``model`` as one rank of ``mesh``: a drop-in ``nn.Module`` that takes over the model's parameters.

    Under torchrun every rank calls this and then the returned module, as a script for one device would. In a process
    that was not launched (and a mesh of more than one rank) there are ``.program`` and ``.simulate(...)``.

    Args:
        example_inputs: keyword (dict) or positional (tuple) arguments of one call, to compile now rather than then.

    Raises LaunchError when the processes do not fit the mesh; what :func:`autopar.compile_program` raises.
    """
    plan = plan or Plan()
    device_mesh = mesh if isinstance(mesh, DeviceMesh) else None
    mesh = Mesh.from_device_mesh(mesh) if isinstance(mesh, DeviceMesh) else mesh
    module = ParallelModule(model, mesh, plan, _connection(model, mesh, plan, device_mesh))
    if isinstance(example_inputs, Mapping):
        module.prepare(**example_inputs)
    elif example_inputs is not None:
        module.prepare(*example_inputs)
    return module


def _connection(model: nn.Module, mesh: Mesh, plan: Plan, device_mesh: DeviceMesh | None) -> Connection | None:
    if not launched() and mesh.world_size != 1:
        return None
    return connect(mesh, plan.timeout, _device(model, device_mesh), device_mesh)


def _device(model: nn.Module, device_mesh: DeviceMesh | None) -> torch.device:
    """The device on which this rank computes: that of the parameters; for a model on meta, the accelerator if any."""
    here = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device_mesh is not None and here.type != device_mesh.device_type:
        here = torch.device(device_mesh.device_type)
    if here.type == "meta":
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if here.type == "cuda":
        if here.index is None:
            here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    return here
