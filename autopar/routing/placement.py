"""The order in which ranks get the experts of a layer: as the plan says, or balanced by recorded loads."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from autopar.errors import IndivisibleError, check_kind
from autopar.ir.load import ExpertLoad
from autopar.ir.node import origin
from autopar.operators.routing import own_experts
from autopar.routing.regions import Region

Order = tuple[int, ...]


def orders_of(regions: Iterable[Region], placement: Mapping[str, Order]) -> dict[str, Order]:
    """Layer (the module of a region, numbered where it has several) -> the order of its experts, () for 0, 1, 2, ...

    Raises IndivisibleError for an order of another number of experts, or for none of the layers.
    """
    found: dict[str, Order] = {}
    names, used = Counter[str](), set[str]()
    for region in regions:
        module = origin(region.products[0]).module or "experts"
        names[module] += 1
        layer = module if names[module] == 1 else f"{module}:{names[module]}"
        pattern = next((name for name in placement if fnmatch.fnmatchcase(layer, name)), None)
        order = placement[pattern] if pattern is not None else ()
        if order and len(order) != region.experts:
            raise IndivisibleError(
                f"Plan(expert_placement=...) has {len(order)} experts for '{layer}', which has {region.experts}"
            )
        found[layer] = order
        used.update([pattern] if pattern is not None else ())
    unused = [name for name in placement if name not in used]
    if unused:
        raise IndivisibleError(
            f"Plan(expert_placement={{{unused[0]!r}: ...}}): no layer of experts has that name\n"
            f"Way out: one of {', '.join(list(found)[:8]) or 'none: no layer was recognised'}."
        )
    return found


def balanced_placement(loads: Mapping[str, ExpertLoad]) -> dict[str, Order]:
    """For ``Plan(expert_placement=...)``, from recorded loads: each rank gets about as many rows.

    The fullest experts go first, each to the emptiest rank that has room (Graham 1969); then experts of the fullest
    rank change places with lighter ones as long as that helps.
    """
    check_kind("loads", loads, Mapping, "parallel.expert_load(), of a plan with record_load=True")
    return {layer: _balanced(load.experts, load.ways) for layer, load in loads.items()}


def imbalance(load: ExpertLoad, order: Order) -> float:
    """Rows of the fullest rank over those of the mean rank, of all groups together, with experts in ``order``."""
    own = own_experts(len(order), load.ways)
    ranks = [_total(load.experts, order[rank * own : (rank + 1) * own]) for rank in range(load.ways)]
    return max(ranks) * len(ranks) / sum(ranks) if sum(ranks) else 1.0


def _balanced(rows: Sequence[int], ways: int) -> Order:
    own = own_experts(len(rows), ways)
    room = [len(range(len(rows))[rank * own : (rank + 1) * own]) for rank in range(ways)]
    ranks: list[list[int]] = [[] for _ in range(ways)]
    for expert in sorted(range(len(rows)), key=lambda e: (-rows[e], e)):
        free = (rank for rank in range(ways) if len(ranks[rank]) < room[rank])
        ranks[min(free, key=lambda r: (_total(rows, ranks[r]), r))].append(expert)
    while _exchange(rows, ranks):
        pass
    return tuple(expert for rank in ranks for expert in sorted(rank))


def _total(rows: Sequence[int], experts: Iterable[int]) -> int:
    return sum(rows[expert] for expert in experts)


def _exchange(rows: Sequence[int], ranks: list[list[int]]) -> bool:
    """Let the fullest rank change one expert for a lighter one of another, if both then have less than it had."""
    full = max(range(len(ranks)), key=lambda rank: _total(rows, ranks[rank]))
    most = _total(rows, ranks[full])
    best = (most, 0, 0, 0)
    for other in range(len(ranks)):
        there = _total(rows, ranks[other])
        for mine in ranks[full]:
            for theirs in ranks[other]:
                moved = rows[mine] - rows[theirs]
                best = min(best, (max(most - moved, there + moved), other, mine, theirs)) if other != full else best
    worst, other, mine, theirs = best
    if worst >= most:
        return False
    ranks[full][ranks[full].index(mine)], ranks[other][ranks[other].index(theirs)] = theirs, mine
    return True
