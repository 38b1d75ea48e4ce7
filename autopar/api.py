"""``autopar.parallelize``: from a model and a mesh to the parallel module that this process runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.choices import check_choices
from autopar.communication.connect import Connection, connect, launched
from autopar.compiled_models import refuse_compiled
from autopar.errors import check_kind
from autopar.frontend.fingerprint import model_facts
from autopar.hidden_modules import note_hidden_modules
from autopar.mesh import Mesh
from autopar.module import ParallelModule
from autopar.other_methods import refuse_wrapped
from autopar.plan import Plan

if TYPE_CHECKING:
    from autopar.stored_programs import OneProgram, Stored


def parallelize(
    model: nn.Module,
    mesh: Mesh | DeviceMesh | None = None,
    plan: Plan | None = None,
    *,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    program: OneProgram | Sequence[OneProgram] | None = None,
) -> ParallelModule:
    """``model`` as one rank of ``mesh``: a drop-in ``nn.Module`` that takes over the model's parameters.

    Under torchrun every rank calls this and then the returned module, as a script for one device would. In a process
    that was not launched (and a mesh of more than one rank) there are ``.program`` and ``.simulate(...)``.

    Args:
        example_inputs: keyword (dict) or positional (tuple) arguments of one call, to compile now rather than then.
        program: a directory that ``autopar compile`` or ``program.save`` wrote, a program, or several of them. Calls
            like those that they were compiled for are not traced and not compiled; another call is compiled, with a
            warning. Mesh and plan are then the program's. Also a family, or its directory (``save_family``): calls of
            all its sizes.

    Raises ValueError for choices that do nothing on this mesh; LaunchError when the processes do not fit it;
    ProgramFileError for a ``program`` that was compiled from another model, by other code, or for another mesh or plan;
    what :func:`autopar.compile_program` raises.
    """
    _check_arguments(model, mesh, plan, example_inputs)
    stored = _stored(program)
    if mesh is None and not stored:
        raise ValueError(
            "parallelize needs a mesh\nWay out: parallelize(model, Mesh(dp=2, tp=2)), or program=, which has one."
        )
    device_mesh = mesh if isinstance(mesh, DeviceMesh) else None
    mesh = Mesh.from_device_mesh(mesh) if isinstance(mesh, DeviceMesh) else mesh or stored[0].program.mesh
    plan = plan or (stored[0].program.plan if stored else Plan())
    check_choices(mesh, plan)
    note_hidden_modules(model)
    for one in stored:
        one.check_fits(model, mesh, plan)
    where = " and ".join(one.where for one in stored)
    connection = _connection(model, mesh, plan, device_mesh)
    if connection is not None:
        facts = model_facts(model) | {f"Plan({name})": repr(choice) for name, choice in plan.to_json().items()}
        connection.comm.agreement.compare(facts, "the same code, model and plan on every rank.")
    module = ParallelModule(model, mesh, plan, connection, [one.family or one.program for one in stored], where)
    if isinstance(example_inputs, Mapping):
        module.prepare(**example_inputs)
    elif example_inputs is not None:
        module.prepare(*example_inputs)
    return module


def _stored(program: OneProgram | Sequence[OneProgram] | None) -> list[Stored]:
    if program is None:
        return []
    from autopar.stored_programs import stored_programs  # which reads files and families

    return stored_programs(program)


def _check_arguments(model: nn.Module, mesh: object, plan: object, example_inputs: object) -> None:
    """Raise ValueError for an argument of another kind than :func:`parallelize` takes."""
    check_kind("model", model, nn.Module, "a module that was built: parallelize(Net(), autopar.Mesh(dp=2))")
    refuse_wrapped(model)
    refuse_compiled(model)
    check_kind("mesh", mesh, Mesh | DeviceMesh | None, "autopar.Mesh(dp=2, tp=2)")
    check_kind("plan", plan, Plan | None, "autopar.Plan(zero=3), for example")
    if isinstance(example_inputs, Mapping):
        return
    way_out = "example_inputs=(x,) by position, or a dict by name: example_inputs={'x': x}"
    check_kind("example_inputs", example_inputs, list | tuple | None, way_out)


def _connection(model: nn.Module, mesh: Mesh, plan: Plan, device_mesh: DeviceMesh | None) -> Connection | None:
    if mesh.world_size != 1 and (not launched() or _is_alone()):
        return None
    return connect(mesh, plan.timeout, _device(model, device_mesh), device_mesh)


def _is_alone() -> bool:
    """Whether the process group is that of a mesh of one rank, which no launcher has started."""
    return "RANK" not in os.environ and dist.is_initialized() and dist.get_world_size() == 1


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
