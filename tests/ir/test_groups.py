"""Axes merged to one, and parts of one, in layouts, in the text form and in the facts about collectives."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autopar.errors import InvariantError, ProgramFileError
from autopar.ir import collectives as comm
from autopar.ir.invariants import collectives_match_layouts
from autopar.ir.layout import PARTIAL, Layout, Partial, Split, owned_indices, shard, unshard
from autopar.ir.parse import parse
from autopar.mesh import Mesh

MESH = Mesh(dp=2, sp=3, tp=2)


@given(st.integers(1, 20), st.sampled_from(("dp+sp", "dp+tp", "sp+tp", "dp+sp+tp")))
def test_merged_axes_cut_once_as_one_axis_of_as_many_ranks(size: int, axes: str) -> None:
    ways = MESH.size(axes)
    layout = Layout.whole((size, 2)).place(axes, Split(0), MESH)
    assert layout.local_shape(MESH) == (-(-size // ways), 2) and layout.axes == set(axes.split("+"))
    whole = torch.randn(size, 2)
    parts = [shard(whole, layout, MESH, MESH.coordinates(rank)) for rank in range(MESH.world_size)]
    for group in MESH.groups(axes):
        for position, rank in enumerate(group):
            assert torch.equal(parts[rank], whole[owned_indices(size, Split(0), position, ways)])
    padded = [torch.nn.functional.pad(part, (0, 0, 0, -(-size // ways) - len(part))) for part in parts]
    assert torch.equal(unshard(padded, layout, MESH), whole)


@pytest.mark.parametrize("split", [Split(0, outer=2), Split(0, ratio=(2, 1)), Split(1)])
def test_a_merged_split_of_any_kind(split: Split) -> None:
    whole = torch.randn(36, 24)
    layout = Layout.whole(whole.shape).place("dp+sp", split, MESH)
    assert layout.placement("dp+sp", MESH) == split
    parts = [shard(whole, layout, MESH, MESH.coordinates(rank)) for rank in range(12)]
    for group in MESH.groups("dp+sp"):
        for position, rank in enumerate(group):
            owned = owned_indices(whole.shape[split.dim], split, position, 6)
            assert torch.equal(parts[rank], whole.index_select(split.dim, owned))
    assert torch.equal(unshard(parts, layout, MESH), whole)


def test_a_part_of_an_axis_and_the_rest_of_it() -> None:
    mesh = Mesh(dp=2, sp=4)
    whole = torch.randn(8, 6)
    layout = Layout.whole(whole.shape).place("sp:outer2", Split(0), mesh).place("sp:inner2", Split(1), mesh)
    assert str(layout) == "[8@sp:outer2,6@sp:inner2]" and layout.axes == {"sp"}
    parts = [shard(whole, layout, mesh, mesh.coordinates(rank)) for rank in range(8)]
    assert torch.equal(parts[6], whole[4:, :3]) and torch.equal(parts[3], whole[4:, 3:])
    assert torch.equal(unshard(parts, layout, mesh), whole)
    alone = Layout.whole(whole.shape).place("sp:inner2", Split(0), mesh)
    assert torch.equal(
        unshard([shard(whole, alone, mesh, mesh.coordinates(rank)) for rank in range(8)], alone, mesh), whole
    )


def test_a_sum_over_merged_axes_is_one_over_each() -> None:
    layout = Layout.whole((4,)).place("dp+sp", PARTIAL, MESH)
    assert layout.partial == (("dp", "sum"), ("sp", "sum")) and str(layout) == "[4]{sum:dp,sum:sp}"
    assert layout.placement("dp+sp", MESH) == layout.placement("sp", MESH) == Partial("sum")
    assert torch.equal(unshard([torch.ones(4)] * 12, layout, MESH), torch.full((4,), 6.0))


TEXT = """program mesh(dp=2 sp=4 tp=2)
  w          = param w                                : f32[16@dp+sp,8]
  x          = input                                  : f32[16@dp,8,(4 2@sp:outer2)@tp]
  all_gather = comm.all_gather(w, dp+sp, dim=0)       : f32[16,8]
  axis_index = comm.axis_index(dp+sp:inner2)          : i64[]
  all_reduce = comm.all_reduce(x, sp:inner2, op=max)  : f32[16@dp,8,(4 2@sp:outer2)@tp]
  return all_gather, axis_index, all_reduce"""


def test_names_of_groups_in_the_text_form() -> None:
    text = TEXT.replace("(4 2@sp:outer2)@tp", "(4@tp 2@sp:outer2)")
    program = parse(text)
    assert str(parse(str(program))) == str(program)
    gather, index, reduce = list(program.graph.nodes)[2:5]
    assert comm.arguments_of(gather)["axis"] == "dp+sp" and comm.arguments_of(gather)["ways"] == 8
    assert comm.axes_over(gather) == {"dp", "sp"} and index.args == ("dp+sp:inner2",)
    assert comm.arguments_of(reduce)["axis"] == "sp:inner2" and comm.axes_over(reduce) == {"sp"}
    assert "f32[16@dp+sp,8]" in str(program) and "comm.all_reduce(x, sp:inner2, op=max)" in str(program)


def test_a_name_is_read_into_its_normal_form() -> None:
    program = parse("program mesh(dp=2 sp=1)\n x = input : f32[4@dp+sp]\n a = comm.enter(x, dp+sp) : f32[4]\n return a")
    assert "f32[4@dp]" in str(program) and "comm.enter(x, dp)" in str(program)
    summed = parse("program mesh(dp=2 sp=2)\n x = input : f32[4]{sum:dp+sp}\n return x")
    assert "f32[4]{sum:dp,sum:sp}" in str(summed)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("dp+ep", "expected an axis of mesh(dp=2 sp=4), found 'dp+ep'"),
        ("sp+dp", "the axes of a group stand in mesh order, each once: dp+sp"),
        ("sp:inner3", "groups of 3 do not divide sp=4"),
        ("sp:some2", "neither an axis nor a part of one"),
    ],
)
def test_wrong_names_in_the_text_form(axis: str, message: str) -> None:
    with pytest.raises(ProgramFileError, match=re.escape(message)) as caught:
        parse(f"program mesh(dp=2 sp=4)\n  x = input : f32[4]\n  a = comm.enter(x, {axis}) : f32[4]\n  return a")
    assert "line 3" in str(caught.value) and len(str(caught.value).splitlines()) < 15


CASES = [  # operand, line, whether it is right
    ("f32[8@dp+sp]", "comm.all_gather(x, dp+sp, dim=0) : f32[8]", True),
    ("f32[8@dp@sp]", "comm.all_gather(x, dp+sp, dim=0) : f32[8]", True),
    ("f32[8@dp]", "comm.all_gather(x, dp+sp, dim=0) : f32[8]", False),
    ("f32[8@dp+sp]", "comm.enter(x, dp) : f32[8@dp+sp]", False),
    ("f32[8]{sum:dp,sum:sp}", "comm.all_reduce(x, dp+sp) : f32[8]", True),
    ("f32[8]{sum:dp}", "comm.all_reduce(x, dp+sp) : f32[8]", False),
    ("f32[8]{sum:dp,sum:sp}", "comm.all_reduce(x, dp+sp) : f32[8]{sum:sp}", False),
    ("f32[8@sp:outer2]", "comm.enter(x, sp:inner2) : f32[8@sp:outer2]", True),
    ("f32[8@sp]", "comm.enter(x, sp:inner2) : f32[8@sp]", False),
]


@pytest.mark.parametrize(("operand", "line", "right"), CASES)
def test_collectives_against_layouts(operand: str, line: str, right: bool) -> None:
    program = parse(f"program mesh(dp=2 sp=4)\n  x = input : {operand}\n  y = {line}\n  return y")
    if right:
        collectives_match_layouts(program)
    else:
        with pytest.raises(InvariantError, match="on axis '(dp|dp\\+sp|sp:inner2)'"):
            collectives_match_layouts(program)
