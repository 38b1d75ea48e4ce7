"""What was exported, run: all ranks as one standard model on ONNX Runtime, and compared.

:mod:`autopar.exporters.expected` says with what.
Inputs are random; so are weights that were not given. Programs in bfloat16 are compared in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from safetensors import safe_open
from torch import Tensor

from autopar.errors import ExportError
from autopar.exporters.expected import described, expected, random_tensors
from autopar.exporters.in_float32 import is_narrow, model_in_float32, widened
from autopar.exporters.job import Job
from autopar.exporters.merged import merged
from autopar.exporters.onnx_check import calls_in, check_together
from autopar.exporters.rank_module import Part, is_held, part_of
from autopar.exporters.state import weights_of
from autopar.exporters.traced import Traced
from autopar.exporters.whole_tensors import WholeTensors
from autopar.exporters.wiring import input_name, output_name
from autopar.ir.layout import shard
from autopar.ir.node import value
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import InputKind, OutputKind
from autopar.simulator.parts import wholes_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2}  # relative to the largest element

Parts = Sequence[tuple[Part, Traced]]


@dataclass(frozen=True)
class Verified:
    """``errors``: of each output, relative to its largest element. ``against``: what has computed the others.

    ``promoted``: whether both sides have computed in float32 what the program computes in bfloat16.
    """

    errors: Mapping[str, float]
    against: str
    promoted: bool

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


def verify(job: Job, found: Parts) -> Verified:
    """Run all ranks together, and compare.

    Raises ExportError where an error is above the tolerance of its dtype, where files do not fit together, and where
    not all ranks were exported.
    """
    if len(job.ranks) != job.program.mesh.world_size:
        raise ExportError("--verify runs all ranks together, and only some were exported; leave out --rank")
    models = {}
    for part, _ in found:
        models[part.name] = part.rank, onnx.load(job.directory / f"{part.name}.onnx", load_external_data=False)
    check_together([calls_in(model, stem) for stem, (_, model) in models.items()])
    world, promoted = merged(models), is_narrow(job.program)
    if promoted:
        model_in_float32(world)
    tensors = job.tensors or WholeTensors(_random_weights(job.program), made=job.program.made_buffers)
    inputs = random_tensors(described(job.program), (InputKind.INPUT, InputKind.SEED))
    inputs |= _of_the_batch(described(job.program), tensors, inputs)
    feeds = _feeds(replace(job, tensors=tensors, weights="safetensors"), found, inputs)
    wanted = expected(job.program, tensors, inputs)
    return Verified(_errors(found, _run(world, feeds), wanted.outputs), wanted.against, promoted)


def verify_members(job: Job, found: Parts) -> Verified:
    """The files of a family, run at the sizes of some of its members; the errors are the largest of all."""
    done = []
    for member in job.members:
        parts = []
        for part, role in found:
            own = replace(part, whole=member)
            inputs = [(node, entry) for node, entry in own.program.placeholders(*InputKind) if not is_held(entry)]
            parts.append((own, replace(role, inputs=tuple(inputs))))
        done.append(verify(replace(job, program=member), parts))
    errors = {name: max(one.errors[name] for one in done) for name in done[0].errors}
    return replace(done[0], errors=errors)


def _of_the_batch(program: Program, tensors: WholeTensors, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a microbatch that is the whole batch is weighed with, by target."""
    if not any(program.placeholders(InputKind.WHOLE)):
        return {}
    buffers = program.counts.placeholders(InputKind.BUFFER) if program.counts is not None else ()
    held = {entry.target: tensors.find(entry.names, value(node).shape) for node, entry in buffers}
    return wholes_of(program, [inputs[entry.target] for _, entry in program.placeholders(InputKind.INPUT)], held)


def _random_weights(program: AnyProgram) -> dict[str, Tensor]:
    """Of the source too: a stack of parameters is then made of its members. Without buffers that the program has."""
    kinds, whole = (InputKind.PARAMETER, InputKind.BUFFER), described(program)
    found = random_tensors(whole, kinds)
    if whole.source is not None:
        found = random_tensors(whole.source, kinds)
    return {name: tensor for name, tensor in found.items() if name not in program.made_buffers}


# ---------------------------------------------------------------- the run


def _feeds(job: Job, found: Parts, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    feeds = {}
    for part, role in found:
        own: dict[str, Tensor] = {**_stored(job.directory / f"{part.name}.safetensors")}
        own = {**weights_of(part, job), **own}
        for node, entry in role.inputs:
            if entry.kind is not InputKind.RECEIVED:
                own[input_name(entry)] = part_of(inputs[entry.target], node, part)
        for name, tensor in own.items():
            feeds[f"{part.name}/{name}"] = _array(name, tensor.detach())
    return feeds


def _array(name: str, tensor: Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.to(widened(tensor.dtype))
    if tensor.dtype not in TOLERANCE and tensor.dtype.is_floating_point:
        raise ExportError(
            f"'{name}' is {tensor.dtype}, which ONNX Runtime's CPU kernels do not compute with\n"
            "Way out: leave out --verify, or verify the same program compiled for a float32 model."
        )
    found: np.ndarray[Any, Any] = tensor.contiguous().numpy()
    return found


def _stored(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _run(world: onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        onnx.checker.check_model(world, full_check=True)
        session = onnxruntime.InferenceSession(world.SerializeToString(), options, ["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_outputs()]
        wanted = {entry.name for entry in session.get_inputs()}
        values = session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    except Exception as error:  # onnx and ONNX Runtime have many classes of their own
        raise ExportError(f"the ranks together do not run: {str(error).strip()[:500]}") from error
    return {name: torch.from_numpy(np.asarray(array)) for name, array in zip(names, values)}


def _errors(found: Parts, results: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    errors: dict[str, float] = {}
    for part, role in found:
        for entry, node in zip(role.outputs, part.program.returned):
            if entry.kind is not OutputKind.USER:
                continue
            whole, kind = wanted[entry.target], value(node)
            piece = shard(whole, kind.layout, part.mesh, part.coordinates)
            mine = results[f"{part.name}/{output_name(entry)}"]
            for dim, size in enumerate(piece.shape):
                mine = mine.narrow(dim, 0, size)
            scale = max(float(whole.double().abs().max()), 1e-30) if whole.numel() else 1.0
            error = float((mine.double() - piece.double()).abs().max()) / scale if piece.numel() else 0.0
            allowed = TOLERANCE.get(widened(kind.dtype), 0.0)
            if not error <= allowed:
                raise ExportError(
                    f"{part.name}: output '{output_name(entry)}' differs by {error:.3g} of its largest element, "
                    f"more than {allowed:g}\n"
                    "A collective is missing or wrong, or the exported operators compute something else."
                )
            errors[output_name(entry)] = max(errors.get(output_name(entry), 0.0), error)
    return errors
