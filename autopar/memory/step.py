"""The bytes of one rank in a training step of a program without a pipeline, as the simulator runs it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from autopar.autodiff.hoist import Gathering, without_gathers, without_reductions
from autopar.ir.node import Node, value
from autopar.ir.program import Program
from autopar.ir.tables import Input, InputKind
from autopar.memory.account import (
    ACTIVATIONS,
    BUFFERS,
    GATHERED,
    GRADIENTS,
    INPUTS,
    PARAMETERS,
    WORKING,
    Account,
)
from autopar.memory.shapes import Form, Held
from autopar.memory.tape import Tapes
from autopar.mesh import REPLICA_AXES

KIND_OF = {
    InputKind.PARAMETER: PARAMETERS,
    InputKind.BUFFER: BUFFERS,
    InputKind.CONSTANT: BUFFERS,
    InputKind.RECEIVED: ACTIVATIONS,
}


def flat_step(program: Program, tapes: Tapes, account: Account) -> None:
    """Play forward and backward of a differentiated program, or inference where it has no backward graph.

    With ``Plan(microbatches=...)`` the program is that of one of them, and gradients are added up before they are
    reduced (:mod:`autopar.runtime.accumulate`).
    """
    role = program.required_role
    inputs = [placed(account, program, node, entry) for node, entry in program.placeholders(*InputKind)]
    graph = role.inference if role.backward is None else role.forward
    account.phase = "gather"
    graph, inputs = gathered_once(program, graph, tapes, account, inputs)
    account.hold(one.storage for one in inputs)
    if role.backward is None:
        account.phase = "inference"
        tapes.run(graph, account, inputs, ACTIVATIONS)
        account.mark()
        return
    first = _not_parameters(program, role.grads)
    if program.plan.microbatches == 1:
        tapes.run(role.backward, account, forward_of(program, graph, tapes, account, inputs), WORKING, first)
        account.mark()
        return
    cut = without_reductions(role.backward, REPLICA_AXES if program.plan.zero < 2 else ())
    sums: list[Held] = []
    for _ in range(2):  # the second is as all that follow: it runs beside the sums of those before it
        given = forward_of(program, graph, tapes, account, inputs)
        found = tapes.run(cut.rest, account, given, WORKING, first)
        account.mark()
        if sums:
            account.release(one.storage for one in found)  # added to the sums, in place
        else:
            sums = [fresh(account, one.form, GRADIENTS) for one in found]
            account.hold(one.storage for one in sums)
            account.release(one.storage for one in found)
    account.phase = "reduce"
    account.release(one.storage for one in sums)
    tapes.run(cut.graph, account, sums, GRADIENTS, 0)
    account.mark()


def forward_of(program: Program, graph: fx.Graph, tapes: Tapes, account: Account, inputs: list[Held]) -> list[Held]:
    """Play forward; gives the operands of the backward graph, which holds them from then on."""
    account.phase = "forward"
    found = tapes.run(graph, account, inputs, ACTIVATIONS)
    account.mark()
    outputs, saved = found[: len(program.outputs)], found[len(program.outputs) :]
    account.release(one.storage for one in saved)
    account.phase = "backward"
    tangents = [fresh(account, outputs[place].form, INPUTS) for place in program.required_role.differentiable]
    if program.plan.microbatches > 1:  # train_step drops what a microbatch returns
        account.release(one.storage for one in outputs)
    return [*saved, *tangents]


def fresh(account: Account, form: Form, kind: int) -> Held:
    """A new tensor of the shape and dtype of ``form``."""
    plain = Form.contiguous(form.shape, form.dtype)
    return Held(plain, account.new((kind, plain.bytes)))


def placed(account: Account, program: Program, node: Node, entry: Input) -> Held:
    """What a placeholder takes."""
    kind = value(node)
    form = Form.contiguous(kind.layout.local_shape(program.mesh), kind.dtype)
    return fresh(account, form, KIND_OF.get(entry.kind, INPUTS))


def _not_parameters(program: Program, grads: Sequence[str]) -> int:
    """How many gradients come before those of parameters."""
    parameters = {entry.target for _, entry in program.placeholders(InputKind.PARAMETER)}
    return next((place for place, name in enumerate(grads) if name in parameters), len(grads))


def gathering_of(program: Program, graph: fx.Graph) -> Gathering | None:
    """The work on parameters that is done before all batches (``Plan(zero=1)`` and ``2``)."""
    if program.plan.zero not in (1, 2):
        return None
    return without_gathers(graph, {node.name for node, _ in program.placeholders(InputKind.PARAMETER)})


def gathered_once(
    program: Program, graph: fx.Graph, tapes: Tapes, account: Account, inputs: list[Held]
) -> tuple[fx.Graph, list[Held]]:
    """As :func:`autopar.simulator.parts.gathered_once`: parts become memory of the whole parameters."""
    found = gathering_of(program, graph)
    if found is None:
        return graph, inputs
    places = {node.name: place for place, node in enumerate(_placeholders(graph))}
    whole = tapes.run(found.graph, account, [inputs[places[name]] for name in found.parameters], GATHERED)
    account.release(one.storage for one in whole)  # counted with the inputs
    for number, (owner, full) in enumerate(zip(found.owners, whole)):
        if owner is None:
            continue
        name, axis = owner
        part = inputs[places[name]]
        if part.form.shape[0] * program.mesh.size(axis) == full.form.shape[0]:
            rest = full.form.bytes - part.form.bytes
            whole[number] = Held(full.form, account.new((GATHERED, rest), (PARAMETERS, part.form.bytes)))
            inputs[places[name]] = Held(part.form, whole[number].storage)
    return found.rest, [*inputs, *whole]


def _placeholders(graph: fx.Graph) -> Iterable[Node]:
    return (node for node in graph.nodes if node.op == "placeholder")
