"""Planted bugs of collectives: sums that are missing, done twice, over other ranks, wrongly weighed."""

from __future__ import annotations

import torch

from autopar.ir import collectives as comm
from autopar.ir.node import set_values, value, values
from autopar.ir.program import AnyProgram
from tests.proof.planting import (
    after,
    again,
    argument,
    bug,
    drop,
    found,
    gradient,
    placeholder,
    reduction,
    set_result,
    turned_into,
)

aten = torch.ops.aten

# ---------------------------------------------------------------- dropped


@bug("dropped reduction", "dp tp")
def forward_sum_over_tp(program: AnyProgram) -> None:
    drop(found(program, "forward", "all_reduce", "tp")[1])


@bug("dropped reduction", "dp tp")
def backward_sum_over_tp(program: AnyProgram) -> None:
    drop(found(program, "backward", "all_reduce", "tp")[1])


@bug("dropped reduction", "dp tp")
def gradient_over_dp(program: AnyProgram) -> None:
    drop(reduction(program, "blocks.0.mlp.up.weight"))


@bug("dropped reduction", "dp tp")
def gradient_of_the_table(program: AnyProgram) -> None:
    drop(reduction(program, "tokens.weight"))


@bug("dropped reduction", "dp tp")
def loss_over_dp(program: AnyProgram) -> None:
    drop(found(program, "forward", "all_reduce", "dp")[0])


@bug("dropped reduction", "ring")
def gradient_over_sp(program: AnyProgram) -> None:
    drop(reduction(program, "blocks.0.attn_norm.weight"))


@bug("dropped reduction", "ep")
def gradient_of_the_router_over_ep(program: AnyProgram) -> None:
    drop(reduction(program, "blocks.0.moe.router.weight"))


@bug("dropped reduction", "megatron")
def gradient_of_a_norm_over_tp(program: AnyProgram) -> None:
    drop(reduction(program, "norm.weight"))


@bug("dropped reduction", "buckets")
def one_gradient_of_a_bucket(program: AnyProgram) -> None:
    graph, place, node = gradient(program, "norm.weight")
    own = next(n for n in graph.nodes if n.target == aten.view.default and value(n) == value(node))
    set_result(graph, place, own)


@bug("dropped reduction", "zero 3")
def own_rows_of_an_unsummed_gradient(program: AnyProgram) -> None:
    turned_into(reduction(program, "head.weight"), "split_replicated")


@bug("dropped reduction", "tied")
def gradient_of_one_end_of_a_tied_table(program: AnyProgram) -> None:
    after(gradient(program, "table.weight")[2], aten.zeros_like.default)


@bug("dropped reduction", "pipeline")
def backward_sum_of_a_stage(program: AnyProgram) -> None:
    drop(found(program, "1.backward", "all_reduce", "tp")[0])


@bug("moments of a part of the batch", "batch norm")
def moments_of_one_rank(program: AnyProgram) -> None:
    (node,) = found(program, "forward", "all_gather_invariant")
    with node.graph.inserting_before(node):
        alike = node.graph.call_function(aten.cat.default, ([node.args[0], node.args[0]], 0))
    set_values(alike, *values(node))
    node.replace_all_uses_with(alike)
    node.graph.erase_node(node)


@bug("moments of a part of the batch", "batch norm")
def gradients_of_moments_of_one_rank(program: AnyProgram) -> None:
    drop(found(program, "backward", "all_reduce", "dp")[-3])


# ---------------------------------------------------------------- doubled


@bug("doubled reduction", "dp tp")
def forward_sum_over_tp_twice(program: AnyProgram) -> None:
    again(found(program, "forward", "all_reduce", "tp")[1])


@bug("doubled reduction", "dp tp")
def backward_sum_over_tp_twice(program: AnyProgram) -> None:
    again(found(program, "backward", "all_reduce", "tp")[0])


@bug("doubled reduction", "dp tp")
def gradient_over_dp_twice(program: AnyProgram) -> None:
    again(reduction(program, "norm.weight"))


@bug("doubled reduction", "ring")
def gradient_over_sp_twice(program: AnyProgram) -> None:
    again(reduction(program, "norm.weight"))


@bug("doubled reduction", "megatron")
def gradient_over_tp_where_it_is_whole(program: AnyProgram) -> None:
    after(gradient(program, "head.weight")[2], comm.OPS.all_reduce.default, "tp", "sum")


@bug("doubled reduction", "ep")
def gradient_of_experts_over_ep(program: AnyProgram) -> None:
    after(gradient(program, "blocks.0.moe.experts.gate")[2], comm.OPS.all_reduce.default, "ep", "sum")


@bug("doubled reduction", "buckets")
def one_gradient_of_a_bucket_twice(program: AnyProgram) -> None:
    graph, _, node = gradient(program, "norm.weight")
    own = next(n for n in graph.nodes if n.target == aten.view.default and value(n) == value(node))
    after(own, comm.OPS.all_reduce.default, "dp+sp", "sum")


@bug("doubled reduction", "buckets")
def one_gradient_of_a_bucket_over_sp_twice(program: AnyProgram) -> None:
    after(gradient(program, "norm.weight")[2], comm.OPS.all_reduce.default, "sp", "sum")


@bug("doubled reduction", "zero 3")
def summed_before_it_is_scattered(program: AnyProgram) -> None:
    node = reduction(program, "head.weight")
    after(node.all_input_nodes[0], comm.OPS.all_reduce.default, "dp+sp", "sum")


# ---------------------------------------------------------------- wrong dual


@bug("wrong dual", "megatron")
def gather_whose_gradient_is_cut(program: AnyProgram) -> None:
    turned_into(found(program, "backward", "reduce_scatter")[1], "split_replicated")


@bug("wrong dual", "megatron")
def scatter_whose_gradient_is_padded(program: AnyProgram) -> None:
    turned_into(found(program, "backward", "all_gather")[0], "pad")


@bug("wrong dual", "buckets")
def keys_whose_gradients_are_cut(program: AnyProgram) -> None:
    turned_into(found(program, "backward", "reduce_scatter", "sp")[0], "split")


@bug("wrong dual", "net")
def bias_whose_gradient_is_that_of_one_rank(program: AnyProgram) -> None:
    after(reduction(program, "down.bias"), comm.OPS.keep_first.default, "tp")


@bug("wrong dual", "batch norm")
def gathered_alike_and_summed(program: AnyProgram) -> None:
    turned_into(found(program, "backward", "split")[0], "reduce_scatter")


@bug("wrong ends of an all-to-all", "ulysses")
def all_to_all_that_is_not_turned(program: AnyProgram) -> None:
    node = found(program, "backward", "all_to_all")[1]
    node.args = (*node.args[:3], node.args[4], node.args[3])


@bug("wrong ends of an all-to-all", "capacity")
def seats_that_go_on_instead_of_back(program: AnyProgram) -> None:
    node = found(program, "forward", "all_to_all")[1]
    node.args = (*node.args[:3], node.args[4], node.args[3])


# ---------------------------------------------------------------- bias


@bug("bias added n times", "net")
def bias_on_every_rank(program: AnyProgram) -> None:
    drop(found(program, "forward", "keep_first")[0])


@bug("bias added n times", "fused")
def bias_of_attention_on_every_rank(program: AnyProgram) -> None:
    drop(found(program, "forward", "keep_first")[0])


@bug("bias added n times", "zero 2")
def gathered_bias_on_every_rank(program: AnyProgram) -> None:
    drop(found(program, "forward", "keep_first")[0])


# ---------------------------------------------------------------- wrong group


@bug("wrong group", "dp tp")
def forward_over_dp_for_tp(program: AnyProgram) -> None:
    argument(found(program, "forward", "all_reduce", "tp")[1], 1, "dp")


@bug("wrong group", "dp tp")
def gradient_over_tp_for_dp(program: AnyProgram) -> None:
    argument(reduction(program, "norm.weight"), 1, "tp")


@bug("wrong group", "ulysses")
def gradient_over_dp_for_dp_and_sp(program: AnyProgram) -> None:
    argument(reduction(program, "head.weight"), 1, "dp")


@bug("wrong group", "ulysses")
def gradient_over_sp_for_dp_and_sp(program: AnyProgram) -> None:
    argument(reduction(program, "tokens.weight"), 1, "sp")


@bug("wrong group", "ring")
def gradient_over_neighbours(program: AnyProgram) -> None:
    argument(reduction(program, "norm.weight"), 1, "sp:inner2")


@bug("wrong group", "ring")
def gradient_over_every_other_rank(program: AnyProgram) -> None:
    argument(reduction(program, "head.weight"), 1, "sp:outer2")


@bug("wrong group", "zero 2")
def gathered_over_tp_for_dp(program: AnyProgram) -> None:
    argument(found(program, "forward", "all_gather", "dp")[0], 1, "tp")


@bug("wrong group", "net")
def first_of_dp_for_first_of_tp(program: AnyProgram) -> None:
    argument(found(program, "forward", "keep_first")[0], 1, "dp")


@bug("wrong group", "dp tp")
def backward_over_dp_for_tp(program: AnyProgram) -> None:
    argument(found(program, "backward", "all_reduce", "tp")[1], 1, "dp")


# ---------------------------------------------------------------- op, order, distance


@bug("wrong op", "dp tp")
def largest_for_sum(program: AnyProgram) -> None:
    argument(found(program, "forward", "all_reduce", "tp")[1], 2, "max")


@bug("wrong op", "dp tp")
def gradient_of_the_largest(program: AnyProgram) -> None:
    argument(reduction(program, "head.weight"), 2, "max")


@bug("wrong op", "megatron")
def maximum_of_the_logits_summed(program: AnyProgram) -> None:
    argument(found(program, "forward", "all_reduce", "tp")[0], 2, "sum")
    drop(found(program, "forward", "all_reduce", "tp")[1])


@bug("wrong op", "dp tp")
def maximum_of_own_logits(program: AnyProgram) -> None:
    drop(next(node for node in found(program, "forward", "all_reduce", "tp") if node.args[2] == "max"))


@bug("gathered in another order", "buckets")
def keys_in_blocks_for_zig_zag(program: AnyProgram) -> None:
    for node in found(program, "forward", "all_gather", "sp")[:1]:
        argument(node, 4, 1)


@bug("gathered in another order", "ring")
def logits_in_zig_zag(program: AnyProgram) -> None:
    drop(found(program, "forward", "reorder")[0])


@bug("gathered in another order", "ring")
def cosines_of_other_positions(program: AnyProgram) -> None:
    argument(found(program, "forward", "split", "sp")[0], 4, 1)


@bug("wrong shift", "ring")
def the_wrong_way(program: AnyProgram) -> None:
    argument(found(program, "forward", "shift")[0], 3, -1)


@bug("wrong shift", "ring")
def too_far(program: AnyProgram) -> None:
    argument(found(program, "forward", "shift")[2], 3, 2)


@bug("wrong shift", "ring")
def gradients_the_wrong_way_home(program: AnyProgram) -> None:
    argument(found(program, "backward", "shift")[-1], 3, 3)


@bug("wrong shift", "ring")
def gradients_that_stay_away(program: AnyProgram) -> None:
    drop(found(program, "backward", "shift")[-1])


# ---------------------------------------------------------------- weights of ranks and microbatches


@bug("wrong loss scale", "dp tp")
def own_count_of_labels(program: AnyProgram) -> None:
    drop(found(program, "forward", "all_reduce", "dp")[1])


@bug("wrong loss scale", "dp tp")
def count_of_the_busiest_rank(program: AnyProgram) -> None:
    argument(found(program, "forward", "all_reduce", "dp")[1], 2, "max")


@bug("wrong loss scale", "net")
def gradients_averaged_over_ranks(program: AnyProgram) -> None:
    node = placeholder(program, "backward", "grad_div_tensor")
    after(node, aten.mul.Scalar, 0.5)


@bug("wrong loss scale", "tied")
def mean_of_the_means_of_microbatches(program: AnyProgram) -> None:
    for where in ("1.forward", "1.backward"):
        node = found(program, where, aten.div.Tensor)[0]
        count = next(n for n in node.graph.nodes if n.name == "getitem_2")
        argument(node, 1, count)


@bug("wrong loss scale", "dp tp")
def labels_that_are_not_moved_on(program: AnyProgram) -> None:
    (node,) = found(program, "forward", aten.slice.Tensor)
    node.args = (*node.args[:2], 0, node.args[3] - 1)  # type: ignore[operator]


# ---------------------------------------------------------------- calls without gradients: graphs of their own


@bug("wrong without gradients", "dp tp")
def silu_lost_in_evaluation(program: AnyProgram) -> None:
    drop(found(program, "inference", aten.silu.default)[0])


@bug("wrong without gradients", "net")
def weight_of_another_parameter_in_evaluation(program: AnyProgram) -> None:
    first, second = (placeholder(program, "inference", f"p_{name}") for name in ("first", "second"))
    first.replace_all_uses_with(second)


@bug("wrong without gradients", "pipeline")
def first_stage_forgets_causality_in_evaluation(program: AnyProgram) -> None:
    argument(found(program, "0.inference", aten.scaled_dot_product_attention.default)[0], 5, False)
