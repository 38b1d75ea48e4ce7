"""The manifest's description of a part: its inputs and outputs, in order, and who sends them to whom."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from autopar.exporters.dynamic_sizes import DynamicSizes
from autopar.exporters.rank_module import Part, plain_name
from autopar.exporters.traced import Traced
from autopar.ir.node import Node, value
from autopar.ir.program import PipelinedProgram
from autopar.ir.tables import Input, InputKind, Output, OutputKind
from autopar.mesh import PIPELINE


def describe_part(part: Part, role: Traced, file: str, sizes: DynamicSizes | None = None) -> dict[str, Any]:
    """``tensors``: the shapes of one rank; a layout and the whole shape say what part of the whole that is.

    With ``sizes`` of a family the sizes that change are texts, ``"b/2"``.
    """

    def entry_of(direction: str, entry: Input | Output, node: Node) -> dict[str, Any]:
        found = _entry(part, direction, entry, node)
        if sizes is not None:
            found |= {key: [sizes.words(size) for size in found[key]] for key in ("shape", "whole_shape")}
        return found

    results = zip(role.outputs, part.program.returned)
    return {
        "file": file,
        "rank": part.rank,
        **({} if part.stage is None else {"stage": part.stage}),
        "coordinates": part.whole.mesh.coordinates(part.rank),
        "inputs": [{"name": input_name(entry), **entry_of("from", entry, node)} for node, entry in role.inputs],
        "outputs": [{"name": output_name(entry), **entry_of("to", entry, node)} for entry, node in results],
    }


def describe_backward(part: Part, file: str) -> dict[str, Any]:
    """The backward graph of a stage: what it takes, saved values and gradients of outputs, and what it returns.

    The gradient of a value that was sent comes from where it was sent to, that of a received one goes back.
    """
    program, role = part.program, part.program.required_role
    received = {entry.target: entry for entry in program.inputs if entry.kind is InputKind.RECEIVED}
    taken: list[dict[str, Any]] = [{"kind": "saved", "number": number} for number in range(role.saved)]
    for position in role.differentiable:
        entry = program.outputs[position]
        taken.append({"kind": "grad", "of": output_name(entry), **_peer(part, "from", entry)})
    returned: list[dict[str, Any]] = []
    for target in role.grads:
        if target in received:
            returned.append({"kind": "grad", "of": input_name(received[target]), **_peer(part, "to", received[target])})
        else:
            returned.append({"kind": "gradient", "name": target})
    return {"file": file, "inputs": taken, "outputs": returned}


def input_name(entry: Input) -> str:
    """Of a user's input its own; ``recv_0_add_8`` of what stage 0 sends."""
    return plain_name(entry.target) if entry.kind is not InputKind.RECEIVED else f"recv_{plain_name(entry.target)}"


def output_name(entry: Output) -> str:
    prefix = {OutputKind.USER: "", OutputKind.SENT: "send_", OutputKind.BUFFER_UPDATE: "update_"}[entry.kind]
    return prefix + (plain_name(entry.target) or "output")


def message_of(entry: Input | Output) -> tuple[int, str] | None:
    """(the other stage, the name of the value) of what stages send each other."""
    if entry.kind not in (InputKind.RECEIVED, OutputKind.SENT):
        return None
    stage, _, name = entry.target.partition(".")
    return int(stage), name


def rank_of_stage(part: Part, stage: int) -> int:
    """The rank of the same position within ``stage``."""
    assert isinstance(part.whole, PipelinedProgram)
    place = part.whole.required_schedule.placement[stage]
    return part.whole.mesh.rank({**part.whole.mesh.coordinates(part.rank), PIPELINE: place})


def _entry(part: Part, direction: str, entry: Input | Output, node: Node) -> dict[str, Any]:
    """Kind, type, and of a message its other end."""
    kind = value(node)
    return {
        "kind": entry.kind.value,
        **_peer(part, direction, entry),
        "shape": list(kind.layout.local_shape(part.mesh)),
        "dtype": str(kind.dtype).removeprefix("torch."),
        "whole_shape": list(kind.shape),
        "layout": str(kind.layout),
    }


def _peer(part: Part, direction: str, entry: Input | Output) -> dict[str, Any]:
    """The other end of a message, and the value's name in the stage that makes it, by which both ends know it."""
    message = message_of(entry)
    if message is None:
        return {}
    stage, name = message
    return {f"{direction}_stage": stage, f"{direction}_rank": rank_of_stage(part, stage), "value": name}


def groups_of(part: Part, names: Iterable[str]) -> dict[str, list[int]]:
    """The ranks, in order, of each named group that the part's rank is in."""
    return {name: list(part.whole.mesh.group(part.rank, name)) for name in sorted(set(names))}
