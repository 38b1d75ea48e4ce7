"""What an export has to give: the outputs of the model, of the program's source, or of its ranks in torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.exporters.in_float32 import is_narrow, program_in_float32
from autopar.exporters.rank_module import is_held
from autopar.exporters.whole_tensors import WholeTensors
from autopar.ir.node import value
from autopar.ir.program import AnyProgram, Program
from autopar.ir.stacked_parameters import is_stacked, member_names
from autopar.ir.tables import InputKind, OutputKind
from autopar.simulator.lockstep import Lockstep
from autopar.simulator.parts import joined, parts

DEVIATION = 0.02  # of random weights


@dataclass(frozen=True)
class Expected:
    """Whole outputs by target. ``against``: what has computed them: ``model``, ``source`` or ``program``."""

    outputs: Mapping[str, Tensor]
    against: str


def expected(program: AnyProgram, tensors: WholeTensors, inputs: Mapping[str, Tensor]) -> Expected:
    """By the model where ``tensors`` are those of one, else by the source, else by the ranks of the program in torch.

    The last too where dropout draws other masks in the model, or experts drop rows. A program in bfloat16 is compared
    with its source, and in float32.
    """
    narrow, whole = is_narrow(program), described(program)
    if _is_exact(whole):
        if tensors.model is not None and whole.in_spec is not None and not narrow:
            return Expected(_of_model(whole, tensors, inputs), "model")
        if whole.source is not None:
            return Expected(_of_graph(whole.source, tensors, inputs, _borders(whole), narrow), "source")
    return Expected(_of_graph(whole, tensors, inputs, _borders(whole), narrow), "program")


def described(program: AnyProgram) -> Program:
    """The program of one batch, or of one microbatch, on the ranks of one stage: what the parts compute together."""
    return program if isinstance(program, Program) else replace(program.whole, mesh=program.mesh.of_stage)


def _borders(program: Program) -> dict[str, torch.dtype]:
    """The dtype in which each parameter and buffer is held, also by the names of those that a stack is made of."""
    found: dict[str, torch.dtype] = {}
    for node, entry in program.placeholders(InputKind.PARAMETER, InputKind.BUFFER):
        kind = value(node)
        members = member_names(entry.target, kind.shape[0]) if is_stacked(entry.target) else ()
        found |= dict.fromkeys((*entry.names, *members), kind.dtype)
    return found


def _is_exact(program: Program) -> bool:
    """Whether the model computes the same: it would draw other masks of dropout, and drops no rows of experts."""
    return not any(program.placeholders(InputKind.SEED)) and program.plan.capacity_factor is None


def _of_model(program: Program, tensors: WholeTensors, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert tensors.model is not None
    args, kwargs = call_of(program, inputs)
    buffers = {name: buffer.clone() for name, buffer in tensors.model.named_buffers()}  # statistics may change
    with torch.no_grad():
        leaves = pytree.tree_leaves(torch.func.functional_call(tensors.model, buffers, args, kwargs))
    static = {position for position, _ in program.static_outputs}
    found = [leaf for position, leaf in enumerate(leaves) if position not in static]
    users = [entry for entry in program.outputs if entry.kind is OutputKind.USER]
    return {entry.target: tensor for entry, tensor in zip(users, found, strict=True)}


def _of_graph(
    program: Program,
    tensors: WholeTensors,
    inputs: Mapping[str, Tensor],
    borders: Mapping[str, torch.dtype],
    narrow: bool,
) -> dict[str, Tensor]:
    """By the graph of ``program`` before it was differentiated and optimised, on all of its ranks."""
    program = program_in_float32(program) if narrow else program
    held = []
    for node, entry in program.placeholders(*InputKind):
        if entry.kind is InputKind.CONSTANT:
            whole = program.constants[entry.target]
        elif is_held(entry):
            whole = tensors.find(entry.names, value(node).shape)
            whole = whole.to(borders.get(entry.target, whole.dtype))
        else:
            whole = inputs[entry.target]
        held.append(parts(whole.detach().to(value(node).dtype), value(node).layout, program.mesh))
    with torch.no_grad():
        results = Lockstep(program.mesh).run(program.graph, held)
    return {
        entry.target: joined(entry.target, ranks, value(node).layout, program.mesh)
        for entry, node, ranks in zip(program.outputs, program.returned, results)
        if entry.kind is OutputKind.USER
    }


def call_of(program: Program, inputs: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """args and kwargs of the model's call, of tensors by target."""
    assert program.in_spec is not None
    given = iter([inputs[entry.target] for _, entry in program.placeholders(InputKind.INPUT)])
    static = dict(program.static_inputs)
    leaves = [static[place] if place in static else next(given) for place in range(program.in_spec.num_leaves)]
    args, kwargs = pytree.tree_unflatten(leaves, program.in_spec)
    return args, kwargs


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
