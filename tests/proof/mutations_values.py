"""Planted bugs of values: masks, saved values, dropout, ZeRO, padding, fused weights, experts, casts, gradients."""

from __future__ import annotations

from typing import Any

import torch

from autopar.ir.layout import Factor, Layout
from autopar.ir.node import set_values, value, values
from autopar.ir.program import AnyProgram
from tests.proof.planting import (
    after,
    argument,
    bug,
    drop,
    found,
    gradient,
    graph_of,
    like,
    placeholder,
    reduction,
    results,
    set_result,
    with_kinds,
)

aten = torch.ops.aten
op = torch.ops.autopar

# ---------------------------------------------------------------- masks


@bug("mask lost", "dp tp")
def attention_sees_what_comes(program: AnyProgram) -> None:
    argument(found(program, "forward", op.attention.default)[0], 4, False)


@bug("mask lost", "dp tp")
def gradients_of_what_comes(program: AnyProgram) -> None:
    argument(found(program, "backward", op.attention_backward.default)[0], 7, False)


@bug("mask lost", "ring")
def tile_of_another_step(program: AnyProgram) -> None:
    argument(found(program, "forward", op.attention_tile.default)[1], 7, 2)


@bug("mask lost", "ring")
def tile_in_blocks_for_zig_zag(program: AnyProgram) -> None:
    argument(found(program, "forward", op.attention_tile.default)[1], 9, False)


@bug("mask lost", "ring")
def gradient_of_a_tile_of_another_step(program: AnyProgram) -> None:
    argument(found(program, "backward", op.attention_tile_backward.default)[2], 10, 3)


@bug("mask lost", "documents")
def documents_lost_at_a_seam(program: AnyProgram) -> None:
    node = found(program, "forward", op.attention_tile.default)[1]
    argument(node, 6, "j<=i")
    argument(node, 4, [])


@bug("mask lost", "documents")
def causality_lost_at_a_seam(program: AnyProgram) -> None:
    argument(found(program, "forward", op.attention_tile.default)[1], 6, "v0[i]==v0[j]")


@bug("mask lost", "ring")
def tile_left_out(program: AnyProgram) -> None:
    node = found(program, "forward", op.merge_tiles.default)[-1]
    for user in list(node.users):
        user.replace_all_uses_with(node.args[user.args[1]])  # type: ignore[arg-type, index]
        user.graph.erase_node(user)
    node.graph.erase_node(node)


# ---------------------------------------------------------------- fused weights, ZeRO, padding


@bug("fused weight as one block", "fused")
def rows_of_queries_to_one_rank(program: AnyProgram) -> None:
    part = program.parts[0]
    for graph in part.graphs.values():
        for node in graph.nodes:
            if node.name == "p_qkv_weight":
                _, last = value(node).layout.dims
                with_kinds(node, layout=Layout(((Factor(48, ("tp",)),), last)))


@bug("fused weight as one block", "fused")
def keys_for_queries(program: AnyProgram) -> None:
    import operator

    first, second = (n for n in found(program, "forward", operator.getitem)[:3] if n.args[1] in (0, 1))
    one, other = first.args[1], second.args[1]
    argument(first, 1, other)
    argument(second, 1, one)


@bug("ZeRO rows", "zero 3")
def gathered_rows_off_by_one(program: AnyProgram) -> None:
    after(found(program, "forward", "all_gather", "dp+sp")[2], aten.roll.default, [1], [0])


@bug("ZeRO rows", "zero 3")
def scattered_rows_off_by_one(program: AnyProgram) -> None:
    node = reduction(program, "head.weight")
    after(node.all_input_nodes[0], aten.roll.default, [1], [0])


@bug("ZeRO rows", "odd net")
def uneven_rows_off_by_one(program: AnyProgram) -> None:
    after(gradient(program, "second")[2], aten.roll.default, [1], [0])


@bug("ZeRO rows", "zero 3")
def gathered_in_zig_zag(program: AnyProgram) -> None:
    argument(found(program, "forward", "all_gather", "dp+sp")[2], 4, -2)


@bug("ZeRO rows", "zero 3")
def another_parameter_gathered_for_backward(program: AnyProgram) -> None:
    graph = graph_of(program, "backward")
    one, other = (
        next(n for n in found(program, "backward", "all_gather", "dp+sp") if str(n.args[0]) == name)
        for name in ("p_blocks_0_attn_q_weight", "p_blocks_0_attn_v_weight")
    )
    assert value(one) == value(other) and one.graph is graph
    argument(one, 0, placeholder(program, "backward", "p_blocks_0_attn_v_weight"))


@bug("padding counted", "odd vocabulary")
def padded_logits_counted(program: AnyProgram) -> None:
    for node in found(program, "forward", aten.masked_fill.Scalar):
        drop(node)


@bug("padding counted", "odd net")
def padded_rows_counted(program: AnyProgram) -> None:
    drop(found(program, "forward", aten.where.self)[0], 1)


@bug("padding counted", "odd net")
def padded_rows_in_another_place(program: AnyProgram) -> None:
    after(found(program, "forward", "split")[-1], aten.flip.default, [0])


@bug("vocabulary offset", "dp tp")
def all_ranks_have_the_first_tokens(program: AnyProgram) -> None:
    argument(found(program, "forward", aten.mul.Tensor)[0], 1, 0)


@bug("vocabulary offset", "odd vocabulary")
def tokens_off_by_one(program: AnyProgram) -> None:
    node = found(program, "forward", aten.mul.Tensor)[0]
    argument(node, 1, node.args[1] - 1)  # type: ignore[operator]


# ---------------------------------------------------------------- dropout


def _positions(program: AnyProgram, axis: str) -> None:
    """All ranks along ``axis`` have the positions of the first."""
    node = next(n for n in found(program, "forward", "split", axis))
    size = value(node).layout.local_shape(program.mesh)[0]
    with node.graph.inserting_before(node):
        first = node.graph.call_function(aten.slice.Tensor, (node.args[0], 0, 0, size))
    set_values(first, *values(node))
    node.replace_all_uses_with(first)
    node.graph.erase_node(node)


@bug("dropout masks", "dropout")
def one_mask_on_all_rows(program: AnyProgram) -> None:
    _positions(program, "dp")


@bug("dropout masks", "dropout")
def one_mask_on_all_columns(program: AnyProgram) -> None:
    _positions(program, "tp")


@bug("dropout masks", "dropout")
def salt_of_another_dropout(program: AnyProgram) -> None:
    argument(found(program, "forward", aten.add.Tensor)[0], 1, 1)


@bug("dropout masks", "dropout")
def seed_of_each_rank(program: AnyProgram) -> None:
    node = found(program, "forward", aten.add.Tensor)[0]
    with node.graph.inserting_before(node):
        index = node.graph.call_function(op.axis_index.default, ("dp",))
    set_values(index, *values(node))
    argument(node, 1, index)


@bug("dropout masks", "dropout")
def gradients_of_the_other_half(program: AnyProgram) -> None:
    after(placeholder(program, "backward", "ge"), aten.logical_not.default)


@bug("dropout masks", "dropout")
def kept_more_often(program: AnyProgram) -> None:
    node = found(program, "forward", aten.ge.Scalar)[0]
    argument(node, 1, node.args[1] // 2)  # type: ignore[operator]


# ---------------------------------------------------------------- saved values


@bug("stale saved value", "dp tp")
def another_saved_value(program: AnyProgram) -> None:
    graph = graph_of(program, "forward")
    every = results(graph)
    one, other = (place for place, node in enumerate(every) if node.name in ("linear_4", "linear_5"))
    assert value(every[one]) == value(every[other])
    set_result(graph, one, every[other])


@bug("stale saved value", "dp tp")
def saved_before_it_is_added(program: AnyProgram) -> None:
    graph = graph_of(program, "forward")
    place, node = next((place, node) for place, node in enumerate(results(graph)) if node.name == "add_3")
    set_result(graph, place, next(like(node, graph)))


@bug("stale saved value", "recompute")
def recomputed_with_the_weight_of_another_layer(program: AnyProgram) -> None:
    node = next(n for n in found(program, "backward", aten.linear.default) if "blocks_1_attn_q" in str(n.args[1]))
    argument(node, 1, placeholder(program, "backward", "p_blocks_0_attn_q_weight"))


@bug("stale saved value", "recompute")
def recomputed_from_the_input_of_another_layer(program: AnyProgram) -> None:
    node = next(n for n in found(program, "backward", aten.linear.default) if "blocks_1_mlp_up" in str(n.args[1]))
    other = next(n for n in found(program, "backward", aten.linear.default) if "blocks_1_attn_q" in str(n.args[1]))
    argument(node, 0, other.args[0])


@bug("stale saved value", "pipeline")
def sent_before_it_is_added(program: AnyProgram) -> None:
    graph = graph_of(program, "0.forward")
    node = results(graph)[0]
    set_result(graph, 0, list(like(node, graph))[0])


# ---------------------------------------------------------------- experts


@bug("wrong expert", "ep")
def experts_of_the_next_offset(program: AnyProgram) -> None:
    after(found(program, "forward", op.received_ids.default)[0], aten.bitwise_xor.Scalar, 1)


@bug("wrong expert", "ep")
def expert_of_one_product_only(program: AnyProgram) -> None:
    node = found(program, "forward", op.expert_linear.default)[1]
    ids = node.args[2]
    with node.graph.inserting_before(node):
        other = node.graph.call_function(aten.bitwise_xor.Scalar, (ids, 1))
    set_values(other, *values(ids))  # type: ignore[arg-type]
    argument(node, 2, other)


@bug("wrong expert", "ep")
def rows_in_the_order_of_experts(program: AnyProgram) -> None:
    drop(found(program, "forward", op.permute_rows.default)[1])


@bug("wrong expert", "ep")
def rows_put_back_by_the_wrong_order(program: AnyProgram) -> None:
    node = found(program, "forward", op.permute_rows.default)[1]
    node.args = (node.args[0], node.args[2], node.args[1])


@bug("wrong expert", "ep")
def gradients_that_are_routed_back_twice(program: AnyProgram) -> None:
    node = found(program, "backward", "dispatch_rows")[0]
    node.args = (*node.args[:3], node.args[4], node.args[3])


@bug("wrong expert", "ep")
def weights_of_the_router_of_another_choice(program: AnyProgram) -> None:
    node = next(n for n in found(program, "forward", aten.div.Tensor) if value(n).shape[-1] == 2)
    after(node, aten.flip.default, [1])


@bug("wrong expert", "capacity")
def rows_from_the_next_seat(program: AnyProgram) -> None:
    node = found(program, "forward", op.pick_rows.default)[0]
    after(node, aten.roll.default, [1], [0])


# ---------------------------------------------------------------- casts


@bug("cast lost", "bf16")
def parameter_that_is_not_cast(program: AnyProgram) -> None:
    drop(found(program, "forward", aten._to_copy.default)[0])


@bug("cast lost", "bf16")
def cast_to_another_dtype(program: AnyProgram) -> None:
    node = found(program, "forward", aten._to_copy.default)[0]
    node.kwargs = {**node.kwargs, "dtype": torch.float32}


@bug("cast lost", "bf16")
def gradient_that_is_not_cast_back(program: AnyProgram) -> None:
    graph, place, node = gradient(program, "second")
    set_result(graph, place, node.args[0])  # type: ignore[arg-type]


@bug("cast lost", "bf16, summed in f32")
def gradient_that_is_summed_in_bf16(program: AnyProgram) -> None:
    node = reduction(program, "second")
    cast: Any = node.args[0]
    assert cast.target == aten._to_copy.default
    with_kinds(node, dtype=value(cast.args[0]).dtype)
    drop(cast)


# ---------------------------------------------------------------- gradients and buffers


@bug("gradient of another parameter", "net")
def gradients_of_one_shape_exchanged(program: AnyProgram) -> None:
    graph, one, first = gradient(program, "first")
    _, other, second = gradient(program, "second")
    set_result(graph, one, second)
    set_result(graph, other, first)


@bug("gradient of another parameter", "zero 3")
def gradients_of_parts_exchanged(program: AnyProgram) -> None:
    graph, one, first = gradient(program, "blocks.0.attn.k.weight")
    _, other, second = gradient(program, "blocks.0.attn.v.weight")
    set_result(graph, one, second)
    set_result(graph, other, first)


@bug("gradient scaled", "net")
def gradient_doubled(program: AnyProgram) -> None:
    after(gradient(program, "up.weight")[2], aten.mul.Scalar, 2.0)


@bug("gradient scaled", "dp tp")
def gradient_of_the_other_sign(program: AnyProgram) -> None:
    after(gradient(program, "head.weight")[2], aten.neg.default)


@bug("gradient scaled", "pipeline")
def gradient_without_the_products_of_one_stage(program: AnyProgram) -> None:
    node = next(n for n in gradient(program, "0.add_6", 1)[0].nodes if n.target == aten.addcmul.default)
    drop(node)


@bug("buffer of one rank", "batch norm")
def mean_of_own_rows(program: AnyProgram) -> None:
    (own,) = (n for n in found(program, "forward", aten.mean.dim) if n.name == "mean")
    node = next(n for n in found(program, "forward", aten.view.default) if n.name == "view_3")
    argument(node, 0, own)


@bug("buffer of one rank", "batch norm")
def mean_that_is_not_updated(program: AnyProgram) -> None:
    graph = graph_of(program, "forward")
    set_result(graph, 1, placeholder(program, "forward", "b_norm_running_mean"))


@bug("buffer of one rank", "batch norm")
def count_of_another_step(program: AnyProgram) -> None:
    argument(found(program, "forward", aten.add.Tensor)[0], 1, 2)
