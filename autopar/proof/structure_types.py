"""Each operator gives what its node says: local sizes and dtypes, found by running it on tensors without data.

A cast that is lost, an argument with the whole size where the local one belongs, a slice of another length: each makes
some node other than it says, or fail.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.ir import collectives as comm
from autopar.ir.node import Node, origin, value, values
from autopar.ir.operator_facts import only_moves, runnable
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.proof.refusal import Layer, Refusal
from autopar.proof.varying import results_of
from autopar.simulator.lockstep import FAILURES

aten = torch.ops.aten

NO_KERNEL = "lines whose operator does not run without data"
CAUSE = "an argument, or a cast, is not the one that this layout needs"
Type = tuple[tuple[int, ...], torch.dtype]


Verdict = tuple[tuple[Type | None, ...], str]  # what an operator gives, None for no tensor; or why it fails


class Types:
    """The types that operators give for operands of given types; each is found once, since blocks repeat.

    ``seen``: the lines that were looked at; ``unknown``: those that do not run without data, or on sizes that are known
    at run time only (rows sent to experts), by which it is.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Verdict] = {}
        self.seen = 0
        self.unknown: Counter[str] = Counter()

    def check(self, graph: fx.Graph, mesh: Mesh, where: str) -> Iterator[Refusal]:
        """Refuse nodes of a role's graph whose operator gives other sizes or dtypes than they say."""
        local = {node: _types(node, mesh) for node in graph.nodes}
        for node in graph.nodes:
            if node.op != "call_function" or node.target in comm.TARGETS or not values(node):
                continue
            if any(not values(source) for source in node.all_input_nodes):
                continue
            ragged = any(is_ragged(source) for source in (node, *node.all_input_nodes))
            wanted = local[node]
            every, problem = self._given(node, local)
            found = tuple([kind for kind in every if kind is not None])
            if problem == NO_KERNEL or (ragged and problem):
                self.unknown["lines of sizes that are known at run time only" if ragged else NO_KERNEL] += 1
                continue
            self.seen += 1
            if ragged:
                wanted, found = _whole_dims(node, wanted), _whole_dims(node, found)
            if problem:
                shapes = [list(shape) for source in node.all_input_nodes for shape, _ in local[source]]
                yield _refused(node, where, f"{node.target} fails on local sizes {shapes}: {problem}")
            elif found and found[: len(wanted)] != wanted:
                yield _refused(node, where, f"{node.target} gives {_words(found)}, the node says {_words(wanted)}")

    def _given(self, node: Node, local: Mapping[Node, tuple[Type, ...]]) -> Verdict:
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, Node) and source.op == "call_function" and source.target is not operator.getitem:
            every, _ = self._given(source, local) if source.target not in comm.TARGETS else ((), "")
            place: Any = node.args[1]  # gradients that nobody asked a convolution for are no tensors
            return every[place : place + 1], ""
        key = node.target, repr(fx.map_arg((node.args, node.kwargs), lambda source: local[source]))  # type: ignore[arg-type, return-value]
        if key not in self._known:
            self._known[key] = _run(node, local)
        return self._known[key]


def check_gradients(program: Program) -> Iterator[Refusal]:
    """Refuse gradients of another dtype than their parameter's, or summed over ranks in another than the plan's."""
    role, asked = program.required_role, program.plan.precision.reduce_dtype
    dtypes = {entry.target: value(node).dtype for node, entry in program.placeholders(InputKind.PARAMETER)}
    results = results_of(role.backward) if role.backward is not None else ()
    for target, node in zip(role.grads, results):
        wanted = dtypes.get(target, value(node).dtype)
        if value(node).dtype != wanted:
            problem = f"the gradient of '{target}' is {_short(value(node).dtype)}, the parameter {_short(wanted)}"
            yield _refused(node, "backward", problem, "the cast back to the parameter's dtype is missing")
        while comm.moving(node.target) is None and _passes_on(node.target):
            node = node.all_input_nodes[0]
        if comm.moving(node.target) is not None and asked is not None and value(node).dtype != asked:
            problem = (
                f"the gradient of '{target}' is summed in {_short(value(node).dtype)}, the plan says {_short(asked)}"
            )
            yield _refused(node, "backward", problem, "the cast before the sum is missing")


def _passes_on(target: Any) -> bool:
    return target in (aten._to_copy.default, comm.OPS.wait.default) or only_moves(target)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run(node: Node, local: Mapping[Node, tuple[Type, ...]]) -> Verdict:
    """The operator on tensors without data."""

    def made(source: Node) -> Any:
        found = tuple([torch.empty(shape, dtype=dtype) for shape, dtype in local[source]])
        return found[0] if len(found) == 1 else found

    with FakeTensorMode(), torch.no_grad(), _unlogged():
        args, kwargs = fx.map_arg((node.args, node.kwargs), made)  # type: ignore[misc]
        try:
            result = runnable(node.target)(*args, **kwargs)
        except NotImplementedError:
            return (), NO_KERNEL
        except FAILURES as problem:
            return (), (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    results = result if isinstance(result, tuple | list) else [result]
    return tuple((tuple(each.shape), each.dtype) if isinstance(each, Tensor) else None for each in results), ""


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without what torch prints of an operator that fails on such tensors: it is said in a refusal."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _whole_dims(node: Node, kinds: Sequence[Type]) -> tuple[Type, ...]:
    """Types with 0 for the sizes that a rank knows at run time only."""
    dims = [[any(factor.ragged for factor in dim) for dim in kind.layout.dims] for kind in values(node)]
    found = []
    for (shape, dtype), ragged in zip(kinds, dims):
        same = len(shape) == len(ragged)
        found.append((tuple(0 if same and ragged[at] else size for at, size in enumerate(shape)), dtype))
    return tuple(found)


def is_ragged(node: Node) -> bool:
    """Whether a rank knows some size of the node's results at run time only."""
    return any(factor.ragged for kind in values(node) for dim in kind.layout.dims for factor in dim)


def _types(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    return tuple([(kind.layout.local_shape(mesh), kind.dtype) for kind in values(node)])


def _words(types: Sequence[Type]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in types)


def _refused(node: Node, where: str, problem: str, cause: str = CAUSE) -> Refusal:
    module = origin(node).module
    return Refusal(Layer.STRUCTURE, f"{where}: {node.name}{f' ({module})' if module else ''}", problem, cause)
