"""The compiler: one list of phases, each an ordered list of passes. ``autopar show --passes`` prints it.
After each pass the contracts of its phase's level are checked (``levels.py``).

Each file of this folder holds one pass; no pass imports another. The input is a traced program; the output is the
forward and backward graphs that a rank runs. On a mesh with ``pp`` the passes up to the cut see the whole model,
``differentiate`` goes through the stages from the last to the first (a later stage determines which values of an
earlier one get gradients), and the optimising passes see each stage by itself.
"""

from __future__ import annotations

from autopar.autodiff import differentiate as autodiff
from autopar.ir.graph_pass import Pass, Phase, graph_pass
from autopar.ir.program import AnyProgram
from autopar.ir.role_invariants import is_not_differentiated
from autopar.levels import DIFFERENTIATED, SCHEDULED, SPLIT, TRACED
from autopar.passes.bucket_collectives import bucket_collectives
from autopar.passes.canonicalize import canonicalize
from autopar.passes.cast_parameters import cast_parameters
from autopar.passes.cast_reductions import cast_reductions
from autopar.passes.cut_stages import cut_stages
from autopar.passes.draw_dropout import draw_dropout
from autopar.passes.enter_parameters import enter_parameters
from autopar.passes.expand_composites import expand_composites
from autopar.passes.fold_constants import fold_constants
from autopar.passes.fuse_arithmetic import fuse_arithmetic
from autopar.passes.lower_row_indexing import lower_row_indexing
from autopar.passes.merge_reductions import merge_reductions
from autopar.passes.overlap_collectives import overlap_collectives
from autopar.passes.pad_rows import pad_rows
from autopar.passes.recognise_experts import recognise_experts
from autopar.passes.recognise_masks import recognise_masks
from autopar.passes.recompute_activations import recompute_activations
from autopar.passes.route_experts import route_experts
from autopar.passes.schedule_microbatches import schedule_microbatches
from autopar.passes.shard_parameters import shard_parameters
from autopar.passes.split_batch import split_batch
from autopar.passes.split_sequence import split_sequence
from autopar.passes.split_tensors import split_tensors
from autopar.passes.stack_experts import stack_experts
from autopar.passes.stack_parameters import stack_parameters
from autopar.passes.synchronise_batch_norm import synchronise_batch_norm
from autopar.passes.unstack_recurrent_layers import unstack_recurrent_layers
from autopar.passes.weigh_microbatches import weigh_microbatches
from autopar.passes.write_bags import write_bags
from autopar.passes.write_losses_as_sums import write_losses_as_sums

differentiate: Pass[AnyProgram, AnyProgram] = graph_pass(requires=(is_not_differentiated,), copies=False)(
    autodiff.differentiate
)

COMPILER = (
    Phase(
        "canonical form",
        (
            canonicalize,  # first: every later pass sees one form of each operator
            stack_experts,  # before anything looks at the rows of experts: all rows of each, until then
            stack_parameters,  # while the stacks of parameters are the only users of these
            lower_row_indexing,  # while the rows that an index counts are an arange, not yet a constant
            recognise_masks,  # before constants are evaluated: a mask has as many elements as there are scores
            fold_constants,  # positions and the masks that stay become constants, which any axis may cut
            recognise_experts,  # rows of a sort over all tokens could not be cut by batch
            write_bags,  # the beginnings of bags must be known before bags are split
            unstack_recurrent_layers,  # the dropout between layers becomes a node
            expand_composites,  # operators that no pass and no rule knows become ones that have rules
            draw_dropout,  # masks from positions, so that they do not depend on the mesh
            write_losses_as_sums,  # a mean must stay a mean over all tokens once tokens are split
            weigh_microbatches,  # while a sum over rows is one operator, and statistics of the batch are another
            synchronise_batch_norm,  # statistics of the whole batch, before the batch is split
            pad_rows,  # once what sums over rows is operators that sum
        ),
        TRACED,
    ),
    Phase(
        "split",
        (
            split_batch,  # outermost data axis first: every later axis sees the local batch
            split_sequence,  # while heads are whole: how many there are for each rank determines how attention runs
            split_tensors,
            route_experts,  # while nothing but the axes themselves has changed the weights of experts
            enter_parameters,  # once all axes are split: reductions of one parameter then stand next to each other
            merge_reductions,  # before a parameter is split over several at once
            shard_parameters,  # last of the axes: it gathers the part of a parameter that the others leave
            cast_parameters,  # before all else that happens to a parameter: its cast is gathered, half the bytes
        ),
        SPLIT,
    ),
    Phase(
        "cut",
        (
            cut_stages,  # once everything that a stage will compute can be counted
        ),
        SPLIT,
    ),
    Phase(
        "differentiate",
        (
            differentiate,  # after all passes that see only the forward pass
        ),
        DIFFERENTIATED,
    ),
    Phase(
        "optimise",  # forward and backward graphs; numbers stay the same, up to rounding
        (
            fuse_arithmetic,  # less memory is read and written; first, while sums are still next to their terms
            recompute_activations,  # once operators are final: a recomputed operator is then the same
            cast_reductions,  # before buckets, which are of one dtype
            bucket_collectives,
            overlap_collectives,  # last: ranks run the order that it makes
        ),
        DIFFERENTIATED,
        each_stage=True,
    ),
    Phase(
        "schedule",
        (
            schedule_microbatches,  # once each stage is final, and with it the values that stages send each other
        ),
        SCHEDULED,
    ),
)
