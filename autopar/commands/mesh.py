"""``autopar mesh``: the groups of a mesh, and which of them go from node to node."""

from __future__ import annotations

from typing import Annotated

import typer

from autopar.commands.options import Json, read_mesh
from autopar.commands.tables import print_json, stdout, table
from autopar.mesh import Mesh

AxesText = Annotated[str, typer.Argument(metavar="AXES", help="axes and sizes, e.g. pp=4,dp=4,tp=4")]


def mesh_command(
    axes: AxesText,
    node_size: Annotated[int | None, typer.Option(help="ranks of one node, e.g. 8")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="the groups of this rank")] = None,
    every: Annotated[bool, typer.Option("--all", help="every group of every axis")] = False,
    as_json: Json = False,
) -> None:
    """Print the groups of the mesh AXES: ranks that communicate with each other, an axis at a time.

    With --node-size also how many nodes a group lies in; tp should lie in one.
    """
    mesh = read_mesh(axes if node_size is None else f"{axes},node_size={node_size}")
    if as_json:
        print_json(_document(mesh, rank))
    elif rank is not None:
        rows = [(axis, str(place), _ranks(mesh.group(rank, axis))) for axis, place in mesh.coordinates(rank).items()]
        stdout().print(table(f"rank {rank} of {mesh}", ("axis", "position", "its group"), rows))
    else:
        print(mesh.describe())
        for axis in mesh.names if every else ():
            print(f"\n{axis}", *map(_ranks, mesh.groups(axis)), sep="\n  ")


def _ranks(group: tuple[int, ...]) -> str:
    return " ".join(map(str, group))


def _document(mesh: Mesh, rank: int | None) -> dict[str, object]:
    groups = {
        axis: [list(group) for group in mesh.groups(axis) if rank is None or rank in group] for axis in mesh.names
    }
    nodes = {axis: mesh.nodes(axis) for axis in mesh.names} if mesh.node_size else None
    return {
        "mesh": dict(mesh.axes),
        "ranks": mesh.world_size,
        "node_size": mesh.node_size,
        "groups": groups,
        "nodes_of_a_group": nodes,
    }
