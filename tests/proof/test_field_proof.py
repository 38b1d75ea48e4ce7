"""Whole programs in the field: what is right is proved, planted faults are refused, and where they are is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from autopar.compiler import compile_program, finish_program, place
from autopar.frontend.trace import trace
from autopar.ir import collectives as comm
from autopar.ir.node import set_values, value, values
from autopar.ir.program import PipelinedProgram, Program
from autopar.mesh import Mesh
from autopar.models import gpt, llama, moe
from autopar.pipeline import microbatches
from autopar.plan import Plan
from autopar.proof.field_proof import ENOUGH, FieldProof, prove_in_field
from tests.selection import slow_but

aten = torch.ops.aten
Batch = dict[str, Tensor]
PLAN = Plan(check_numerics=False, bucket_mb=0, overlap_mb=0)


@cache
def traced(kind: str) -> tuple[Program, Batch]:
    torch.manual_seed(0)
    model, batch = MODELS[kind]()
    return trace(model, (), batch, plan=PLAN), batch


def decoder() -> tuple[nn.Module, Batch]:
    model = llama.build("tiny", layers=1)
    return model, llama.example_batch(model.config, 4, 8)


def experts() -> tuple[nn.Module, Batch]:
    model = moe.build("tiny", layers=1)
    return model, moe.example_batch(model.config, 4, 8)


def dropping() -> tuple[nn.Module, Batch]:
    model = gpt.build("tiny", layers=1, dropout=0.1)
    return model, gpt.example_batch(model.config, 4, 8)


MODELS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {"llama": decoder, "moe": experts, "gpt": dropping}


def program(kind: str, mesh: Mesh, **choices: Any) -> Program:
    plan = Plan(check_numerics=False, bucket_mb=0, overlap_mb=0, **choices)
    found = finish_program(place(traced(kind)[0], mesh, plan))
    assert isinstance(found, Program)
    return found


def proof(kind: str, of: Program, seeds: tuple[int, ...] = (0, 1)) -> FieldProof:
    return prove_in_field(of, kwargs=traced(kind)[1], seeds=seeds)


RIGHT: list[tuple[str, Mesh, dict[str, Any]]] = [
    ("llama", Mesh(dp=2, tp=2), {}),
    ("llama", Mesh(sp=2), {"attention": "ring"}),
    ("llama", Mesh(sp=4), {"attention": "ring"}),
    ("llama", Mesh(sp=2), {"attention": "ulysses"}),
    ("llama", Mesh(dp=2, sp=2, tp=2), {"zero": 3}),
    ("llama", Mesh(dp=2), {"zero": 1}),
    ("llama", Mesh(dp=2), {"zero": 2, "recompute": "full"}),
    ("llama", Mesh(tp=2), {"sequence": "megatron"}),
    ("llama", Mesh(), {}),
    ("moe", Mesh(ep=2), {}),
    ("moe", Mesh(dp=2, ep=2), {}),
    ("gpt", Mesh(dp=2, tp=2), {}),
]


@pytest.mark.parametrize("kind, mesh, choices", slow_but((0, 2, 9), RIGHT), ids=str)
def test_right_programs_are_proved(kind: str, mesh: Mesh, choices: dict[str, Any]) -> None:
    found = proof(kind, program(kind, mesh, **choices))
    names = [entry.target for _, entry in traced(kind)[0].leaves()]
    assert found.holds and found.bound < ENOUGH, found
    assert set(found.proved) >= {"output loss", *(f"gradient of {name}" for name in names)}


@pytest.mark.parametrize("mesh", slow_but((1,), [Mesh(), Mesh(dp=2)]), ids=str)
def test_microbatches_are_added(mesh: Mesh) -> None:
    source, batch = traced("llama")
    plan = replace(PLAN, microbatches=2)
    part = microbatches.parts((), batch, mesh, plan)[0]
    model, _ = MODELS["llama"]()
    found = compile_program(model, mesh, plan, (), part)
    assert prove_in_field(found, source=source, kwargs=batch).holds
    (reason,) = prove_in_field(found, kwargs=batch).unproved
    assert "input_ids is [4, 8], and the model was traced for [2, 8]" in reason


@pytest.mark.parametrize("mesh, kind", slow_but((0,), [(Mesh(pp=2), "gpt"), (Mesh(dp=2, pp=2), "llama")]), ids=str)
def test_pipelines_are_proved(mesh: Mesh, kind: str) -> None:
    """With dropout, for which each microbatch has another seed."""
    source, batch = traced(kind)
    model, _ = MODELS[kind]()
    found = compile_program(model, mesh, replace(PLAN, microbatches=2), (), batch)
    assert prove_in_field(found, source=source, kwargs=batch).holds
    spoiled = found.clone()
    assert isinstance(spoiled, PipelinedProgram)
    reduce_a_gradient_twice(spoiled.stages[1])
    refused = prove_in_field(spoiled, source=source, kwargs=batch, seeds=(0,))
    assert any("this is 2 times that of the model" in one.problem for one in refused.differences), refused


def reduce_a_gradient_twice(stage: Program) -> None:
    """One gradient of the stage is added to itself."""
    backward = stage.required_role.backward
    assert backward is not None
    end = next(node for node in reversed(backward.nodes) if node.op == "output")
    results: Any = list(end.args[0])  # type: ignore[arg-type]
    place = stage.required_role.grads.index("norm.weight")
    with backward.inserting_before(end):
        twice = backward.call_function(aten.add.Tensor, (results[place], results[place]))
    set_values(twice, *values(results[place]))
    results[place] = twice
    end.args = (tuple(results),)


# ---------------------------------------------------------------- planted faults


def nodes(of: Program, where: str, *targets: Any) -> list[fx.Node]:
    graph = of.required_role.backward if where == "backward" else of.required_role.forward
    assert graph is not None
    return [node for node in graph.nodes if node.target in targets]


def drop_a_reduction(of: Program) -> None:
    node = nodes(of, "backward", comm.OPS.all_reduce.default)[-1]
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def reduce_twice(of: Program) -> None:
    node = nodes(of, "backward", comm.OPS.all_reduce.default)[0]
    with node.graph.inserting_after(node):
        again = node.graph.call_function(node.target, (node, *node.args[1:]))  # type: ignore[arg-type]
    set_values(again, *values(node))
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def shift_the_wrong_way(of: Program) -> None:
    node = nodes(of, "backward", comm.OPS.shift.default)[-1]
    node.args = (*node.args[:3], -node.args[3])  # type: ignore[operator]


def reduce_to_the_largest(of: Program) -> None:
    node = nodes(of, "forward", comm.OPS.all_reduce.default)[0]
    node.args = (*node.args[:2], "max")


def scale_otherwise(of: Program) -> None:
    node = nodes(of, "backward", aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)[0]
    with node.graph.inserting_after(node):
        twice = node.graph.call_function(aten.mul.Scalar, (node, 2.0))
    set_values(twice, *values(node))
    node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)


def save_another_value(of: Program) -> None:
    """Backward gets, in place of one saved value, another one of the same type."""
    end = next(node for node in reversed(of.required_role.forward.nodes) if node.op == "output")
    results: Any = list(end.args[0])  # type: ignore[arg-type]
    first = len(of.outputs)
    kinds = [(value(node).dtype, value(node).layout) if len(values(node)) == 1 else None for node in results]
    one, other = next(
        (i, j)
        for i in range(first, len(results))
        for j in range(i + 1, len(results))
        if kinds[i] == kinds[j] and kinds[i] and results[j].op == "call_function" and results[i].op == "call_function"
    )
    results[one] = results[other]
    end.args = (tuple(results),)


def slice_elsewhere(of: Program) -> None:
    """The tokens themselves for the labels, not the next ones."""
    (node,) = nodes(of, "forward", aten.slice.Tensor)
    source, dim, start, end = node.args
    assert (start, end) == (1, 9)
    node.args = (source, dim, 0, 8)


def experts_of_another_rank(of: Program) -> None:
    node = next(n for n in of.required_role.forward.nodes if "received_ids" in str(n.target))
    with node.graph.inserting_after(node):
        other = node.graph.call_function(aten.bitwise_xor.Scalar, (node, 1))
    set_values(other, *values(node))
    node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)


FAULTS: list[tuple[str, Mesh, dict[str, Any], Callable[[Program], None], str]] = [
    ("llama", Mesh(dp=2, tp=2), {}, drop_a_reduction, "ranks 0 and"),
    ("llama", Mesh(dp=2, tp=2), {}, reduce_twice, "the nearest collective is"),
    ("llama", Mesh(sp=4), {"attention": "ring"}, shift_the_wrong_way, "the nearest collective is"),
    ("llama", Mesh(dp=2, tp=2), {}, reduce_to_the_largest, "of the forward pass that differs is"),
    ("llama", Mesh(dp=2, tp=2), {}, scale_otherwise, "this is 2 times that of the model"),
    ("llama", Mesh(dp=2, tp=2), {}, save_another_value, "the forward pass is right"),
    ("llama", Mesh(dp=2, tp=2), {}, slice_elsewhere, "the forward pass differs"),
    ("moe", Mesh(ep=2), {}, experts_of_another_rank, "the first line of the forward pass that differs is"),
]


@pytest.mark.parametrize("kind, mesh, choices, fault, why", FAULTS, ids=[row[3].__name__ for row in FAULTS])
def test_faults_are_refused(
    kind: str, mesh: Mesh, choices: dict[str, Any], fault: Callable[[Program], None], why: str
) -> None:
    spoiled = program(kind, mesh, **choices)
    fault(spoiled)
    found = proof(kind, spoiled, (0,))
    assert found.differences and not found.unproved and not found.holds
    said = [f"{one.problem}; {one.cause}" for one in found.differences]
    assert any(why in words for words in said), said
    assert all(one.problem and one.cause for one in found.differences), said


# ---------------------------------------------------------------- what is not proved


class Strange(nn.Module):
    """The singular values of a matrix: those of the transposed one too, a law that the field does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x @ self.weight).sum() / 600


class Places(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        half = torch.full((1, 1, 2), 0.5)
        return torch.ops.aten.fractional_max_pool2d.default(x[None, None], [2, 2], [2, 2], half)[0].sum()


def test_what_has_no_form_is_an_unknown_function() -> None:
    """Of the same operands it is equal; of others it is not known to be, and nothing is refused."""
    x = torch.randn(4, 4)
    found = compile_program(Strange(), Mesh(), PLAN, (x,))
    right = prove_in_field(found, args=(x,))
    assert right.holds and right.unknown == ("aten._linalg_svd.default",), right
    assert isinstance(found, Program)
    (node,) = nodes(found, "forward", aten._linalg_svd.default)
    with node.graph.inserting_before(node):
        turned = node.graph.call_function(aten.t.default, (node.args[0],))
    set_values(turned, value(node.all_input_nodes[0]))
    node.update_arg(0, turned)
    other = prove_in_field(found, args=(x,))
    assert not other.holds and not other.differences
    assert (
        "output 0" in other.unproved[0] and "where aten._linalg_svd.default are unknown functions" in other.unproved[0]
    )


def test_what_has_no_form_at_all_is_not_proved() -> None:
    x = torch.randn(4, 4)
    found = prove_in_field(compile_program(Places(), Mesh(), PLAN, (x,)), args=(x,))
    assert not found.holds and not found.proved and not found.differences
    assert "aten.fractional_max_pool2d" in found.unproved[0] and "test_field_proof.py" in found.unproved[0]


def test_a_program_without_a_source_is_not_proved() -> None:
    found = prove_in_field(replace(program("llama", Mesh()), source=None), kwargs=traced("llama")[1])
    assert found.unproved == ("the program has no source: it was read from a file without one",)
