"""Layouts: what each rank holds, how placements compose, and that shard and unshard are inverse."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autopar.ir.cursor import Cursor, take_layout
from autopar.ir.layout import (
    INVARIANT,
    PARTIAL,
    REPLICATED,
    Factor,
    Layout,
    Partial,
    Split,
    owned_indices,
    runs,
    shard,
    unshard,
)
from autopar.mesh import Mesh

MESH = Mesh(dp=2, sp=3, tp=2)
AXES = ("dp", "sp", "tp")


def numbered(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def parts(layout: Layout, whole: Tensor, mesh: Mesh = MESH) -> list[Tensor]:
    return [shard(whole, layout, mesh, mesh.coordinates(rank)) for rank in range(mesh.world_size)]


def padded(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``part`` at the size that programs work with; -1 marks padding."""
    out = torch.full(shape, -1, dtype=part.dtype)
    out[tuple(slice(0, size) for size in part.shape)] = part
    return out


# ---------------------------------------------------------------- one split


def test_plain_split() -> None:
    assert [owned_indices(6, Split(0), i, 3).tolist() for i in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_a_mirrored_split_deals_every_second_block_out_backwards() -> None:
    split = Split(0, outer=2, mirrored=True)
    assert [owned_indices(12, split, i, 3).tolist() for i in range(3)] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert str(Layout.whole([12]).place("sp", split, MESH)) == "[(2 6@sp~)]"
    assert Split.of(0, split.signed_outer, split.ratio) == split
    for odd in ({"outer": 3}, {"outer": 1}, {"outer": 2, "ratio": (2, 1)}):
        with pytest.raises(ValueError, match="even number of blocks"):
            Split(0, **odd, mirrored=True)  # type: ignore[arg-type]


def test_uneven_split_has_shorter_and_empty_last_parts() -> None:
    assert [owned_indices(5, Split(0), i, 3).tolist() for i in range(3)] == [[0, 1], [2, 3], [4]]
    assert [owned_indices(3, Split(0), i, 4).tolist() for i in range(4)] == [[0], [1], [2], []]
    assert [owned_indices(0, Split(0), i, 2).tolist() for i in range(2)] == [[], []]


def test_fused_split_takes_a_part_of_each_block() -> None:
    assert owned_indices(12, Split(0, outer=3), 1, 2).tolist() == [2, 3, 6, 7, 10, 11]


def test_ratio_split_takes_a_part_of_each_segment() -> None:
    qkv = Split(0, ratio=(4, 2, 2))  # 4 query heads, 2 key heads, 2 value heads, 1 element each
    assert owned_indices(8, qkv, 0, 2).tolist() == [0, 1, 4, 6]
    assert owned_indices(8, qkv, 1, 2).tolist() == [2, 3, 5, 7]


def test_splits_are_written_one_way() -> None:
    assert Split(0, ratio=(2, 2, 2)) == Split(0, outer=3)
    assert Split(0, outer=2, ratio=(5, 5)) == Split(0, outer=4)
    assert Split(0, ratio=(8, 4, 4)) == Split(0, ratio=(2, 1, 1))
    assert Split(0, ratio=(7,)) == Split(0)
    assert [str(s) for s in (Split(1), Split(0, 3), Split(0, ratio=(2, 1)))] == [
        "S(1)",
        "S(0,outer=3)",
        "S(0,ratio=2+1)",
    ]
    assert [str(p) for p in (INVARIANT, REPLICATED, PARTIAL, Partial("max"))] == ["I", "R", "P", "P(max)"]


def test_divides() -> None:
    assert Split(0).divides(8, 4) and not Split(0).divides(6, 4)
    assert Split(0, outer=3).divides(12, 2) and not Split(0, outer=3).divides(12, 8) and not Split(0, 5).divides(12, 2)
    assert Split(0, ratio=(4, 2, 2)).divides(16, 4) and not Split(0, ratio=(4, 2, 2)).divides(8, 4)


@pytest.mark.parametrize("split", [Split(0, outer=2), Split(0, ratio=(2, 1))])
def test_only_a_contiguous_split_may_be_uneven(split: Split) -> None:
    with pytest.raises(ValueError, match="over 2 ranks does not divide a dim of 10 elements"):
        owned_indices(10, split, 0, 2)
    with pytest.raises(ValueError, match=r"over 'tp' \(2 ways\) does not divide 10 local elements"):
        Layout.whole([10]).place("tp", split, MESH)


# ---------------------------------------------------------------- printing


def test_layouts_print_inside_types() -> None:
    layout = Layout.whole([4, 16, 32]).place("dp", Split(0), MESH).place("tp", Split(2), MESH)
    assert str(layout) == "[4@dp,16,32@tp]"
    assert str(Layout.whole([]).place("dp", PARTIAL, MESH).place("tp", Partial("max"), MESH)) == "[]{sum:dp,max:tp}"
    assert str(Layout.whole([48]).place("tp", Split(0, outer=3), MESH)) == "[(3 16@tp)]"
    assert str(Layout.whole([8]).place("tp", Split(0, ratio=(4, 2, 2)), MESH)) == "[4+2+2@tp]"
    assert str(Layout.whole([8]).place("dp", Split(0), MESH).place("tp", Split(0), MESH)) == "[8@dp@tp]"


def test_whole_placements_do_not_show() -> None:
    layout = Layout.whole([2, 3])
    assert layout.place("tp", INVARIANT, MESH) == layout.place("tp", REPLICATED, MESH) == layout
    assert layout.axes == frozenset()


# ---------------------------------------------------------------- composition


def test_dp_then_tp_then_again() -> None:
    """Each placement splits what the earlier ones left: dp halves 12, tp halves the 6, sp cuts the 3 in three."""
    layout = Layout.whole([12])
    for axis, local in (("dp", 6), ("tp", 3), ("sp", 1)):
        layout = layout.place(axis, Split(0), MESH)
        assert layout.local_shape(MESH) == (local,)
    assert str(layout) == "[12@dp@tp@sp]"
    owned = {
        (p["dp"], p["tp"], p["sp"]): int(shard(torch.arange(12), layout, MESH, p))
        for p in map(MESH.coordinates, range(12))
    }
    assert owned[1, 0, 2] == 6 + 0 + 2
    assert sorted(owned.values()) == list(range(12))


def test_the_order_of_placements_matters() -> None:
    first = Layout.whole([12]).place("dp", Split(0), MESH).place("tp", Split(0), MESH)
    second = Layout.whole([12]).place("tp", Split(0), MESH).place("dp", Split(0), MESH)
    here = {"dp": 1, "tp": 0}
    assert shard(torch.arange(12), first, MESH, here).tolist() == [6, 7, 8]
    assert shard(torch.arange(12), second, MESH, here).tolist() == [3, 4, 5]


def test_splits_of_merged_dims() -> None:
    """A (batch, sequence) pair merged to one dim: the batch by dp, then the sequence behind it by sp."""
    merged = Layout(((Factor(4, ("dp",)), Factor(6)),))
    assert str(merged.place("sp", Split(0, outer=2), MESH)) == "[(4@dp 6@sp)]"
    assert str(merged.place("tp", Split(0), MESH)) == "[(4@dp@tp 6)]"
    alone = Layout(((Factor(2, ("dp",)), Factor(6)),))  # one row a rank: what remains is the sequence
    assert str(alone.place("sp", Split(0), MESH)) == "[(2@dp 6@sp)]"
    whole = Layout(((Factor(3), Factor(4)),))
    assert str(whole.place("tp", Split(0), MESH)) == "[12@tp]"
    assert str(whole.place("sp", Split(0), MESH)) == "[(3@sp 4)]"


def test_a_split_inside_a_factor_that_is_split_already() -> None:
    layout = Layout.whole([24]).place("dp", Split(0), MESH).place("tp", Split(0, outer=3), MESH)
    assert str(layout) == "[(6@dp 4@tp)]"
    assert shard(torch.arange(24), layout, MESH, {"dp": 1, "tp": 1}).tolist() == [14, 15, 18, 19, 22, 23]


@pytest.mark.parametrize(
    ("layout", "split"),
    [
        (Layout(((Factor(3), Factor(4, ("dp",))),)), Split(0)),  # half of 3 rows
        (Layout.whole([16]).place("dp", Split(0, ratio=(4, 2, 2)), MESH), Split(0)),  # half of q, k, v together
        (Layout.whole([16]).place("dp", Split(0), MESH), Split(0, ratio=(2, 1, 1))),
        (Layout.whole([16]).place("dp", Split(0, ratio=(4, 2, 2)), MESH), Split(0, outer=2)),
        (Layout(((Factor(6), Factor(4)),)), Split(0, outer=4)),  # blocks of one and a half rows
    ],
)
def test_a_split_that_no_layout_can_say_is_refused(layout: Layout, split: Split) -> None:
    with pytest.raises(ValueError, match="no layout can say"):
        layout.place("tp", split, MESH)


def test_uneven_splits_nest_as_programs_pad_them() -> None:
    """5 over dp=2 is 3 and 2 padded to 3; 3 over tp=2 is 2 and 1: the padded row belongs to the last tp rank."""
    layout = Layout.whole([5]).place("dp", Split(0), MESH).place("tp", Split(0), MESH)
    assert layout.local_shape(MESH) == (2,)
    held = [shard(torch.arange(5), layout, MESH, {"dp": dp, "tp": tp}).tolist() for dp in (0, 1) for tp in (0, 1)]
    assert held == [[0, 1], [2], [3, 4], []]
    assert unshard(parts(layout, numbered(5)), layout, MESH).tolist() == [0, 1, 2, 3, 4]


def test_runs_of_neighbouring_indices() -> None:
    assert runs(torch.tensor([0, 1, 2, 6, 7, 5])) == [(0, 3), (6, 2), (5, 1)]
    assert runs(torch.tensor([], dtype=torch.int64)) == []


# ---------------------------------------------------------------- unshard


def test_unshard_adds_pending_sums() -> None:
    layout = Layout.whole([4]).place("dp", PARTIAL, MESH).place("tp", Split(0), MESH)
    whole = numbered(4)
    shares = [(1 + 2 * MESH.coordinates(rank)["dp"]) * part for rank, part in enumerate(parts(layout, whole))]
    assert torch.equal(unshard(shares, layout, MESH), 4 * whole)  # 1 + 3 parts of it


def test_unshard_takes_replicas_once() -> None:
    layout = Layout.whole([4]).place("tp", Split(0), MESH)
    assert torch.equal(unshard(parts(layout, numbered(4)), layout, MESH), numbered(4))


def test_unshard_of_scalars_and_bools() -> None:
    one = torch.tensor(3.0)
    assert unshard([one] * 12, Layout.whole([]), MESH) == 3
    assert unshard([one] * 12, Layout.whole([]).place("dp", PARTIAL, MESH), MESH) == 6
    layout = Layout.whole([4]).place("dp", Split(0), MESH)
    mask = torch.tensor([True, False, False, True])
    assert torch.equal(unshard(parts(layout, mask), layout, MESH), mask)


def test_unshard_drops_padding() -> None:
    layout = Layout.whole([5, 2]).place("sp", Split(0), MESH)
    full = [padded(part, layout.local_shape(MESH)) for part in parts(layout, numbered(5, 2))]
    assert torch.equal(unshard(full, layout, MESH), numbered(5, 2))


def test_shards_of_contiguous_splits_are_views() -> None:
    whole = numbered(8, 4)
    part = shard(whole, Layout.whole([8, 4]).place("dp", Split(0), MESH), MESH, {"dp": 1})
    assert part.data_ptr() == whole[4:].data_ptr()


# ---------------------------------------------------------------- properties


@st.composite
def placements(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[str, Split]]]:
    """A shape and splits of it over some axes in some order, even, as passes choose them."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12, 24, 48]), min_size=1, max_size=3)))
    layout, found = Layout.whole(shape), []
    for axis in draw(st.permutations(AXES)):
        dim = draw(st.integers(0, len(shape) - 1))
        outer = draw(st.sampled_from([1, 1, 2, 3, 4]))
        ratio = draw(st.sampled_from([(1,), (1,), (2, 1, 1), (4, 2, 2)]))
        split = Split(dim, outer, ratio, outer % 2 == 0 and ratio == (1,) and draw(st.booleans()))
        if split.divides(layout.local_shape(MESH)[dim], MESH.size(axis)):
            try:
                layout = layout.place(axis, split, MESH)
            except ValueError as error:
                assert "no layout can say" in str(error)
                continue
            found.append((axis, split))
    return shape, found


@given(placements())
@settings(max_examples=300, deadline=None)
def test_a_placement_splits_what_each_rank_held(given_: tuple[tuple[int, ...], list[tuple[str, Split]]]) -> None:
    """The definition: placing on an axis leaves each rank the part of its local dim that owned_indices says."""
    shape, steps = given_
    layout, whole = Layout.whole(shape), numbered(*shape)
    for axis, split in steps:
        placed = layout.place(axis, split, MESH)
        size = layout.local_shape(MESH)[split.dim]
        for rank in range(MESH.world_size):
            here = MESH.coordinates(rank)
            owned = owned_indices(size, split, here[axis], MESH.size(axis))
            expected = shard(whole, layout, MESH, here).index_select(split.dim, owned)
            assert torch.equal(shard(whole, placed, MESH, here), expected)
        layout = placed
    assert layout.shape == shape
    assert layout.axes == {axis for axis, _ in steps}


@given(placements(), st.sets(st.sampled_from(AXES)))
@settings(max_examples=200, deadline=None)
def test_shard_and_unshard_are_inverse(given_: Any, pending: set[str]) -> None:
    shape, steps = given_
    layout, whole = Layout.whole(shape), numbered(*shape)
    for axis, split in steps:
        layout = layout.place(axis, split, MESH)
    for axis in sorted(pending - layout.axes):
        layout = layout.place(axis, PARTIAL, MESH)
    held = parts(layout, whole)
    assert {tuple(part.shape) for part in held} == {layout.local_shape(MESH)}
    shares = math.prod(MESH.size(axis) for axis, _ in layout.partial)
    assert torch.equal(unshard(held, layout, MESH), shares * whole)


@given(placements())
@settings(max_examples=200, deadline=None)
def test_placement_is_the_inverse_of_place(given_: Any) -> None:
    shape, steps = given_
    layout = Layout.whole(shape)
    assert layout.placement("tp", MESH) == INVARIANT
    assert layout.place("tp", Partial("max"), MESH).placement("tp", MESH) == Partial("max")
    for axis, split in steps:
        placed = layout.place(axis, split, MESH)
        assert layout.place(axis, placed.placement(axis, MESH), MESH) == placed
        layout = placed


@given(st.lists(st.integers(0, 13), min_size=1, max_size=2), st.permutations(AXES), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_uneven_contiguous_splits(shape: list[int], axes: list[str], count: int) -> None:
    """Ranks work on padded parts; shard gives what is not padding, and unshard joins it again."""
    layout, whole = Layout.whole(shape), numbered(*shape)
    local = [whole] * MESH.world_size
    for i, axis in enumerate(axes[:count]):
        dim = i % len(shape)
        layout = layout.place(axis, Split(dim), MESH)
        size = layout.local_shape(MESH)[dim]
        for rank, part in enumerate(local):
            room = list(part.shape)
            room[dim] = size * MESH.size(axis)
            local[rank] = padded(part, tuple(room)).narrow(dim, size * MESH.coordinates(rank)[axis], size)
    held = parts(layout, whole)
    for part, worked_on in zip(held, local):
        assert tuple(worked_on.shape) == layout.local_shape(MESH)
        assert torch.equal(padded(part, tuple(worked_on.shape)), worked_on)
    assert torch.equal(unshard(local, layout, MESH), whole)


@given(placements(), st.sets(st.sampled_from(AXES)))
@settings(max_examples=200, deadline=None)
def test_layouts_read_back(given_: Any, pending: set[str]) -> None:
    shape, steps = given_
    layout = Layout.whole(shape)
    for axis, split in steps:
        layout = layout.place(axis, split, MESH)
    for axis in sorted(pending - layout.axes):
        layout = layout.place(axis, Partial("max" if axis == "sp" else "sum"), MESH)
    cursor = Cursor(1, str(layout))
    assert take_layout(cursor, MESH) == layout and not cursor.more()


def test_what_a_layout_knows_of_itself_stays_in_the_process() -> None:
    """Hashes of names differ from process to process; and programs are kept on disk."""
    mesh = Mesh(dp=2, tp=2)
    layout = Layout.whole((8, 4)).place("dp", Split(0), mesh)
    fresh = pickle.dumps(layout)
    assert (hash(layout), layout.local_shape(mesh), layout.shape, layout.groups)[1:] == ((4, 4), (8, 4), ("dp",))
    assert layout.local_shape(Mesh(dp=4)) == (2, 4)
    assert pickle.dumps(layout) == fresh and pickle.loads(fresh) == layout
    assert hash(pickle.loads(fresh)) == hash(layout)
