"""Meshes: order and names of axes, ranks, groups, and what users get wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.mesh import AXIS_ORDER, Mesh

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
        ("dp=2,xy=2", "mesh axis 'xy' is unknown; the axes are pp, dp"),
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
    with pytest.raises(ValueError, match="a size is a whole number of at least 1"):
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
