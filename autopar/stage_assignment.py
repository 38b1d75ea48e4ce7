"""Which pipeline stage runs which call: intervals of the trace, cut where the slowest stage is fastest.

    add_7  blocks.1      ]  stage 0        cut where only the residual stream crosses, if that balances as well
    norm   blocks.2.norm ]  stage 1

What is least is the time of the slowest stage for one microbatch, of its calls or of its messages, whichever takes
longer: messages run beside computing. Among all cuts within ``SLACK`` of that optimum those are taken over which the
fewest bytes go. Both are found exactly, by dynamic programming over the places where cutting is cheap; if these leave
the slowest stage more than ``BALANCE`` above what all places allow, over more places. (Balanced partitions of chains:
Narayanan et al. 2019, PipeDream, section 3.1, without replicated stages.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
from torch import fx

from autopar.errors import StageError
from autopar.intervals import Table, best_bounds, least_worst
from autopar.operator_cost import ACCELERATOR, Machine
from autopar.program import Program, origin
from autopar.stage_graph import StageGraph, Tables

SLACK = 1.01  # as good as the optimum: then fewer bytes decide
BALANCE = 1.03  # from here on a better balance is worth a dearer cut
CHEAP = (2.0, 8.0)  # times the fewest bytes around
AROUND = 8  # of an even share of the program: how far "around" reaches, to either side


@dataclass(frozen=True)
class Assignment:
    """``stage_of``: every call that is not ``remade`` -> its stage, which never decreases along an edge of the graph.
    ``remade``: calls that each stage makes for itself that needs their value, directly or for another of them; all
    their inputs are placeholders or remade. One that the program returns is for the last stage to return."""

    stage_of: Mapping[fx.Node, int]
    remade: frozenset[fx.Node]


def assign_stages(
    program: Program, count: int, in_flight: Sequence[int] | None = None, *, machine: Machine = ACCELERATOR
) -> Assignment:
    """The ``count`` stages of a split forward program of one microbatch.

    ``in_flight``: for each stage the most microbatches whose activations it holds at once, by which
    ``Plan.stage_memory_gb`` is kept; None: one. Raises StageError for more stages than there is work for, for stages
    that do not fit into memory, and for ``Plan.cuts`` that name no module, are too many or few, or out of order.
    """
    graph = StageGraph(program, machine=machine)
    flights = tuple(in_flight or (1,) * count)
    if count < 1 or len(flights) != count:
        raise ValueError(f"{count} stages, and microbatches in flight for {len(flights)}: one number for each stage")
    search = Search(graph, flights)
    cuts = _given_cuts(graph, count) if program.plan.cuts else search.best_cuts()
    stage_of: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        stage_of[node] = sum(cut <= position for cut in cuts) if count > 1 else 0
    return Assignment(stage_of, graph.remade)


@dataclass(frozen=True)
class Search:
    """The cuts of one program into ``len(flights)`` stages."""

    graph: StageGraph
    flights: tuple[int, ...]

    def best_cuts(self) -> list[int]:
        """The places at which stages begin, without the first. Raises StageError."""
        every = self.graph.places_to_cut
        widest = self._tables(every)
        costs = self._costs(every, widest)
        optimum = least_worst(costs)
        if np.isinf(optimum):
            raise self._impossible(every, widest)
        for times in CHEAP:
            some = self.cheap_places(times)
            tables = self._tables(some)
            found = self._costs(some, tables)
            worst = least_worst(found)
            if worst <= BALANCE * optimum:
                return self._cuts(some, found, tables, worst)
        return self._cuts(every, costs, widest, optimum)

    def cheap_places(self, times: float) -> list[int]:
        """Places over which at most ``times`` the fewest bytes go that go over a place around."""
        every = self.graph.places_to_cut
        reach = len(self.graph) // (AROUND * len(self.flights)) + 1
        bytes_at = np.array([self.graph.crossing[place] for place in every])
        places = np.array(every)
        low, high = np.searchsorted(places, places - reach), np.searchsorted(places, places + reach, side="right")
        return [p for p, a, b, size in zip(every, low, high, bytes_at) if size <= times * bytes_at[a:b].min()]

    def _cuts(self, places: Sequence[int], costs: Sequence[Table], tables: Tables, worst: float) -> list[int]:
        found = best_bounds(costs, SLACK * worst, tables.received)
        return [places[position - 1] for position in found[1:-1]]

    def _tables(self, places: Sequence[int]) -> Tables:
        return self.graph.tables([0, *places, len(self.graph)])

    def _costs(self, places: Sequence[int], tables: Tables, limited: bool = True) -> list[Table]:
        """For each stage its time, inf where it may not be: without work, too large, or without the loss."""
        limit = self.graph.program.plan.stage_memory_gb
        found, memo = [], dict[int, Table]()
        for flight in self.flights:
            if flight not in memo:
                table = np.where(tables.work >= 1, tables.seconds, np.inf)
                if limit is not None and limited:
                    table = np.where(tables.state + flight * tables.saved <= limit * 1e9, table, np.inf)
                memo[flight] = table
            found.append(memo[flight])
        begins = np.array([0, *places, len(self.graph)])
        found[-1] = np.where((begins <= self.graph.loss)[:, None], found[-1], np.inf)
        return found

    def _impossible(self, every: Sequence[int], tables: Tables) -> StageError:
        """Why there is no cut: too little work, or too little memory."""
        count, free = len(self.flights), self._costs(every, tables, limited=False)
        worst = least_worst(free)
        if np.isinf(worst):
            works = int(tables.work[0, -1])
            return StageError(
                f"{count} pipeline stages for a program of {works} calls that compute something: each stage needs one\n"
                f"Way out: fewer stages (Mesh(pp=...) times the virtual stages of the schedule), at most {works}."
            )
        limit = self.graph.program.plan.stage_memory_gb
        memory = [tables.state + flight * tables.saved for flight in self.flights]
        least = least_worst([np.where(np.isinf(time), np.inf, size) for time, size in zip(free, memory)])
        bounds = best_bounds(free, SLACK * worst, tables.received)
        lines = [
            f"  stage {stage}: {tables.state[a, b] / 1e9:.3g} GB of parameters and states, {flight} x "
            f"{tables.saved[a, b] / 1e9:.3g} GB of activations, {memory[stage][a, b] / 1e9:.3g} GB"
            for stage, (a, b, flight) in enumerate(zip(bounds, bounds[1:], self.flights))
        ]
        lines = sorted(lines[:], key=lambda line: -float(line.split()[-2]))[:8]
        return StageError(
            f"no cut into {count} stages keeps within Plan(stage_memory_gb={limit:g}); the best balanced one has\n"
            + "\n".join(lines)
            + f"\nWhere the largest stage is smallest it takes {least / 1e9:.4g} GB."
            + "\nWay out: more stages, smaller microbatches, Plan(zero=..., recompute=...), tp, or more memory."
        )


def _given_cuts(graph: StageGraph, count: int) -> list[int]:
    """The places of ``Plan.cuts``. Raises StageError."""
    names = graph.program.plan.cuts
    if len(names) != count - 1:
        raise StageError(
            f"Plan(cuts=...) names {len(names)} modules; {count} stages need {count - 1}: the first begins where the "
            f"model does\nWay out: name {count - 1}, or leave cuts out."
        )
    modules = [origin(node).module for node in graph.nodes]
    cuts: list[int] = []
    for name in names:
        found = [place for place, module in enumerate(modules) if f"{module}.".startswith(f"{name}.")]
        if not found:
            raise StageError(_unknown_module(name, modules))
        cuts.append(found[0])
    for (before, a), (after, b) in zip(zip(("", *names), (0, *cuts)), zip(names, cuts)):
        if b <= a:
            reason = f"begins before '{before}' does" if before else "stands where the model begins"
            raise StageError(
                f"Plan(cuts={names!r}): '{after}' {reason}, so that a stage would be empty\n"
                "Way out: name modules in the order in which they run, the first of them not the model's first."
            )
    if cuts and cuts[-1] > graph.loss:
        raise StageError(f"Plan(cuts={names!r}): the loss is made before '{names[-1]}'; the last stage has to make it")
    return cuts


def _unknown_module(name: str, modules: Sequence[str]) -> str:
    parts = [module.split(".") for module in modules if module]
    known = list(dict.fromkeys(".".join(part[: end + 1]) for part in parts for end in range(len(part))))
    close = get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(known[:8])}, ..."
    return f"Plan(cuts=...): no call of the program comes from a module '{name}'; {hint}"
