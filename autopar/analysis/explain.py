"""Why a value is laid out as it is: the choice on each axis, the cost of the alternatives, the collectives nearby."""

from __future__ import annotations

import difflib

from torch import fx

from autopar.ir.collectives import TARGETS, moving
from autopar.ir.node import origin, value, values
from autopar.ir.program import AnyProgram
from autopar.ir.stacked_parameters import names_of_stacks
from autopar.ir.tables import Decision


def explain(program: AnyProgram, name: str) -> str:
    """A few lines on the node or parameter ``name``. Raises ValueError for a name that the program does not have."""
    node = _find(program, name)
    where = origin(node)
    types = ", ".join(f"{t.layout} of {str(t.dtype).removeprefix('torch.')}" for t in values(node))
    lines = [f"{node.name}: {types or 'no tensor'}"]
    lines += [f"  module  {where.module}"] if where.module else []
    lines += [f"  source  {where.source}"] if where.source else []
    for axis, decisions in program.decisions.items():
        if node.name in decisions or axis in program.mesh.names:
            lines += _choice(axis, decisions.get(node.name))
    lines += [f"  needs   {_collective(source)}" for source in node.all_input_nodes if moving(source.target)]
    lines += [f"  then    {_collective(user)}" for user in node.users if moving(user.target)]
    return "\n".join(lines)


def _find(program: AnyProgram, name: str) -> fx.Node:
    by_target = {alias: e.node for e in program.inputs for alias in (e.target, *e.aliases)}
    targets = [target for target in (name, *names_of_stacks(name)) if target in by_target]
    wanted = by_target[targets[0]] if targets else name
    for node in program.graph.nodes:
        if node.name == wanted:
            found: fx.Node = node
            return found
    near = difflib.get_close_matches(name, [*by_target, *(node.name for node in program.graph.nodes)], 3, 0.5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise ValueError(f"the program has no node or parameter '{name}'{hint}")


def _choice(axis: str, decision: Decision | None) -> list[str]:
    if decision is None:
        return [f"  {axis:<7} only one way to run it"]
    lines = [f"  {axis:<7} chosen: {decision.chosen}"]
    costs = sorted(decision.alternatives.items(), key=lambda item: (isinstance(item[1], str), str(item[1])))
    for label, extra in costs:
        lines.append(f"          not {label}: {extra if isinstance(extra, str) else f'{extra * 1e6:+.3g} us a step'}")
    return lines


def _collective(node: fx.Node) -> str:
    return f"{node.name} = {TARGETS[node.target]} over {node.args[1]} of {value(node).layout}"
