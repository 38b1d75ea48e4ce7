"""The format ``onnx``: a model for each rank (and stage), whose collectives are operators of ``autopar.collective``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import onnx
from torch import Tensor

from autopar.errors import ExportError
from autopar.exporters.job import Job
from autopar.exporters.logical import LOGICAL, write_logical
from autopar.exporters.onnx_check import check_files
from autopar.exporters.onnx_dialects import to_tensorrt
from autopar.exporters.onnx_dims import name_sizes
from autopar.exporters.onnx_functions import Functions
from autopar.exporters.onnx_rank import note, rank_model, with_data
from autopar.exporters.onnx_role import onnx_role
from autopar.exporters.rank_module import constants_of, parts_of, rank_tensors
from autopar.exporters.references import references
from autopar.exporters.state import weights_of
from autopar.exporters.traced import Traced, traced
from autopar.exporters.verify import verify, verify_members
from autopar.exporters.wiring import describe_part
from autopar.ir.program import PipelinedProgram


def write(job: Job) -> Mapping[str, Any]:
    """``rank0.onnx``, with its tensors in ``rank0.safetensors``, and so on.

    Raises ExportError for what ONNX cannot hold, and for a file that the checks refuse.
    """
    if job.sizes is not None and isinstance(job.program, PipelinedProgram):
        raise ExportError(
            "stages of a pipeline send each other tensors, whose sizes an ONNX Recv has as numbers\n"
            "Way out: the format pt2; or export(family.member({'b': ..., 's': ...}), ...)."
        )
    roles: dict[tuple[int, int], tuple[Traced, onnx.ModelProto]] = {}
    entries, found = [], []
    for part in parts_of(job.program, job.ranks):
        if part.role not in roles:
            job.told(f"translating {part.name}")
            functions = Functions()
            role = traced(part, forms=functions.forms, sizes=job.sizes)
            model = onnx_role(role, functions, job.options.opset, job.options.ir)
            if job.sizes is not None:
                name_sizes(model, part, role, job.sizes)
            roles[part.role] = role, model
        role, whole = roles[part.role]
        job.told(f"writing {part.name}.onnx")
        model = rank_model(whole, part, role)
        tensors: dict[str, Tensor] = {**rank_tensors(part, role.own), **constants_of(part)}
        tensors |= {name: tensor for name, tensor in weights_of(part, job).items() if not tensor.is_meta}
        with_data(model, tensors, job.directory, f"{part.name}.safetensors")
        entry = describe_part(part, role, f"{part.name}.onnx", job.sizes)
        note(model, rank=part.rank, coordinates=entry["coordinates"], mesh=dict(job.program.mesh.axes))
        if job.weights == "reference" and job.tensors is not None:
            entry["weights"] = references(part, job.tensors)
        onnx.save(model, job.directory / entry["file"])
        entries.append(entry)
        found.append((part, role))
    job.told("checking")
    files = [entry["file"] for entry in entries]
    check_files(job.directory, files, whole=len(job.ranks) == job.program.mesh.world_size)
    about: dict[str, Any] = {"parts": entries}
    if job.options.verify:
        job.told("running all ranks as one model")
        done = verify(job, found) if job.sizes is None else verify_members(job, found)
        about |= {"verified": dict(done.errors), "verified_against": done.against}
        if done.promoted:
            about["verified_in"] = "float32"
    about |= _logical(job)
    if job.options.dialect == "tensorrt":
        for file in files:
            model = onnx.load(job.directory / file, load_external_data=False)
            onnx.save(to_tensorrt(model, file), job.directory / file)
    return about


def _logical(job: Job) -> Mapping[str, str]:
    """Write the unsplit model, of which the manifest says where it is, or why there is none."""
    if job.sizes is not None:
        return {"no_logical": f"no {LOGICAL}: this is a family, whose source has one size"}
    job.told(f"writing {LOGICAL}")
    try:
        write_logical(job)
    except ExportError as error:  # the ranks' files do without
        if job.program.source is not None:
            warnings.warn(str(error), stacklevel=3)
        return {"no_logical": str(error)}
    return {"logical": LOGICAL}
