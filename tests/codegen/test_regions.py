"""Regions of rank graphs: what is in them, what is not, and that equal ones are one function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from autopar.codegen.python import compile_source, emit
from autopar.codegen.regions import Region, regions_of, with_regions
from autopar.compiler import compile_program
from autopar.ir import collectives as comm
from autopar.ir.node import output_node, values
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.models import gpt, llama, moe
from autopar.plan import Plan


def of_torch(target: Any) -> bool:
    return not str(target).startswith("autopar")


def program(module: Any, mesh: Mesh, plan: dict[str, Any] | None = None, **sizes: Any) -> Program:
    torch.manual_seed(0)
    model = module.build(**sizes)
    batch = module.example_batch(model.config, 4)
    found = compile_program(model, mesh, Plan(check_numerics=False, **plan or {}), (), batch)
    assert isinstance(found, Program)
    return found


def inside(graph: fx.Graph) -> list[fx.Node]:
    return [node for region in regions_of(graph) for node in region.graph.nodes]


def collectives(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.target in comm.TARGETS]


@pytest.fixture(scope="module")
def split() -> Program:
    return program(llama, Mesh(dp=2, tp=2), {"zero": 3})


def test_collectives_stay_lines_of_the_program_in_their_order(split: Program) -> None:
    for graph in split.required_role.graphs.values():
        regional = with_regions(graph, split.mesh, of_torch)
        assert regions_of(regional) and collectives(regional) == collectives(graph) != []
        assert not [node for node in inside(regional) if node.target in comm.TARGETS]
        assert [node.name for node in output_node(regional).all_input_nodes] == [
            node.name for node in output_node(graph).all_input_nodes
        ]


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(dp=2)], ids=str)
def test_equal_blocks_have_the_regions_of_one(mesh: Mesh) -> None:
    few, many = (program(llama, mesh, layers=layers).required_role.graphs for layers in (2, 4))
    for name, graph in many.items():
        found = [regions_of(with_regions(each, mesh, of_torch)) for each in (few[name], graph)]
        assert found[0] == found[1]  # by what they do
        calls = [node for node in with_regions(graph, mesh, of_torch).nodes if isinstance(node.target, Region)]
        assert len(calls) > len(found[1])


def test_sizes_that_ranks_know_at_run_time_are_in_no_region() -> None:
    found = program(moe, Mesh(ep=2))
    regional = [with_regions(graph, found.mesh, of_torch) for graph in found.required_role.graphs.values()]
    ragged = [kind for graph in regional for node in inside(graph) for kind in values(node) if kind.layout.ragged]
    assert not ragged and all(map(regions_of, regional))
    lines = [node for graph in regional for node in graph.nodes]
    assert any(kind.layout.ragged for node in lines for kind in values(node))


def test_random_numbers_are_drawn_by_the_lines_of_the_program() -> None:
    """Their whole numbers wrap around, which compiled code need not do."""
    found = program(gpt, Mesh(dp=2), dropout=0.1)
    regional = with_regions(found.required_role.forward, found.mesh, of_torch)
    large = [node.name for node in found.required_role.forward.nodes if wraps(node)]
    assert large and regions_of(regional)
    assert [node.name for node in regional.nodes if wraps(node)] == large
    assert not list(filter(wraps, inside(regional)))


def wraps(node: fx.Node) -> bool:
    return any(isinstance(argument, int) and abs(argument) > 2**32 for argument in node.args)


def test_what_a_compiler_does_not_know_is_in_no_region(split: Program) -> None:
    forward = split.required_role.forward
    regional = with_regions(forward, split.mesh, lambda target: of_torch(target) and target is not MUL)
    assert any(node.target is MUL for node in forward.nodes)
    assert regions_of(regional) and not [node for node in inside(regional) if node.target is MUL]


MUL = torch.ops.aten.mul.Tensor


def test_regions_as_python_give_what_the_lines_give() -> None:
    """To the last bit: the same operators run in the same order; and what nothing needs any more is freed."""
    found = program(llama, Mesh())
    graph = found.required_role.inference
    regional = with_regions(graph, found.mesh, of_torch)
    source = emit({"inference": regional}, found)
    given = [_random(node) for node in graph.nodes if node.op == "placeholder"]
    plain = compile_source(emit({"inference": graph}, found), "inference")(None, list(given))
    by_regions = compile_source(source, "inference")(None, list(given))
    assert all(torch.equal(one, other) for one, other in zip(plain, by_regions, strict=True))
    for region in regions_of(regional):
        assert source.count(f"def {region.__name__}(comm, inputs):") == 1
        assert f"= {region.__name__}(comm, given)" in source
    assert "given = [" in source and "]; del " in source


def _random(node: fx.Node) -> Tensor:
    (kind,) = values(node)
    shape = kind.layout.local_shape(Mesh())
    return torch.randn(shape, dtype=kind.dtype) if kind.dtype.is_floating_point else torch.ones(shape, dtype=kind.dtype)
