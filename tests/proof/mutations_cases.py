"""Planted bugs that were silent wrong numbers once, for users: the compiler's own ones, as they were reported.

What was silent in guards, parameters, ranks that are fed differently, checkpoints and loops of users is no fault of a
program, and nothing that a proof of a program could see.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autopar.compiler import compile_program
from autopar.ir.layout import Factor, Layout
from autopar.ir.node import set_values, value
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.mesh import Mesh
from autopar.plan import Plan
from tests.proof.case_models import Scheduled
from tests.proof.mutated_programs import BARE, CASES, Batch, made
from tests.proof.planting import after, argument, bug, drop, found, gradient, placeholder

aten = torch.ops.aten
op = torch.ops.autopar

# ---------------------------------------------------------------- a program of the model as it was before


def _of_before(model: nn.Module) -> AnyProgram:
    plan = Plan(check_numerics=False, **CASES["scheduled"].choices)
    return compile_program(model.double(), Mesh(dp=2), plan, (), made("scheduled")[1])


@bug("stale program", "scheduled")
def temperature_of_before(program: AnyProgram) -> AnyProgram:
    return _of_before(Scheduled(temperature=1.0))


@bug("stale program", "scheduled")
def batch_norm_that_was_not_frozen(program: AnyProgram) -> AnyProgram:
    return _of_before(Scheduled(frozen=False))


@bug("stale program", "scheduled")
def hook_that_came_later(program: AnyProgram) -> AnyProgram:
    return _of_before(Scheduled(hooked=False))


@bug("stale program", "scheduled")
def head_of_before(program: AnyProgram) -> AnyProgram:
    model = Scheduled()
    model.head = nn.Linear(8, 6)
    return _of_before(model)


# ---------------------------------------------------------------- operators


@bug("operand written for scratch", "scratch")
def operand_that_was_written_for_scratch(program: AnyProgram) -> None:
    (value_of,) = found(program, "forward", aten.linear.default)[:1]
    (shifted,) = (node for node in found(program, "forward", aten.sub.Tensor) if node.args[0] is value_of)
    product = next(node for node in value_of.users if node.target == aten.mul.Tensor)
    product.replace_input_with(value_of, shifted)


@bug("gradient of another parameter", "cell")
def gradients_of_gates_in_another_order(program: AnyProgram) -> None:
    after(gradient(program, "cell.weight_hh")[2], aten.roll.default, [8], [0])


@bug("dropout masks", "noisy")
def noise_of_each_rank(program: AnyProgram) -> None:
    seed = placeholder(program, "forward", "seed")
    with seed.graph.inserting_after(seed):
        rank = seed.graph.call_function(op.axis_index.default, ("tp",))
    set_values(rank, value(seed))
    with seed.graph.inserting_after(rank):
        own = seed.graph.call_function(aten.add.Tensor, (seed, rank))
    set_values(own, value(seed))
    seed.replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)


@bug("padding counted", "uneven head")
def padding_of_the_last_rank_gathered(program: AnyProgram) -> None:
    (node,) = (one for one in found(program, "forward", "all_gather", "tp") if one.args[-1] == 7)
    argument(node, 6, 8)


@bug("strides", "grouped")
def strided_weight_for_a_kernel_that_reads_it_as_it_lies(program: AnyProgram) -> None:
    for node in found(program, "forward", aten.clone.default):
        drop(node)


@bug("fused weight as one block", "few keys")
def queries_and_keys_as_one_block(program: AnyProgram) -> None:
    for graph in program.parts[0].graphs.values():
        for node in graph.nodes:
            if node.name == "p_qkv_weight":
                _, last = value(node).layout.dims
                set_values(node, replace(value(node), layout=Layout(((Factor(32, ("tp",)),), last))))


# ---------------------------------------------------------------- microbatches


def _in_parts(case: str) -> AnyProgram:
    """The program of half of the rows, said to be that of a microbatch, whose loss counts for its rows."""
    model, batch = made(CASES[case].model)
    half: Batch = {name: x[: len(x) // 2] for name, x in batch.items()}
    plan = Plan(check_numerics=False, **BARE)
    part = compile_program(model, Mesh(**CASES[case].axes), plan, (), half)
    return replace(part, plan=replace(plan, microbatches=2))


@bug("microbatches", "contrasted")
def rows_compared_within_a_microbatch(program: AnyProgram) -> AnyProgram:
    return _in_parts("contrasted")


@bug("microbatches", "masked")
def clamped_count_of_a_microbatch(program: AnyProgram) -> AnyProgram:
    return _in_parts("masked")


def _joined(program: AnyProgram, **joins: str) -> Any:
    assert isinstance(program, PipelinedProgram | Program) and program.joins.keys() >= joins.keys()
    return replace(program, joins={**program.joins, **joins})


@bug("microbatches", "reporting")
def mean_of_the_last_microbatch(program: AnyProgram) -> AnyProgram:
    return _joined(program, size="same")  # type: ignore[no-any-return]


@bug("microbatches", "reporting")
def rows_behind_each_other_in_another_dim(program: AnyProgram) -> AnyProgram:
    return _joined(program, turned="0")  # type: ignore[no-any-return]
