"""Decomposes a graph in which operators stand for blocks, without the parameters that these operators alone take.

    p0, p1, p2 = parameters                       p0 = parameter
    h1 = block.0(h0, p0)                   -->    h1 = block.0(h0, p0)          (decomposed; then as it was)
    h2 = block_again(h1, p1); ...                 h2 = block_again(h1); ...

Torch traces a graph again to decompose it, and looks several times at each parameter: of a deep model most of them
belong to blocks that are written out afterwards (:mod:`autopar.frontend.block_copies`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from autopar.frontend.equal_blocks import AGAIN, BlocksDiffer
from autopar.ir.node import copy_meta

Decompose = Callable[[ExportedProgram], ExportedProgram]


@dataclass
class _Left:
    """What was taken out. ``order``: the names of all placeholders; ``taken``: by the number of the call, the names of
    what it takes."""

    order: list[str] = field(default_factory=list)
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    specs: dict[str, InputSpec] = field(default_factory=dict)
    taken: dict[Any, list[str]] = field(default_factory=dict)


def decomposed_without_copies(
    exported: ExportedProgram, decompose: Decompose, traced: Collection[int] = ()
) -> ExportedProgram:
    """``decompose(exported)``, at the cost of the parameters of the blocks that are traced; ``exported`` is used up.

    ``traced``: the numbers of those for which operators stand, too: torch orders buffers by the modules it meets first.
    Raises BlocksDiffer where the parameters cannot be put back in their places.
    """
    left = _take_out(exported, traced)
    decomposed = decompose(exported)
    if left.nodes:
        _put_back(decomposed, left)
    return decomposed


def _take_out(exported: ExportedProgram, traced: Collection[int]) -> _Left:
    left, graph, signature = _Left(), exported.graph, exported.graph_signature
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    left.order = [node.name for node in placeholders]
    for node, spec in zip(placeholders, signature.input_specs):
        only_again = all(user.target is AGAIN and user.args[1] not in traced for user in node.users)
        if spec.kind is InputKind.PARAMETER and node.users and only_again:
            left.nodes[node.name], left.specs[node.name] = node, spec
    for node in graph.find_nodes(op="call_function", target=AGAIN) if left.nodes else ():
        taken: Any = node.args[0]
        left.taken[node.args[1]] = [source.name for source in taken]
        node.update_arg(0, [source for source in taken if source.name not in left.nodes])
    signature.input_specs[:] = [s for n, s in zip(left.order, signature.input_specs) if n not in left.nodes]
    for node in left.nodes.values():
        graph.erase_node(node)
    return left


def _put_back(exported: ExportedProgram, left: _Left) -> None:
    graph, signature = exported.graph, exported.graph_signature
    known = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    of_placeholder = dict(zip(known, signature.input_specs, strict=True))
    again = left.nodes.keys() & {node.name for node in graph.nodes}
    if again:
        raise BlocksDiffer(f"there is another {min(again)} once the graph is decomposed")
    behind = _behind(left, known)
    specs: list[InputSpec] = []
    place = next(iter(graph.nodes))
    for name in (None, *of_placeholder):
        if name is not None:
            specs.append(of_placeholder[name])
            place = known[name].next
        for other in behind.get(name, ()):
            with graph.inserting_before(place):
                known[other] = graph.placeholder(other)
            known[other].name = other  # whatever was called so in between
            copy_meta(known[other], left.nodes[other])
            specs.append(left.specs[other])
    signature.input_specs[:] = specs
    for node in graph.find_nodes(op="call_function", target=AGAIN):
        taken: Any = node.args[0]
        wanted = left.taken[node.args[1]]
        if len(taken) != sum(name not in left.nodes for name in wanted):
            raise BlocksDiffer(f"{node.name} takes something else once the graph is decomposed")
        rest = iter(taken)
        node.update_arg(0, [known[name] if name in left.nodes else next(rest) for name in wanted])


def _behind(left: _Left, stayed: Mapping[str, fx.Node]) -> dict[str | None, list[str]]:
    """For each placeholder that stayed, those that stood behind it; None: before all of them."""
    found: dict[str | None, list[str]] = {}
    last: str | None = None
    for name in left.order:
        if name in left.nodes:
            found.setdefault(last, []).append(name)
        elif name not in stayed:
            raise BlocksDiffer(f"{name} has another name once the graph is decomposed")
        else:
            last = name
    return found
