"""One batch in several parts that run one after the other: how it is cut, and what each part counts for.

A mean over all tokens is no mean of means where parts have unequally many: part i counts for its share of the tokens,
count_i / (count_1 + ... + count_m), which is known before any backward pass, since counts depend on labels alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autopar import comm
from autopar.calls import Call, batch_dims, data_ways
from autopar.errors import IndivisibleError, InvariantError
from autopar.mesh import Mesh
from autopar.partition import extract, live_nodes
from autopar.plan import Plan
from autopar.program import InputKind, Node, Program, output_node

aten = torch.ops.aten
PASSING = (aten._to_copy.default, comm.OPS.wait.default)
REDUCING = (comm.OPS.all_reduce.default, comm.OPS.start_all_reduce.default)
SCALING = (aten.div.Scalar, aten.mul.Scalar, aten.neg.default)
MEANS = (aten.mean.default, aten.mean.dim)


def parts(call: Call, mesh: Mesh, plan: Plan) -> list[dict[str, Any]]:
    """The keyword arguments of each of ``plan.microbatches`` calls: equal numbers of neighbouring rows.

    Raises IndivisibleError where the rows do not divide, InvariantError for arguments without names.
    """
    count = plan.microbatches
    if call.args or any(not isinstance(value, Tensor | int | float | str | None) for value in call.kwargs.values()):
        raise InvariantError("Plan(microbatches=...) cuts tensors that are passed by name: model.train_step(x=x, y=y)")
    tensors = {name: value for name, value in call.kwargs.items() if isinstance(value, Tensor)}
    cut: dict[str, tuple[Tensor, ...]] = {}
    ways = count * (1 if plan.inputs == "local" else data_ways(mesh))
    dims = batch_dims([(name, tensor.shape) for name, tensor in tensors.items()], plan.batch_dims)
    for (name, tensor), dim in zip(tensors.items(), dims):
        if dim is None:
            continue
        if tensor.shape[dim] % ways:
            raise IndivisibleError(
                f"input '{name}' has {tensor.shape[dim]} rows, which {count} microbatches on {mesh} do not divide\n"
                f"Way out: a batch size that is a multiple of {ways}, or another Plan(microbatches=...)."
            )
        cut[name] = tensor.chunk(count, dim)
    return [{**call.kwargs, **{name: pieces[i] for name, pieces in cut.items()}} for i in range(count)]


def counting(program: Program) -> fx.Graph | None:
    """The graph (inputs of the program) -> (the count that the loss is divided by); None where the loss is a mean of
    equally many elements in each part.

    Raises InvariantError for a loss that is neither: parts of it cannot be weighed.
    """
    (role,) = program.roles
    returned = output_node(role.forward).args[0]
    assert isinstance(returned, (tuple, list)) and program.loss is not None
    node = _behind(returned[program.loss], (*PASSING,))
    if node.target is aten.div.Tensor and isinstance(node.args[1], fx.Node):
        count = node.args[1]
        learned = {found.name for found, _ in program.placeholders(InputKind.PARAMETER)}
        if not any(source.name in learned for source in live_nodes([count])):
            inputs = [source for source in role.forward.nodes if source.op == "placeholder"]
            return extract(role.forward, inputs, [count])
    if _behind(node, (*PASSING, *REDUCING, *SCALING)).target in MEANS:
        return None
    raise InvariantError(
        f"the loss ends in {node.target}, not in a mean: what each of several microbatches counts for is not known\n"
        "Way out: a loss that is one mean over tokens or rows; or cut the batch yourself, weigh each loss, and call "
        "backward within model.no_sync() for all but the last."
    )


def _behind(node: Any, passing: tuple[Any, ...]) -> Node:
    assert isinstance(node, fx.Node)
    found: Node = node
    while found.target in passing:
        found = found.all_input_nodes[0]
    return found
