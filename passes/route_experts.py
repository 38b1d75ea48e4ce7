"""Deal the experts out over ``ep``: each rank has some of them, rows go to the ranks of their experts and come back.

before, on mesh(ep=2):
  w       = param w                              : f32[4,8,6]
  x       = input                                : f32[10@ep,8]
  ids     = input                                : i64[10@ep]
  enter   = comm.enter(w, ep)                    : f32[4,8,6]
  product = autopar.expert_linear(x, enter, ids) : f32[10@ep,6]
  act     = aten.relu(product)                   : f32[10@ep,6]
  return act
after:
  w = param w : f32[4@ep,8,6]
  x = input : f32[10@ep,8]
  ids = input : i64[10@ep]
  route = autopar.route_rows(ids, 4, 2) : (i64[10@ep], i64[10@ep], i64[2@ep,2,3])
  order = route[0] : i64[10@ep]
  inverse = route[1] : i64[10@ep]
  counts = route[2] : i64[2@ep,2,3]
  received = comm.all_to_all(counts, ep, source=0, target=1) : i64[2,2@ep,3]
  sizes = autopar.row_sizes(counts, received) : (i64[(2@ep 2)], i64[(2@ep 2)])
  send = sizes[0] : i64[(2@ep 2)]
  receive = sizes[1] : i64[(2@ep 2)]
  received_ids = autopar.received_ids(received, 5) : i64[10?@ep]
  permute_rows = autopar.permute_rows(x, order, inverse) : f32[10@ep,8]
  dispatch_rows = comm.dispatch_rows(permute_rows, ep, send=send, receive=receive) : f32[10?@ep,8]
  product = autopar.expert_linear(dispatch_rows, w, received_ids) : f32[10?@ep,6]
  return_rows = comm.return_rows(product, ep, send=receive, receive=send) : f32[10@ep,6]
  permute_rows_1 = autopar.permute_rows(return_rows, inverse, order) : f32[10@ep,6]
  act = aten.relu(permute_rows_1) : f32[10@ep,6]
  return act

Until here ``ep`` is a data axis like ``dp``. What this pass makes of a layer of experts:

* the rows are sorted by rank and expert; how many go where is exchanged once (``all_to_all`` of the counts),
* ``dispatch_rows`` sends each row to the rank of its expert; that rank runs its products and what lies between on the
  rows that it has received, as many as there are (``192?@ep``: a number that ranks know at run time only),
* ``return_rows`` sends the results back, and they are put in the order of the tokens again.

Where ``ep`` has one rank ``Plan(record_load=True)`` counts the rows of each expert, and nothing else changes.

Nothing is dropped, unless ``Plan(capacity_factor=...)`` limits the rows of each expert: then buffers of a fixed size
are exchanged (``autopar/routing/buffers.py``). Backward does the same the other way: one exchange of rows for each. The
gradient of an expert is complete on its rank. (Lepikhin et al. 2020, GShard; Fedus et al. 2021, Switch; Gale et al.
2023, MegaBlocks.)
"""

from __future__ import annotations

from torch import fx

from autopar.errors import NoExpertsError, NothingSplitError
from autopar.experts.report import EXPERTS as DECISIONS
from autopar.ir.graph_pass import graph_pass
from autopar.ir.node import origin
from autopar.ir.program import Program
from autopar.ir.tables import Unrouted
from autopar.mesh import EXPERTS
from autopar.notes import warn
from autopar.routing.buffers import Buffers
from autopar.routing.counted import Counting
from autopar.routing.dispatch import Dispatch
from autopar.routing.exchange import check_tokens
from autopar.routing.groups import asked_group, group_of, is_asked_for
from autopar.routing.placement import orders_of
from autopar.routing.placing import CannotPlace, Placing
from autopar.routing.regions import regions_of
from autopar.split.flow import weights_of


@graph_pass(when=lambda program: isinstance(program, Program) and _is_needed(program))
def route_experts(program: Program) -> Program:
    regions, reasons = regions_of(program)
    orders = orders_of(regions, program.plan.expert_placement)
    if not _is_dealt(program):
        for layer, region in zip(orders, regions):
            Counting(program.mesh, EXPERTS, region, layer=layer).write()
        return program
    dealt, weights = [], weights_of(program)
    for region, (layer, order) in zip(regions, orders.items()):
        axis = group_of(program, region)
        placing = Placing(program, axis, order if program.mesh.size(axis) > 1 else ())
        try:
            check_tokens(region, placing.axis)
            placing.add([region], weights)
        except CannotPlace as problem:
            reasons |= dict.fromkeys(region.products, str(problem))
            continue
        dealt.append((layer, region, placing))
    if not dealt:
        raise _nothing_routed(program, reasons)
    if reasons:
        node, reason = next(iter(reasons.items()))
        where = origin(node).module or node.name
        warn(f"the experts of {where} stay whole on {EXPERTS}{_unlimited(program)}: {reason}", stacklevel=2)
    factor = program.plan.capacity_factor
    for layer, region, placing in dealt:
        noted = layer if program.plan.counts_load else ""
        given = program.mesh, placing.axis, region, placing.write(), placing.order, noted
        exchange = Dispatch(*given) if factor is None else Buffers(*given, factor=factor)
        exchange.write()
    return program


def _is_needed(program: Program) -> bool:
    return _is_dealt(program) or program.plan.record_load


def _is_dealt(program: Program) -> bool:
    """Whether rows are sent to their experts, or limited there; else they are counted alone."""
    return is_asked_for(program) or program.plan.capacity_factor is not None


def _unlimited(program: Program) -> str:
    factor = program.plan.capacity_factor
    return "" if factor is None else f", and drop nothing (capacity_factor={factor})"


def _nothing_routed(program: Program, reasons: dict[fx.Node, str]) -> NothingSplitError:
    axes, factor = asked_group(program), program.plan.capacity_factor
    known = program.decisions.get(DECISIONS, {}).values()
    unrouted = [each for each in known if isinstance(each, Unrouted)]
    left = [f"{each.reason}\n  module  {each.module}\n  source  {each.source}" for each in unrouted]
    whole = [*reasons.values(), *left]
    way = f"a mesh without {EXPERTS} (dp splits the batch alike)"
    if EXPERTS not in axes.split("+"):
        way = f'Plan(expert_axes="auto"), without {program.plan.expert_axes!r}'
    kind = NothingSplitError if whole else NoExpertsError
    what = f"{axes}={program.mesh.size(axes)} has no experts to deal out"
    if not is_asked_for(program):
        what, way = f"Plan(capacity_factor={factor}) has no experts to limit", "Plan(capacity_factor=None)"
    return kind(
        f"{what} in this model: {whole[0] if whole else 'no layer of experts was recognised in it'}\nWay out: {way}."
    )
