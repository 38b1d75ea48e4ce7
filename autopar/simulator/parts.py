"""The common parts of simulated steps: inputs of each rank, whole values from the parts that ranks hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.autodiff.hoist import without_gathers
from autopar.errors import InvariantError
from autopar.ir.layout import Layout, shard, unshard
from autopar.ir.load import ExpertLoad
from autopar.ir.node import value
from autopar.ir.program import AnyProgram, Program
from autopar.ir.signature import user_tensors
from autopar.ir.stacked_parameters import is_stacked, stacked
from autopar.ir.tables import InputKind
from autopar.ir.traffic import Transfer
from autopar.mesh import Mesh
from autopar.pipeline.microbatches import counts, weights
from autopar.simulator.lockstep import Lockstep, Ranks

# The difference allowed between ranks that must hold the same, relative to the largest element.
AGREEMENT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Step:
    """The results of one step of all ranks. Tensors are whole: the parts of the ranks are joined.

    Attributes:
        output: the model's output, in its own structure (a tuple of tensors where the program knows none).
        loss: of ``program.loss``, None where there is none.
        grads: parameter (or differentiable input) name -> gradient; {} without a backward pass.
        buffers: buffer name -> its new value.
        traffic: operations and bytes sent by one rank, per phase, axis and collective.
        peak_bytes: for each rank, the most bytes of tensors alive at once: parameters, inputs, activations, gradients.
        expert_load: of each layer of experts, by its module, the rows of its experts, where the plan counts them.
        shares: of a pipeline, the weight of the loss of each microbatch.
        in_flight: for each pipeline rank, the most microbatches of a stage whose activations it held at once.
    """

    output: Any
    loss: Tensor | None
    grads: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    traffic: tuple[Transfer, ...]
    peak_bytes: tuple[int, ...]
    in_flight: tuple[int, ...] = ()
    expert_load: Mapping[str, ExpertLoad] = field(default_factory=dict)
    shares: tuple[float, ...] = ()

    def __repr__(self) -> str:
        """A few lines: shapes and sizes, and no numbers but the loss."""
        loss = "none" if self.loss is None else f"{float(self.loss):.6g}"
        shapes = pytree.tree_map(lambda leaf: list(leaf.shape) if isinstance(leaf, Tensor) else leaf, self.output)
        peak = f"{max(self.peak_bytes):,} bytes at most on a rank" if self.peak_bytes else "unknown"
        lines = [f"Step of {len(self.peak_bytes)} ranks", f"  loss    {loss}", f"  output  {shapes}"]
        lines += [f"  grads   of {len(self.grads)} tensors", f"  peak    {peak}"]
        return "\n".join([*lines, *(f"  {transfer}" for transfer in self.traffic)])

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the step, with words for it."""
        for path, leaf in pytree.tree_flatten_with_path(self.output)[0]:
            if isinstance(leaf, Tensor):
                yield f"output {pytree.keystr(path)}", leaf
        yield from ((f"gradient of {name}", grad) for name, grad in self.grads.items())
        yield from ((f"buffer {name}", buffer) for name, buffer in self.buffers.items())


def gathered_once(
    program: Program, graph: fx.Graph, lockstep: Lockstep, inputs: list[Ranks]
) -> tuple[fx.Graph, list[Ranks]]:
    """With ``Plan(zero=1)`` and ``2``: the graph that takes whole parameters, and these, as a runtime holds them.

    The parts are memory of the whole ones (:mod:`autopar.weights.resident_parameters`).
    """
    names = {node.name for node, _ in program.placeholders(InputKind.PARAMETER)}
    found = without_gathers(graph, names) if program.plan.zero in (1, 2) else None
    if found is None:
        return graph, inputs
    places = {node.name: place for place, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    whole = lockstep.run(found.graph, [inputs[places[name]] for name in found.parameters])
    lockstep.drop(whole)  # counted with the inputs
    for owner, ranks in zip(found.owners, whole):
        if owner is None:
            continue
        name, axis = owner
        rows = inputs[places[name]][0].shape[0]
        if rows * program.mesh.size(axis) == ranks[0].shape[0]:
            mesh = program.mesh
            starts = [mesh.position(axis, mesh.coordinates(rank)) * rows for rank in range(len(ranks))]
            inputs[places[name]] = [full.narrow(0, start, rows) for full, start in zip(ranks, starts)]
    return found.rest, [*inputs, *whole]


def counts_of(
    program: AnyProgram, tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any], share: float
) -> list[Tensor]:
    """What the call adds to the sums over the batch, see :func:`autopar.pipeline.microbatches.counts`."""
    if program.counts is None:
        return []
    return counts(program, _call_tensors(program, args, kwargs), {**program.counts.constants, **tensors}, share)


def wholes_of(program: AnyProgram, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The values of ``InputKind.WHOLE`` for a call that is the whole batch; ``inputs``: the user's tensors."""
    given = {**(program.counts.constants if program.counts is not None else {}), **tensors}
    return weights(program, [counts(program, inputs, given, 1.0)], [1])[0].wholes


def rank_inputs(
    program: Program,
    tensors: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    kinds: Sequence[InputKind] = tuple(InputKind),
    wholes: Mapping[str, Tensor] | None = None,
) -> list[Ranks]:
    """For each placeholder of ``kinds``, the parts of all ranks; those of uneven splits are padded with zeros.

    ``wholes``: what the call is weighed with, as a part of a batch; unless given, it is the batch.
    """
    given = iter(_call_tensors(program, args, kwargs or {}) if InputKind.INPUT in kinds else ())
    found = []
    for node, entry in program.placeholders(*kinds):
        if entry.kind is InputKind.INPUT:
            whole = next(given)
        elif entry.kind is InputKind.SEED:
            whole = torch.tensor(seed)
        elif entry.kind is InputKind.WHOLE:
            wholes = wholes or wholes_of(program, _call_tensors(program, args, kwargs or {}), tensors)
            whole = wholes[entry.target]
        elif entry.kind is InputKind.CONSTANT and entry.target in program.constants:
            whole = program.constants[entry.target]
        else:
            whole = _by_name(tensors, (entry.target, *entry.aliases), value(node).shape)
        if whole.shape != value(node).shape:
            shapes = f"{list(whole.shape)}, the program was made for {list(value(node).shape)}"
            raise ValueError(f"{entry.kind.value} '{entry.target}' is {shapes}")
        found.append(parts(whole.detach(), value(node).layout, program.mesh))
    return found


def parts(whole: Tensor, layout: Layout, mesh: Mesh) -> Ranks:
    """The part of ``whole`` on each rank; ranks with equal parts share one tensor. Pending sums count as whole."""
    made: dict[tuple[int, ...], Tensor] = {}
    found: Ranks = []
    local, pieces = layout.local_shape(mesh), replace(layout, partial=())
    for rank in range(mesh.world_size):
        here = mesh.coordinates(rank)
        key = pieces.part(here, mesh)
        if key not in made:
            part = shard(whole, layout, mesh, here).contiguous()
            if part.untyped_storage().nbytes() != part.numel() * part.element_size():
                part = part.clone()  # a view would keep, and count, the whole
            padded = [size for want, have in zip(reversed(local), reversed(part.shape)) for size in (0, want - have)]
            made[key] = torch.nn.functional.pad(part, padded) if any(padded) else part
        found.append(made[key])
    return found


class RanksDisagree(InvariantError):
    """``ranks`` should hold the same part of the value ``name`` and do not."""

    def __init__(self, message: str, name: str, ranks: tuple[int, int]) -> None:
        super().__init__(message)
        self.name, self.ranks = name, ranks


def joined(name: str, ranks: Ranks, layout: Layout, mesh: Mesh) -> Tensor:
    """The whole tensor from the parts of all ranks.

    Raises RanksDisagree, naming ``name``, where ranks that should hold the same part do not.
    """
    first: dict[tuple[int, ...], int] = {}
    for rank, part in enumerate(ranks):
        if tuple(part.shape) != layout.local_shape(mesh):
            raise InvariantError(f"{name}: rank {rank} holds {list(part.shape)}, its layout {layout} says otherwise")
        peer = first.setdefault(layout.part(mesh.coordinates(rank), mesh), rank)
        if ranks[peer] is not part and not agree(ranks[peer], part):
            raise RanksDisagree(
                f"{name}: ranks {peer} and {rank} of {mesh} should hold the same value ({layout}) and do not, "
                f"they differ by up to {_difference(ranks[peer], part):.3g}; "
                "a collective is missing or has the wrong dual",
                name,
                (peer, rank),
            )
    return unshard(ranks, layout, mesh)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def agree(a: Tensor, b: Tensor, scale: float = 0.0) -> bool:
    """Whether two tensors are the same but for rounding: of their largest element, or of ``scale`` if that is more."""
    if torch.equal(a, b):
        return True
    if a.dtype not in AGREEMENT:
        return False
    largest = max(scale, float(torch.where(a.isfinite(), a, 0).abs().max()))
    return torch.allclose(a, b, rtol=0.0, atol=AGREEMENT[a.dtype] * largest, equal_nan=True)


def _by_name(tensors: Mapping[str, Tensor], names: Sequence[str], shape: Sequence[int]) -> Tensor:
    for name in names:
        if name in tensors:
            return tensors[name]
    if is_stacked(names[0]) and (stack := stacked(names[0], shape[0], tensors)) is not None:
        return stack
    raise KeyError(f"no tensor was given for '{names[0]}'")


def _call_tensors(program: AnyProgram, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    if program.in_spec is not None:
        return user_tensors(program, tuple(args), kwargs)
    named = [entry.target for entry in program.inputs if entry.kind is InputKind.INPUT][len(args) :]
    return [*args, *(kwargs[name] for name in named)]
