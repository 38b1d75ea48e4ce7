"""What holds of every program that was saved, and has to hold of one that was read: its parts fit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.errors import ProgramFileError
from autopar.ir.node import Node, output_node, value, values
from autopar.ir.parse import TAILS
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.tables import InputKind, OutputKind


def check_loaded(program: AnyProgram, constants: Mapping[str, Tensor]) -> None:
    """Raise ProgramFileError where text, manifest and ``constants`` of ``program`` contradict each other."""
    _check_constants(program, constants)
    for part in (program, *program.parts):
        _check_names(part)
        _check_types(part)
    _check_positions("static_inputs", program.static_inputs, program.in_spec)
    _check_positions("static_outputs", program.static_outputs, program.out_spec)
    for part in program.parts:
        _check_role(part)
    if isinstance(program, PipelinedProgram):
        _check_pipeline(program)


def check_source(source: AnyProgram, program: AnyProgram) -> None:
    """Raise ProgramFileError unless ``source`` is a graph on one rank with the inputs and outputs of ``program``."""
    if not isinstance(source, Program) or source.role is not None or source.mesh.world_size > 1:
        raise ProgramFileError("a source is one graph on one rank, without stages, forward and backward")
    _check_constants(source, source.constants)
    _check_names(source)
    _check_types(source)
    for what, own, wanted in (
        ("takes", _user_inputs(source), _user_inputs(program)),
        ("returns", _user_outputs(source), _user_outputs(program)),
    ):
        if own != wanted:
            raise ProgramFileError(f"it {what} {', '.join(own)[:200]}; the program {what} {', '.join(wanted)[:200]}")


def _user_inputs(program: AnyProgram) -> list[str]:
    return [entry.target for entry in program.inputs if entry.kind is InputKind.INPUT]


def _user_outputs(program: AnyProgram) -> list[str]:
    return [entry.target for entry in program.outputs if entry.kind is OutputKind.USER]


def _check_constants(program: AnyProgram, constants: Mapping[str, Tensor]) -> None:
    for prefix, part in _with_tail(program):
        for node, entry in part.placeholders(InputKind.CONSTANT):
            expected, found = value(node), constants.get(prefix + entry.target)
            if found is None:
                raise ProgramFileError(f"constant '{entry.target}' is missing in the file of constants")
            if (found.dtype, tuple(found.shape)) != (expected.dtype, expected.shape):
                raise ProgramFileError(
                    f"constant '{entry.target}' in the file of constants is {found.dtype}{list(found.shape)}, "
                    f"the program says {expected.dtype}{list(expected.shape)}"
                )


def _with_tail(program: AnyProgram) -> Iterator[tuple[str, AnyProgram]]:
    yield "", program
    if isinstance(program, PipelinedProgram):
        yield from (("", stage) for stage in program.stages)
        if program.tail is not None:
            yield f"{TAILS[0]}/", program.tail


def _check_names(program: AnyProgram) -> None:
    names = Counter(name for entry in program.inputs for name in (f"{entry.kind.value} {entry.target}", *entry.aliases))
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise ProgramFileError(f"two inputs of the program are called '{twice}'")


def _check_types(program: AnyProgram) -> None:
    """Placeholders and results are one tensor each, of a type that the text says."""
    for name, graph in program.graphs.items():
        typed = [node for node in graph.nodes if node.op == "placeholder"]
        returned = output_node(graph).args[0]
        assert isinstance(returned, (tuple, list))
        strange = next((result for result in returned if not isinstance(result, Node)), None)
        if strange is not None:
            raise ProgramFileError(f"{name or 'the program'} returns {strange!r:.100}, which is no value of its own")
        untyped = next((node for node in typed if len(values(node)) != 1), None)
        if untyped is not None:
            raise ProgramFileError(f"'{untyped.name}' of {name or 'the program'} has no type")


def _check_positions(what: str, table: tuple[tuple[int, object], ...], spec: pytree.TreeSpec | None) -> None:
    leaves = spec.num_leaves if spec is not None else 0
    positions = [position for position, _ in table]
    if len(set(positions)) < len(positions) or not all(0 <= position < leaves for position in positions):
        raise ProgramFileError(f"{what}: positions {positions[:10]} of {leaves} values")


def _check_role(program: Program) -> None:
    """The graphs of a role take and return what the program's tables say."""
    role = program.role
    if role is None:
        return
    outputs, inputs = len(program.outputs), len(program.inputs)
    known = {entry.target for entry in program.inputs}
    strange = next((target for target in role.grads if target not in known), None)
    if strange is not None:
        raise ProgramFileError(f"backward returns the gradient of '{strange}', which the program does not take")
    expected = {
        "forward": (inputs, outputs + role.saved),
        "backward": (role.saved + len(role.differentiable), len(role.grads)),
        "inference": (inputs, outputs),
    }
    for name, graph in role.graphs.items():
        takes = sum(node.op == "placeholder" for node in graph.nodes)
        returned = output_node(graph).args[0]
        assert isinstance(returned, (tuple, list))
        if (takes, len(returned)) != expected[name]:
            raise ProgramFileError(
                f"{name} takes {takes} and returns {len(returned)} values; by the tables of the program it takes "
                f"{expected[name][0]} and returns {expected[name][1]}"
            )


def _check_pipeline(program: PipelinedProgram) -> None:
    schedule, count = program.schedule, len(program.stages)
    buffers = {entry.target for entry in program.outputs if entry.kind is OutputKind.SENT}
    if buffers:
        raise ProgramFileError(f"the whole program sends '{min(buffers)}', which only stages do")
    if schedule is None:
        return
    if schedule.microbatches != program.plan.microbatches:
        raise ProgramFileError(
            f"the schedule is for {schedule.microbatches} microbatches, the plan has {program.plan.microbatches}"
        )
    ranks = program.mesh.size("pp")
    if len(schedule.placement) != count or not all(0 <= rank < ranks for rank in schedule.placement):
        raise ProgramFileError(f"the schedule places {len(schedule.placement)} stages, the program has {count}")
    if len(schedule.ranks) != ranks:
        raise ProgramFileError(f"the schedule is for {len(schedule.ranks)} pipeline ranks, the mesh has {ranks}")
