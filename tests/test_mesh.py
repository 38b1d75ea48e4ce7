"""Meshes: order and names of axes, ranks, groups, and what users get wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.mesh import AXIS_ORDER, Mesh, axes_of, inner, outer, overlap

PLAIN_AXES = ("pp", "dp", "ep", "sp", "tp")
meshes = st.dictionaries(st.sampled_from(PLAIN_AXES), st.integers(1, 4), max_size=4).map(lambda sizes: Mesh(**sizes))


def test_axes_are_outermost_first_whatever_the_order_they_are_given_in() -> None:
    mesh = Mesh(tp=2, dp=3, pp=4)
    assert mesh.names == ("pp", "dp", "tp")
    assert str(mesh) == repr(mesh) == "mesh(pp=4 dp=3 tp=2)"
    assert mesh == Mesh(pp=4, dp=3, tp=2)
    assert hash(mesh) == hash(Mesh(pp=4, dp=3, tp=2))
    assert mesh != Mesh(pp=4, dp=3, tp=1)


def test_the_last_axis_varies_fastest() -> None:
    mesh = Mesh(dp=2, tp=3)
    assert [mesh.coordinates(rank) for rank in (0, 1, 3)] == [
        {"dp": 0, "tp": 0},
        {"dp": 0, "tp": 1},
        {"dp": 1, "tp": 0},
    ]
    assert mesh.group(4, "tp") == (3, 4, 5)
    assert mesh.group(4, "dp") == (1, 4)
    assert list(mesh.groups("dp")) == [(0, 3), (1, 4), (2, 5)]


def test_an_axis_that_the_mesh_lacks_has_size_one() -> None:
    mesh = Mesh(dp=2)
    assert mesh.size("tp") == 1
    assert mesh.group(1, "tp") == (1,)
    assert list(mesh.groups("tp")) == [(0,), (1,)]
    assert mesh.rank({"dp": 1, "tp": 0}) == 1


def test_the_mesh_without_axes_is_one_rank() -> None:
    assert Mesh().world_size == 1
    assert Mesh().coordinates(0) == {}
    assert Mesh.parse("") == Mesh()
    assert list(Mesh().groups("tp")) == [(0,)]


@given(meshes)
def test_coordinates_and_rank_are_inverse(mesh: Mesh) -> None:
    found = [mesh.coordinates(rank) for rank in range(mesh.world_size)]
    assert [mesh.rank(coordinates) for coordinates in found] == list(range(mesh.world_size))
    assert all(tuple(coordinates) == mesh.names for coordinates in found)


@given(meshes, st.sampled_from(PLAIN_AXES))
def test_groups_hold_every_rank_once_and_agree_with_group(mesh: Mesh, axis: str) -> None:
    groups = list(mesh.groups(axis))
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
    for group in groups:
        assert len(group) == mesh.size(axis)
        assert all(mesh.group(rank, axis) == group for rank in group)
        assert [mesh.coordinates(rank).get(axis, 0) for rank in group] == list(range(mesh.size(axis)))


# ---------------------------------------------------------------- groups over several axes, and over a part of one


@st.composite
def groups(draw: st.DrawFn) -> tuple[Mesh, str]:
    """A mesh and the name of groups on it, not always in normal form."""
    mesh = Mesh(**{axis: draw(st.sampled_from((1, 2, 3, 4, 6))) for axis in PLAIN_AXES[:3]})
    parts = []
    for axis in draw(st.lists(st.sampled_from(mesh.names), min_size=1, unique=True)):
        ranks = draw(st.sampled_from([size for size in range(1, 7) if mesh.size(axis) % size == 0]))
        parts.append(draw(st.sampled_from((axis, inner(axis, ranks), outer(axis, ranks)))))
    return mesh, "+".join(sorted(parts, key=lambda part: AXIS_ORDER.index(axes_of(part)[0])))


@given(groups())
def test_groups_of_any_name_hold_every_rank_once_in_the_order_of_their_positions(given_: tuple[Mesh, str]) -> None:
    mesh, name = given_
    found = list(mesh.groups(name))
    assert sorted(rank for group in found for rank in group) == list(range(mesh.world_size))
    for group in found:
        assert len(group) == mesh.size(name) and list(group) == sorted(group)
        assert [mesh.position(name, mesh.coordinates(rank)) for rank in group] == list(range(len(group)))
        assert all(mesh.group(rank, name) == group for rank in group)
        stays = [[mesh.coordinates(rank)[axis] for axis in mesh.names if axis not in axes_of(name)] for rank in group]
        assert all(place == stays[0] for place in stays), "other axes stay the same"


@given(groups())
def test_the_normal_form_names_the_same_groups(given_: tuple[Mesh, str]) -> None:
    mesh, name = given_
    normal = mesh.merged([name])
    assert set(mesh.groups(normal)) == set(mesh.groups(name)) and mesh.merged([normal]) == normal
    assert mesh.merged(reversed(name.split("+"))) == normal or mesh.size(name) == 1
    assert mesh.size(name) == 1 or all(mesh.size(part) > 1 for part in normal.split("+"))


@pytest.mark.parametrize(("axis", "ranks"), [("sp", 1), ("sp", 2), ("sp", 3), ("sp", 6), ("dp", 2)])
def test_neighbours_and_the_ranks_at_their_distance_make_up_the_axis(axis: str, ranks: int) -> None:
    mesh = Mesh(dp=4, sp=6, tp=2)
    near, far = inner(axis, ranks), outer(axis, mesh.size(axis) // ranks)
    for group in mesh.groups(axis):
        on_axis = [mesh.coordinates(rank)[axis] for rank in mesh.group(group[0], near)]
        assert on_axis == list(range(ranks)), "neighbours"
        places = [(mesh.position(far, here), mesh.position(near, here)) for here in map(mesh.coordinates, group)]
        assert places == [divmod(place, ranks) for place in range(len(group))]
    assert not overlap(near, far) and overlap(near, axis) and not overlap(axis, "tp")


def test_zero_splits_over_all_data_like_axes_that_do_not_split_a_parameter_already() -> None:
    mesh = Mesh(pp=2, dp=2, ep=3, sp=4, tp=2)
    assert mesh.shard_axis() == "dp+ep+sp" and mesh.shard_axis(taken={"tp"}) == "dp+ep+sp"
    assert mesh.shard_axis(taken={"ep", "tp"}) == "dp+sp" and mesh.shard_axis(taken={"ep", "sp"}) == "dp"
    assert Mesh(ep=2).shard_axis(taken={"ep"}) is None and Mesh(dp=1, tp=2).shard_axis() is None
    assert Mesh(dp_replicate=2, dp_shard=2, ep=2).shard_axis() == "dp_shard+ep"


def test_merged_names() -> None:
    mesh = Mesh(dp=2, sp=1, tp=3)
    assert mesh.merged(["tp", "dp"]) == "dp+tp" and mesh.size("dp+tp") == 6
    assert mesh.merged(["dp", "sp"]) == mesh.merged(["dp+sp"]) == "dp" and mesh.merged(["sp", "ep"]) == "sp"
    assert mesh.group(4, "dp+tp") == tuple(range(6)) and mesh.group(4, "dp+sp") == (1, 4)
    assert Mesh(dp=2, sp=2, tp=2).group(1, "dp+sp") == (1, 3, 5, 7)
    assert Mesh(sp=8).merged([outer("sp", 8)]) == "sp" and Mesh(sp=8).group(3, "sp:outer4") == (1, 3, 5, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sp+dp", r"'sp\+dp': the axes of a group stand in mesh order, each once: dp\+sp"),
        ("dp+dp", "each once: dp$"),
        ("sp:inner2+sp:outer2", "each once: sp$"),
        ("dp+xy", "over an axis 'xy' that there is not\nWay out: one of pp, dp"),
        ("xy", "over an axis 'xy' that there is not"),
        ("dp+", "'' in 'dp\\+' is neither an axis nor a part of one"),
        ("sp:half2", "'sp:half2' in 'sp:half2' is neither"),
        ("sp:inner3", r"'sp:inner3' on mesh\(dp=2 sp=4\): groups of 3 do not divide sp=4"),
        ("dp+sp:outer0", "groups of 0 do not divide"),
        ("tp:inner2", "groups of 2 do not divide tp=1"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mesh(dp=2, sp=4).size(name)
    with pytest.raises(ValueError, match="is over an axis 'xy'"):
        Mesh(dp=2).merged(["dp", "xy"])


@given(meshes)
def test_text_reads_back(mesh: Mesh) -> None:
    inner = str(mesh).removeprefix("mesh(").removesuffix(")")
    assert Mesh.parse(inner) == mesh
    assert Mesh.parse(inner.replace(" ", ",")) == mesh


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp", "'dp' is not of the form axis=size"),
        ("dp=", "'dp=' is not of the form"),
        ("dp=-2", "not of the form"),
        ("dp=2.5", "not of the form"),
        ("dp=two", "not of the form"),
        ("dp = 2", "not of the form"),
        ("dp=2,dp=2", "axis 'dp' is given twice"),
        ("dp=2,xy=2", "mesh axis 'xy' is unknown\nWay out: one of pp, dp"),
        ("dp=0", "at least 1"),
        ("cp=2,sp=2", "'cp' and 'sp' are the same axis"),
        ("dp=2,dp_shard=2", "either dp, or dp_replicate and dp_shard"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mesh.parse(text)


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True, None])
def test_bad_sizes(size: object) -> None:
    with pytest.raises(ValueError, match="a size is a whole number, at least 1"):
        Mesh(dp=size)  # type: ignore[arg-type]


def test_cp_is_sp() -> None:
    assert Mesh(cp=2) == Mesh(sp=2)
    assert Mesh.parse("cp=2,tp=2").names == ("sp", "tp")


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_off_the_mesh(rank: int) -> None:
    with pytest.raises(ValueError, match=r"is not on mesh\(dp=2 tp=2\), which has ranks 0 to 3"):
        Mesh(dp=2, tp=2).coordinates(rank)


@pytest.mark.parametrize("coordinates", [{"dp": 2}, {"tp": -1}, {"pp": 1}])
def test_coordinates_off_the_mesh(coordinates: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"is not on mesh\(dp=2 tp=2\)"):
        Mesh(dp=2, tp=2).rank(coordinates)


def device_mesh(names: tuple[str, ...] | None, shape: tuple[int, ...]) -> SimpleNamespace:
    """What Mesh reads of a torch DeviceMesh, which needs a process group to exist."""
    return SimpleNamespace(mesh_dim_names=names, shape=shape)


def test_from_device_mesh() -> None:
    assert Mesh.from_device_mesh(device_mesh(("dp", "tp"), (2, 4))) == Mesh(dp=2, tp=4)
    assert Mesh.from_device_mesh(device_mesh(("dp_replicate", "dp_shard", "cp"), (2, 3, 4))) == Mesh(
        dp_replicate=2, dp_shard=3, sp=4
    )


def test_from_a_device_mesh_without_names() -> None:
    with pytest.raises(ValueError, match="has no mesh_dim_names"):
        Mesh.from_device_mesh(device_mesh(None, (2,)))


def test_from_a_device_mesh_in_another_order() -> None:
    with pytest.raises(ValueError, match=r"\('tp', 'dp'\) are not in the order"):
        Mesh.from_device_mesh(device_mesh(("tp", "dp"), (2, 2)))


def test_every_axis_has_a_place() -> None:
    assert Mesh(**{name: 1 for name in AXIS_ORDER if name != "dp"}).names == tuple(n for n in AXIS_ORDER if n != "dp")


# ---------------------------------------------------------------- nodes


def test_groups_within_nodes_and_across() -> None:
    """64 ranks, tensor parallelism within a node, pipelines across: the figure of Narayanan et al. 2021, section 3."""
    mesh = Mesh(pp=4, dp=4, tp=4, node_size=8)
    assert [mesh.group(0, axis) for axis in mesh.names] == [(0, 16, 32, 48), (0, 4, 8, 12), (0, 1, 2, 3)]
    assert [mesh.nodes(axis) for axis in mesh.names] == [4, 2, 1]
    lines = mesh.describe().splitlines()
    assert lines[0] == "mesh(pp=4 dp=4 tp=4): 64 ranks on 8 nodes of 8" and lines[2].split() == [
        *("pp", "4", "16", "0", "16", "32", "48", "4")
    ]
    assert mesh == Mesh(pp=4, dp=4, tp=4) == Mesh.parse("pp=4,dp=4,tp=4,node_size=8")
    assert hash(mesh) == hash(Mesh(pp=4, dp=4, tp=4)) and Mesh(tp=4).nodes("tp") == 1


@pytest.mark.parametrize("sizes, nodes", [({"tp": 16}, 2), ({"dp": 2, "tp": 8}, 2), ({"dp": 8, "tp": 3}, 2)])
def test_tensor_parallelism_across_nodes(sizes: dict[str, int], nodes: int) -> None:
    with pytest.warns(
        UserWarning, match=f"goes from node to node \\({nodes} nodes of {4 if 'dp' in sizes else 8}\\)"
    ) as said:
        assert Mesh(**sizes, node_size=4 if "dp" in sizes else 8).nodes("tp") == nodes
    assert "mesh(" in str(said[0].message) and len(str(said[0].message).splitlines()) < 15


@pytest.mark.parametrize("node_size", [0, -8, 2.0, True, "8"])
def test_sizes_that_no_node_has(node_size: Any) -> None:
    with pytest.raises(ValueError, match="node_size"):
        Mesh(dp=2, node_size=node_size)


def test_nodes_that_the_ranks_do_not_fill() -> None:
    with pytest.raises(ValueError, match="6 ranks, which nodes of 4 do not divide"):
        Mesh(pp=3, tp=2, node_size=4)
    part = Mesh(tp=2, node_size=8)
    assert part.nodes("tp") == 1 and part.describe().startswith("mesh(tp=2): 2 ranks on 1 nodes of 8\n")
