"""The levels of the compiler: the contracts of a program before the split, after it, with gradients, with a schedule.

The runner checks the contracts of a phase's level after each of its passes (``passes/__init__.py``). Contracts that a
pass gives up on purpose are not in its level: a later level has most contracts of an earlier one, but not all.
"""

from __future__ import annotations

from autopar.ir import invariants as graphs
from autopar.ir import role_invariants as roles
from autopar.ir.graph_pass import Level
from autopar.pipeline import stage_invariants as stages

_TABLES = (
    graphs.placeholders_match_inputs,
    graphs.constants_are_there,
    graphs.results_match_outputs,
)
_GRAPH = (graphs.is_flat, graphs.is_functional, *_TABLES, graphs.every_value_has_a_layout)
_STAGES = (
    stages.stages_are_of_the_mesh,
    stages.what_is_sent_is_received,
    stages.stages_hold_the_parameters,
    stages.stages_return_the_outputs,
)

TRACED = Level("traced", (*_GRAPH, graphs.nothing_is_placed))
SPLIT = Level(
    "split",
    (
        *_GRAPH,
        graphs.layouts_fit_the_mesh,
        graphs.loss_is_invariant,  # says more of the loss than the next one
        graphs.no_partial_value_escapes,
        graphs.no_dead_collectives,
        graphs.collectives_fit_the_mesh,
        graphs.collectives_match_layouts,
        graphs.ragged_sizes_are_free,
        roles.is_not_differentiated,
    ),
    _STAGES,
)
DIFFERENTIATED = Level(
    "differentiated",
    (
        *_TABLES,
        roles.is_differentiated,
        roles.roles_are_complete,
        roles.roles_take_the_inputs,
        roles.roles_return_the_outputs,
        roles.backward_takes_what_forward_saves,
        roles.gradients_match_parameters,
        roles.role_graphs_are_sound,
        roles.collectives_resize_as_they_say,
        graphs.ragged_sizes_are_free,
    ),
    (*_STAGES, stages.gradients_are_sent_back),
)
SCHEDULED = Level("scheduled", DIFFERENTIATED.contracts, (*DIFFERENTIATED.of_stages, stages.schedule_fits_the_stages))

LEVELS = (TRACED, SPLIT, DIFFERENTIATED, SCHEDULED)
