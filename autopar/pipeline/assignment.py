"""The assignment of calls to pipeline stages: intervals of the trace, cut where the slowest stage is fastest.

    add_7  blocks.1      ]  stage 0        cut where only the residual stream crosses, if that balances as well
    norm   blocks.2.norm ]  stage 1

The time of the slowest stage for one microbatch is minimised: that of its calls or of its messages, whichever is
longer, since messages run beside computing. Among all cuts within ``SLACK`` of that optimum, the one over which the
fewest bytes go is taken. Both are found exactly, by dynamic programming over the places where cutting is cheap; if
these leave the slowest stage more than ``BALANCE`` above the optimum of all places, over more places. Each rank gets a
parameter where that is possible. (Balanced partitions of chains: Narayanan et al. 2019, PipeDream, section 3.1, without
replicated stages.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from operator import getitem

import numpy as np
from torch import fx

from autopar.cost.machine import ACCELERATOR, Machine
from autopar.errors import StageError
from autopar.ir.node import origin
from autopar.ir.program import Program
from autopar.mesh import PIPELINE
from autopar.pipeline.at_home import cuts_at_home
from autopar.pipeline.interval_costs import StageGraph, Tables
from autopar.pipeline.intervals import Table, best_bounds, least_worst
from autopar.pipeline.stages import Assignment

SLACK = 1.01  # times the optimum: within it, fewer bytes decide
BALANCE = 1.03  # above it, a better balance is worth a dearer cut
CHEAP = (2.0, 8.0)  # times the fewest bytes around
SHOWN = 8  # stages in an error
AROUND = 4  # "around" reaches, to either side, an even share of the program divided by this


def assign_stages(
    program: Program, count: int, in_flight: Sequence[int] | None = None, *, machine: Machine = ACCELERATOR
) -> Assignment:
    """The ``count`` stages of a split forward program of one microbatch.

    ``in_flight``: for each stage, the most microbatches whose activations it holds at once, for
    ``Plan.stage_memory_gb``; None: one. Raises StageError for more stages than there is work for, for stages
    that do not fit into memory, and for ``Plan.cuts`` that name no module, are too many or few, or out of order.
    """
    graph = StageGraph(program, machine=machine)
    flights = tuple(in_flight or (1,) * count)
    if count < 1 or len(flights) != count:
        raise ValueError(f"{count} stages, and microbatches in flight for {len(flights)}: one number for each stage")
    search = Search(graph, flights)
    if program.pins.homes and count > 1:
        cuts = cuts_at_home(graph, program.pins.homes, count)
    else:
        cuts = search.given_cuts(program.plan.cuts) if program.plan.cuts else search.best_cuts()
    stage_of: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        stage_of[node] = sum(cut <= position for cut in cuts) if count > 1 else 0
    return Assignment(stage_of, graph.duplicated)


@dataclass(frozen=True)
class Search:
    """The cuts of one program into ``len(flights)`` stages."""

    graph: StageGraph
    flights: tuple[int, ...]

    def best_cuts(self) -> list[int]:
        """The places at which stages begin, without the first. Raises StageError."""
        if len(self.flights) == 1 and self._limit is None:
            return []
        every = self.graph.places_to_cut
        widest = self._tables(every)
        owning = len(self.flights) == self.graph.program.mesh.size(PIPELINE)  # else a rank has several stages
        costs = self._costs(every, widest, owning)
        if owning and np.isinf(least_worst(costs)):
            owning, costs = False, self._costs(every, widest)
        optimum = least_worst(costs)
        if np.isinf(optimum):
            raise self._impossible(every, widest)
        for times in CHEAP:
            some = self.cheap_places(times)
            tables = self._tables(some)
            found = self._costs(some, tables, owning)
            worst = least_worst(found)
            if worst <= BALANCE * optimum:
                return self._cuts(some, found, tables, worst)
        return self._cuts(every, costs, widest, optimum)

    def cheap_places(self, times: float) -> list[int]:
        """Places over which at most ``times`` as many bytes go as over the cheapest place around."""
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

    def _costs(self, places: Sequence[int], tables: Tables, owning: bool = False, limited: bool = True) -> list[Table]:
        """For each stage its time; inf where it is not allowed: without work, too large, or without the loss.

        With ``owning`` also without a parameter.
        """
        limit = self._limit if limited else None
        plain = np.where(tables.works & tables.owns if owning else tables.works, tables.seconds, np.inf)
        memo = {} if limit is not None else dict.fromkeys(self.flights, plain)
        for flight in self.flights:
            if flight not in memo and limit is not None:
                memo[flight] = np.where(tables.state + flight * tables.saved <= limit * 1e9, plain, np.inf)
        found = [memo[flight] for flight in self.flights]
        begins = np.array([0, *places, len(self.graph)])
        found[-1] = np.where((begins <= self.graph.loss)[:, None], found[-1], np.inf)
        return found

    @property
    def _limit(self) -> float | None:
        return self.graph.program.plan.stage_memory_gb

    def _impossible(self, every: Sequence[int], tables: Tables) -> StageError:
        """The reason why there is no cut: too little work, or too little memory."""
        free = self._costs(every, tables, limited=False)
        worst = least_worst(free)
        if np.isinf(worst):
            works = self.graph.most_stages
            return StageError(
                f"{len(self.flights)} pipeline stages for a program of {works} calls that compute something: each "
                "stage needs one\nWay out: fewer stages (Mesh(pp=...) times the virtual stages of the schedule), at "
                f"most {works}."
            )
        memory = [np.where(np.isinf(time), np.inf, size) for time, size in zip(free, self._memory(tables))]
        bounds = best_bounds(free, SLACK * worst, tables.received)
        return self._too_large(bounds, tables, least_worst(memory))

    def _memory(self, tables: Tables) -> list[Table]:
        return [tables.state + flight * tables.saved for flight in self.flights]

    def _too_large(self, bounds: Sequence[int], tables: Tables, least: float | None = None) -> StageError:
        """The figures of the largest of the stages between ``bounds``."""
        sizes = [float(table[a, b]) for table, a, b in zip(self._memory(tables), bounds, bounds[1:])]
        largest = sorted(sorted(range(len(sizes)), key=lambda stage: -sizes[stage])[:SHOWN])
        lines = [
            f"  stage {stage}: {tables.state[bounds[stage], bounds[stage + 1]] / 1e9:.4g} GB of parameters, gradients, "
            f"AdamW states + {self.flights[stage]} x {tables.saved[bounds[stage], bounds[stage + 1]] / 1e9:.4g} GB of "
            f"activations = {sizes[stage] / 1e9:.4g} GB"
            for stage in largest
        ]
        lines = [*lines, f"  and {len(sizes) - SHOWN} smaller ones"] if len(sizes) > SHOWN else lines
        what = f"into Plan(stage_memory_gb={self._limit:g})"
        head = f"the stages of Plan(cuts=...) do not fit {what}:"
        if least is not None:
            head = f"no cut into {len(sizes)} stages fits {what}, at least {least / 1e9:.4g} is needed; by time alone:"
        return StageError(
            "\n".join((head, *lines))
            + "\nWay out: more stages, smaller microbatches, Plan(zero=..., recompute=...), tp, or more memory."
        )

    def given_cuts(self, names: Sequence[str]) -> list[int]:
        """The places at which the modules ``names`` begin. Raises StageError."""
        graph, count = self.graph, len(self.flights)
        if len(names) != count - 1:
            raise StageError(
                f"Plan(cuts=...) names {len(names)} modules; {count} stages need {count - 1}: the first begins where "
                f"the model does\nWay out: name {count - 1}, or leave cuts out."
            )
        starts = [(place, origin(node).module) for place, node in enumerate(graph.nodes) if node.target is not getitem]
        cuts: list[int] = []
        for name in names:
            found = [place for place, module in starts if f"{module}.".startswith(f"{name}.")]
            if not found:
                raise StageError(_unknown_module(name, [module for _, module in starts]))
            cuts.append(found[0])
        for before, name, a, b in zip(("", *names), names, (0, *cuts), cuts):
            if b <= a:
                reason = f"does not begin after '{before}'" if before else "stands where the model begins"
                raise StageError(
                    f"Plan(cuts={tuple(names)!r}): '{name}' {reason}, so that a stage would be empty\n"
                    "Way out: name modules in the order in which they run, the first of them not the model's first."
                )
        for name, cut in zip(names, cuts):
            if cut in graph.within_experts:
                raise StageError(
                    f"Plan(cuts={tuple(names)!r}): '{name}' begins while rows are with their experts, of which each "
                    "rank has as many as arrive: a message between stages has a fixed size\n"
                    "Way out: name the module that holds the experts, or one behind it."
                )
        if cuts[-1] > graph.loss:
            raise StageError(f"Plan(cuts={tuple(names)!r}): the loss, which the last stage makes, stands before it")
        tables, bounds = self._tables(cuts), range(count + 1)
        sizes = [table[n, n + 1] for n, table in enumerate(self._memory(tables))]
        if self._limit is not None and max(sizes) > self._limit * 1e9:
            raise self._too_large(bounds, tables)
        return cuts


def _unknown_module(name: str, modules: Sequence[str]) -> str:
    parts = [module.split(".") for module in modules if module]
    known = list(dict.fromkeys(".".join(part[: end + 1]) for part in parts for end in range(len(part))))
    close = get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(known[:8])}, ..."
    return f"Plan(cuts=...): no call of the program comes from a module '{name}'\nWay out: {hint}."
