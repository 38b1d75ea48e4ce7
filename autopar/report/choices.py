"""The plan in words, and the axes of the mesh with their groups."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Iterator

from docstring_parser import DocstringStyle, parse

from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.report.document import Axis, Choice

MOST_GROUPS = 64
ABOUT = {
    "pp": "each of its ranks runs other stages of the model",
    "dp_replicate": "each of its ranks gets other rows of the batch, and has all that its group has",
    "dp_shard": "each of its ranks gets other rows of the batch; ZeRO splits parameters or states over them",
    "dp": "each of its ranks gets other rows of the batch",
    "ep": "each of its ranks has other experts, and gets other rows of the batch",
    "sp": "each of its ranks has another part of the sequence",
    "tp": "each of its ranks has a part of each layer's weights",
}


def choices_of(plan: Plan) -> Iterator[Choice]:
    """All fields of the plan, those that were chosen first."""
    described = {
        one.arg_name: one.description for one in parse(inspect.getdoc(Plan) or "", DocstringStyle.GOOGLE).params
    }
    now, usual = plan.to_json(), Plan().to_json()
    for name in sorted(now, key=lambda name: now[name] == usual[name]):
        about = " ".join((described.get(name) or "").replace("``", "").split())
        yield Choice(name, _text(now[name]), _text(usual[name]), about)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def axes_of_mesh(mesh: Mesh) -> tuple[Axis, ...]:
    """In the order in which ranks are numbered, outermost first."""
    return tuple(
        Axis(
            name, size, ABOUT.get(name, ""), mesh.world_size // size,
            tuple(itertools.islice(mesh.groups(name), MOST_GROUPS)),
        )
        for name, size in mesh.axes
    )  # fmt: skip
