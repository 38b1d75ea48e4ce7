"""The compiler: the ordered passes. Each file holds one pass; nothing here imports a pass from another pass.

canonical form   operators in one form each, constants folded, causal masks recognised, losses as sums over counts
split            one mesh axis each: the batch, then the weights
cut              the graph into pipeline stages, which are then differentiated and optimised each by itself
optimise         after differentiation, on forward and backward: fused sums; less memory; fewer, larger collectives
schedule         which stage runs when on which microbatch
"""

from __future__ import annotations

from autopar.passes.bucket_collectives import bucket_collectives
from autopar.passes.canonicalize import canonicalize
from autopar.passes.cast_parameters import cast_parameters
from autopar.passes.cast_reductions import cast_reductions
from autopar.passes.cut_stages import cut_stages
from autopar.passes.draw_dropout import draw_dropout
from autopar.passes.expand_composites import expand_composites
from autopar.passes.fold_constants import fold_constants
from autopar.passes.fuse_arithmetic import fuse_arithmetic
from autopar.passes.overlap_collectives import overlap_collectives
from autopar.passes.recognise_causal_masks import recognise_causal_masks
from autopar.passes.recognise_experts import recognise_experts
from autopar.passes.recompute_activations import recompute_activations
from autopar.passes.schedule_microbatches import schedule_microbatches
from autopar.passes.shard_parameters import shard_parameters
from autopar.passes.split_batch import split_batch
from autopar.passes.split_tensors import split_tensors
from autopar.passes.synchronise_batch_norm import synchronise_batch_norm
from autopar.passes.unstack_recurrent_layers import unstack_recurrent_layers
from autopar.passes.write_bags import write_bags
from autopar.passes.write_losses_as_sums import write_losses_as_sums

PASSES = (
    canonicalize,  # first: every later pass meets one form of each operator
    fold_constants,  # masks and positions become constants, which any axis may cut
    recognise_causal_masks,  # a mask that is known now may turn out to be plain causality
    recognise_experts,  # rows of a sort over all tokens could not be cut by batch
    write_bags,  # where a bag begins must be known before bags are split
    unstack_recurrent_layers,  # the dropout between layers comes into the open
    expand_composites,  # what no pass and no rule knows, as operators that have rules
    draw_dropout,  # masks from positions, so that they do not depend on the mesh
    synchronise_batch_norm,  # statistics of the whole batch, before the batch is split
    write_losses_as_sums,  # a mean must stay a mean over all tokens once tokens are split
    split_batch,  # outermost data axis first: every later axis sees the local batch
    split_tensors,
    shard_parameters,  # last of the axes: what the others have made of a parameter is what is gathered
    cast_parameters,  # in front of all that happens to a parameter, so that its cast is gathered, and half the bytes
    cut_stages,  # once everything that a stage will compute is there to be counted
)

OPTIMISATIONS = (  # on forward and backward graphs, after differentiation; numbers stay the same, up to rounding
    fuse_arithmetic,  # less memory is walked through; first, while sums are still next to their terms
    recompute_activations,  # once operators are what they will be: those made again are then the same
    cast_reductions,  # before buckets, which are of one dtype
    bucket_collectives,
    overlap_collectives,  # last: the order that it makes is the order that ranks run
)

PIPELINE = (  # on all stages together, once each of them is what it will be
    schedule_microbatches,
)
