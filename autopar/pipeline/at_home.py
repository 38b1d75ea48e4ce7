"""Cuts of a program whose parameters are on their stages already, where another program of the model has put them.

An evaluation has other costs than a training step, and so has a step with frozen layers; the best cut of each would
move parameters. Here they stay: a stage begins somewhere after the last call that uses a parameter of an earlier stage,
and not after the first that uses one of its own or of a later one; among these places, where the fewest bytes cross.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from autopar.errors import StageError
from autopar.ir.tables import InputKind
from autopar.pipeline.interval_costs import StageGraph

Homes = Mapping[str, Sequence[int]]  # parameter or buffer, aliases too -> the stages that hold it


def cuts_at_home(graph: StageGraph, homes: Homes, count: int) -> list[int]:
    """The places at which the stages after the first of ``count`` begin.

    Raises StageError where the program uses parameters in another order than its stages are in.
    """
    spans = _spans(graph, homes)
    cuts: list[int] = []
    for stage in range(1, count):
        before = max([place for place, (_, last) in spans.items() if last < stage], default=0)
        until = min([place for place, (first, _) in spans.items() if first >= stage], default=graph.loss)
        low, high = max(before + 1, *cuts[-1:], 1), min(until, graph.loss)
        places = [place for place in range(low, high + 1) if place not in graph.within_experts]
        if not places:
            raise StageError(
                "this call uses parameters in another order than the call that the stages were cut for: stage "
                f"{stage} would begin before stage {stage - 1} ends\n"
                "Way out: Plan(cuts=...) at modules that every kind of call runs in the same order."
            )
        known = [place for place in places if place in set(graph.places_to_cut)] or places
        cuts.append(min(known, key=lambda place: (graph.crossing[place], place)))
    return cuts


def _spans(graph: StageGraph, homes: Homes) -> dict[int, tuple[int, int]]:
    """The place of each call that uses parameters -> the first and the last stage that it can be on."""
    of = {
        node: tuple(homes[name])
        for node, entry in graph.program.placeholders(InputKind.PARAMETER, InputKind.BUFFER)
        for name in (entry.target, *entry.aliases)
        if name in homes
    }
    found: dict[int, tuple[int, int]] = {}
    for place, node in enumerate(graph.nodes):
        stages = [of[source] for source in _sources(node, graph) if source in of]
        if stages:
            found[place] = max(map(min, stages)), min(map(max, stages))
    return found


def _sources(node: fx.Node, graph: StageGraph) -> set[fx.Node]:
    """The placeholders that ``node`` takes, by itself or through values that each stage computes for itself."""
    found: set[fx.Node] = set()
    ahead = list(node.all_input_nodes)
    while ahead:
        source = ahead.pop()
        if source.op == "placeholder":
            found.add(source)
        elif source in graph.duplicated:
            ahead += source.all_input_nodes
    return found
