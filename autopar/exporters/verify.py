"""What was exported, run: all ranks as one standard model on ONNX Runtime, against the program or its model.

Against the unmodified model where ``weights_from`` is one, unless dropout is on or experts drop rows; else against the
program's graph before it was differentiated and optimised, all ranks of it in torch. Inputs are random; so are weights
that were not given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.errors import ExportError
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
from autopar.simulator.lockstep import Lockstep
from autopar.simulator.parts import joined, parts

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2}  # relative to the largest element
DEVIATION = 0.02  # of random weights

Parts = Sequence[tuple[Part, Traced]]


def verify(job: Job, found: Parts) -> dict[str, float]:
    """The error of each output, relative to its largest element.

    Raises ExportError where one is above the tolerance of its dtype, where files do not fit together, and where not all
    ranks were exported.
    """
    if len(job.ranks) != job.program.mesh.world_size:
        raise ExportError("--verify runs all ranks together, and only some were exported; leave out --rank")
    models = {}
    for part, _ in found:
        models[part.name] = part.rank, onnx.load(job.directory / f"{part.name}.onnx", load_external_data=False)
    check_together([calls_in(model, stem) for stem, (_, model) in models.items()])
    whole = _described(job.program)
    tensors = job.tensors or WholeTensors(random_tensors(whole, (InputKind.PARAMETER, InputKind.BUFFER)))
    inputs = random_tensors(whole, (InputKind.INPUT, InputKind.SEED))
    feeds = _feeds(replace(job, tensors=tensors, weights="safetensors"), found, inputs)
    results = _run(merged(models), feeds)
    return _errors(found, results, expected(whole, tensors, inputs))


def _described(program: AnyProgram) -> Program:
    """The program of one batch, or of one microbatch, on the ranks of one stage: what the parts compute together."""
    return program if isinstance(program, Program) else replace(program.whole, mesh=program.mesh.of_stage)


def random_tensors(program: Program, kinds: Iterable[InputKind]) -> dict[str, Tensor]:
    """Whole tensors by target; whole numbers are below the size of the smallest table."""
    generator = torch.Generator().manual_seed(0)
    shapes = [value(node).shape for node, _ in program.placeholders(InputKind.PARAMETER)]
    below = min((shape[0] for shape in shapes if len(shape) == 2), default=2)
    found: dict[str, Tensor] = {}
    for node, entry in program.placeholders(*kinds):
        kind = value(node)
        if kind.dtype.is_floating_point:
            scale = 1.0 if entry.kind is InputKind.INPUT else DEVIATION
            tensor = torch.randn(kind.shape, generator=generator).mul_(scale).to(kind.dtype)
        else:
            tensor = torch.randint(below, kind.shape, generator=generator).to(kind.dtype)
        found |= dict.fromkeys(entry.names, tensor)
    return found


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


# ---------------------------------------------------------------- what is expected


def expected(program: Program, tensors: WholeTensors, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole outputs by target: of the unmodified model where there is one, else of the program's ranks in torch."""
    users = [entry for entry in program.outputs if entry.kind is OutputKind.USER]
    if tensors.model is not None and program.in_spec is not None and _is_exact(program):
        args, kwargs = call_of(program, inputs)
        buffers = {name: buffer.clone() for name, buffer in tensors.model.named_buffers()}  # statistics may change
        with torch.no_grad():
            leaves = pytree.tree_leaves(torch.func.functional_call(tensors.model, buffers, args, kwargs))
        static = {position for position, _ in program.static_outputs}
        found = [leaf for position, leaf in enumerate(leaves) if position not in static]
        return {entry.target: tensor for entry, tensor in zip(users, found, strict=True)}
    held = []
    for node, entry in program.placeholders(*InputKind):
        if entry.kind is InputKind.CONSTANT:
            whole = program.constants[entry.target]
        elif is_held(entry):
            whole = tensors.find(entry.names, value(node).shape)
        else:
            whole = inputs[entry.target]
        held.append(parts(whole.to(value(node).dtype), value(node).layout, program.mesh))
    with torch.no_grad():
        results = Lockstep(program.mesh).run(program.graph, held)
    return {
        entry.target: joined(entry.target, ranks, value(node).layout, program.mesh)
        for entry, node, ranks in zip(program.outputs, program.returned, results)
        if entry in users
    }


def _is_exact(program: Program) -> bool:
    """Whether the model computes the same: it would draw other masks of dropout, and drops no rows of experts."""
    return not any(program.placeholders(InputKind.SEED)) and program.plan.capacity_factor is None


def call_of(program: Program, inputs: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """args and kwargs of the model's call, of tensors by target."""
    assert program.in_spec is not None
    given = iter([inputs[entry.target] for _, entry in program.placeholders(InputKind.INPUT)])
    static = dict(program.static_inputs)
    leaves = [static[place] if place in static else next(given) for place in range(program.in_spec.num_leaves)]
    args, kwargs = pytree.tree_unflatten(leaves, program.in_spec)
    return args, kwargs


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
            if not error <= TOLERANCE.get(kind.dtype, 0.0):
                raise ExportError(
                    f"{part.name}: output '{output_name(entry)}' differs by {error:.3g} of its largest element, "
                    f"more than {TOLERANCE.get(kind.dtype, 0.0):g}\n"
                    "A collective is missing or wrong, or the exported operators compute something else."
                )
            errors[output_name(entry)] = max(errors.get(output_name(entry), 0.0), error)
    return errors
