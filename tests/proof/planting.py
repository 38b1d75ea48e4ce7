"""How mutations are written: what finds, drops, repeats and replaces nodes of the graphs, and lines of the code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.node import output_node, set_values, value, values
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.tables import Role
from autopar.proof.rank_texts import text_of
from autopar.schedules.instructions import Instruction, Schedule

Codes = dict[int, str]  # rank -> the text of its code
Planted = AnyProgram | Codes | None  # None: the program that was given was changed itself


@dataclass(frozen=True)
class Mutation:
    """A bug that a compiler may have.

    ``kind``: its class. ``case``: the program, a name in ``mutated_programs.CASES``. ``plant`` is given a copy of it.
    """

    kind: str
    case: str
    plant: Callable[[Any], Planted]

    @property
    def name(self) -> str:
        return self.plant.__name__


MUTATIONS: list[Mutation] = []


def bug(kind: str, case: str) -> Callable[[Callable[[Any], Planted]], Callable[[Any], Planted]]:
    def register(plant: Callable[[Any], Planted]) -> Callable[[Any], Planted]:
        MUTATIONS.append(Mutation(kind, case, plant))
        return plant

    return register


# ---------------------------------------------------------------- graphs


def graph_of(program: AnyProgram, where: str) -> fx.Graph:
    """``forward``, ``backward``; of a stage ``1.forward``."""
    stage, _, name = where.rpartition(".")
    graph = getattr(program.parts[int(stage or 0)].required_role, name)
    assert isinstance(graph, fx.Graph)
    return graph


def found(program: AnyProgram, where: str, target: Any, axis: str = "") -> list[fx.Node]:
    """The nodes that call ``target``, an operator or the name of a collective; of a collective those over ``axis``."""
    operator = getattr(comm.OPS, target).default if isinstance(target, str) else target
    nodes = [node for node in graph_of(program, where).nodes if node.target == operator]
    return [node for node in nodes if not axis or node.args[1] == axis]


def placeholder(program: AnyProgram, where: str, name: str) -> fx.Node:
    return next(node for node in graph_of(program, where).nodes if node.op == "placeholder" and node.name == name)


def results(graph: fx.Graph) -> list[fx.Node]:
    return list(output_node(graph).args[0])  # type: ignore[arg-type]


def set_result(graph: fx.Graph, place: int, node: fx.Node) -> None:
    every = results(graph)
    every[place] = node
    output_node(graph).args = (tuple(every),)


def gradient(program: AnyProgram, target: str, stage: int = 0) -> tuple[fx.Graph, int, fx.Node]:
    """The graph that returns the gradient of a parameter, the place among its results, and the node."""
    role = program.parts[stage].required_role
    assert role.backward is not None
    place = role.grads.index(target)
    return role.backward, place, results(role.backward)[place]


def reduction(program: AnyProgram, target: str) -> fx.Node:
    """The collective that the gradient of a parameter comes from."""
    node = gradient(program, target)[2]
    while comm.moving(node.target) is None:
        node = node.all_input_nodes[0]
    return node


def drop(node: fx.Node, place: int = 0) -> None:
    """Its operand at ``place`` stands for the result."""
    node.replace_all_uses_with(node.args[place])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def after(node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """What reads ``node`` reads ``target(node, *args)`` of the same type instead."""
    with node.graph.inserting_after(node):
        made = node.graph.call_function(target, (node, *args), kwargs)
    set_values(made, *values(node))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made


def again(node: fx.Node) -> None:
    """The same operation once more on its result."""
    after(node, node.target, *node.args[1:])


def argument(node: fx.Node, place: int, given: Any) -> None:
    assert node.args[place] != given
    node.update_arg(place, given)


def turned_into(node: fx.Node, name: str) -> None:
    """Another collective with the same arguments."""
    node.target = getattr(comm.OPS, name).default


def with_kinds(node: fx.Node, **more: Any) -> None:
    set_values(node, *(replace(kind, **more) for kind in values(node)))


def like(node: fx.Node, graph: fx.Graph) -> Iterator[fx.Node]:
    """Other nodes of ``graph`` before ``node`` that have its type."""
    for other in graph.nodes:
        if other is node:
            return
        if len(values(other)) == 1 and value(other) == value(node) and other.op == "call_function":
            yield other


# ---------------------------------------------------------------- roles, stages, schedules


def with_role(program: Program, **changes: Any) -> Program:
    role: Role = replace(program.required_role, **changes)
    return replace(program, role=role)


def with_list(program: PipelinedProgram, rank: int, change: Callable[[list[Instruction]], list[Instruction]]) -> Any:
    """The program whose pipeline rank ``rank`` has another list of instructions."""
    schedule: Schedule = program.required_schedule
    ranks = list(schedule.ranks)
    ranks[rank] = tuple(change(list(ranks[rank])))
    assert ranks[rank] != schedule.ranks[rank]
    return replace(program, schedule=replace(schedule, ranks=tuple(ranks)))


# ---------------------------------------------------------------- text


def texts(program: AnyProgram, ranks: list[int] | None = None) -> Codes:
    return {rank: text_of(program, rank) for rank in ranks or range(program.mesh.world_size)}


def lines_of(code: str, function: str) -> tuple[list[str], int, int]:
    """All lines, and where a function starts and ends."""
    lines = code.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"def {function}("))
    end = next((n for n in range(start + 1, len(lines)) if lines[n].startswith("def ")), len(lines))
    return lines, start, end


def line_with(lines: list[str], start: int, end: int, *words: str, place: int = 0) -> int:
    """The number of a line that has all of ``words``."""
    return [n for n in range(start, end) if all(word in lines[n] for word in words)][place]


def edited(codes: Codes, function: str, change: Callable[[list[str], int, int], None]) -> Codes:
    """``codes`` in which ``change`` has edited the lines of ``function`` in place."""
    made = {}
    for rank, code in codes.items():
        lines, start, end = lines_of(code, function)
        change(lines, start, end)
        made[rank] = "\n".join(lines) + "\n"
        assert made[rank] != code
    return made
