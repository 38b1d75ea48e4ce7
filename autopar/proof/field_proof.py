"""A compiled program against the model that it was made of, all ranks executed exactly over a prime field.

Parameters and inputs are random elements of the field of 2^31 - 1. The traced graph is run on one rank and
differentiated by torch (:mod:`autopar.proof.field_reference`); the graphs that ranks run are run on all ranks of the
mesh, with their collectives, and with their schedule where there are stages. Every output, new buffer and gradient must
be equal, element by element: there is no rounding and no tolerance.

**How sure that is.** Hash functions and reciprocals are taken for random functions (the random oracle model). A
program that differs from the model gives equal numbers by chance only: somewhere on the way from the first difference
to a result, two polynomials that differ have one value, which happens with a probability of at most ``degree / PRIME``
at each of ``depth`` applications of such a function (Schwartz 1980, Zippel 1979). Both are counted as the values are
computed, and the seeds are independent: ``bound = product over seeds of depth * degree / PRIME``. There are more seeds
where that is not below ``ENOUGH``.

What is not looked at: rounding, kernels, the network; and floating-point constants up to the eleventh digit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.errors import InvariantError
from autopar.frontend.numerics import promote_float32
from autopar.ir.batch import batch_dims
from autopar.ir.node import Node, value
from autopar.ir.operator_facts import only_moves
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.tables import InputKind, OutputKind
from autopar.mesh import Mesh
from autopar.pipeline.microbatches import Untold
from autopar.proof import field
from autopar.proof.field_causes import Difference, Seen, disagreement, likely_causes
from autopar.proof.field_complex import ComplexFieldTensor
from autopar.proof.field_lockstep import FieldLockstep
from autopar.proof.field_parts import STATISTICS, Trace, is_in_parts, step_in_parts, takes_statistics
from autopar.proof.field_reference import FieldStep, Seeds, reference_step
from autopar.proof.field_steps import Named, program_step, rows_of_parts
from autopar.proof.field_tensor import FieldTensor, NoFieldForm, elements_of
from autopar.proof.field_uninterpreted import recorded
from autopar.simulator.lockstep import Lockstep

aten = torch.ops.aten

ENOUGH = 1e-6
MOST_NAMED = 3  # values in one message
GRADIENT = "gradient of "  # begins the name of one
MORE = 6  # seeds at most, after those that were asked for


@dataclass(frozen=True)
class FieldProof:
    """``proved``: the names of the values that are equal for all seeds; ``unproved``: why nothing could be said.

    ``bound``: of the probability that an equality is one by chance. ``unknown``: operators without a form, which were
    taken as unknown functions: what is equal with them is proved, what differs is not refused.
    """

    proved: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    unproved: tuple[str, ...] = ()
    bound: float = 1.0
    seconds: float = 0.0
    unknown: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return bool(self.proved) and not self.differences and not self.unproved and self.bound < ENOUGH


def prove_in_field(
    program: AnyProgram,
    *,
    seeds: Sequence[int] = (0, 1),
    source: Program | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    smaller: AnyProgram | None = None,
    traced: Trace | None = None,
) -> FieldProof:
    """Compare a differentiated ``program`` with its source on random elements, once for each of ``seeds``.

    Args:
        source: the traced model; ``program.source`` by default. That of a pipeline is of one microbatch only: give the
            trace of the whole batch where there are several.
        tensors: parameters and buffers by name; only whole numbers and bools among them are used.
        args, kwargs: a call of the model: whole numbers and bools of it are used, rows in another order for each seed.
        smaller: of microbatches without a pipeline, the program of those that have fewer rows than the first.
        traced: gives the trace of the model for a microbatch, where the plan asks for the step of each by itself.
    """
    start = time.perf_counter()
    source = source or program.source
    if source is None:
        return FieldProof(unproved=("the program has no source: it was read from a file without one",))
    proved: set[str] | None = None
    differences: list[Difference] = []
    bound = 1.0
    with recorded() as met:
        for seed in more_seeds(seeds):
            if seed not in seeds and bound < ENOUGH:
                break
            try:
                with field.hashing(seed), torch.no_grad(), _precision(source):
                    one = _Once(program, source, tensors or {}, args, kwargs or {}, seed, smaller, traced)
                    equal, found = one.compared()
            except NoFieldForm as problem:
                return FieldProof(unproved=(str(problem),), seconds=time.perf_counter() - start)
            proved = equal if proved is None else proved & equal
            bound *= one.chance()
            differences += found
            if found:
                break
    unproved = _not_known(differences, sorted(met)) if met else ()
    if differences and not met and takes_statistics(program.plan, rows_of_parts(program, (tuple(args), kwargs or {}))):
        unproved = (STATISTICS,)
    differences = [] if unproved else differences
    seconds = time.perf_counter() - start
    return FieldProof(tuple(sorted(proved or ())), tuple(differences), unproved, bound, seconds, tuple(sorted(met)))


def _not_known(differences: Sequence[Difference], operators: Sequence[str]) -> tuple[str, ...]:
    """In words: values that differ where operators are unknown functions, of which a law may make them equal."""
    if not differences:
        return ()
    names = ", ".join(one.name for one in differences[:MOST_NAMED])
    more = f" and {len(differences) - MOST_NAMED} more" if len(differences) > MOST_NAMED else ""
    words = f"{names}{more}: not equal where {', '.join(operators)} are unknown functions; {differences[0].problem}"
    return (words,)


def more_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """``seeds``, and those that follow where they are not enough."""
    return (*seeds, *range(max(seeds) + 1, max(seeds) + 1 + MORE))


def _precision(source: Program) -> AbstractContextManager[None]:
    """What was traced in float64 is run as it was traced: what depends on no input is computed in numbers."""
    wide = any(value(node).dtype is torch.float64 for node, _ in source.placeholders(InputKind.PARAMETER))
    return promote_float32() if wide else nullcontext()


class _Once:
    """The comparison for one seed."""

    def __init__(
        self,
        program: AnyProgram,
        source: Program,
        tensors: Mapping[str, Tensor],
        args: Any,
        kwargs: Any,
        seed: int,
        smaller: AnyProgram | None = None,
        traced: Trace | None = None,
    ) -> None:
        self.program, self.source, self.seed, self.smaller, self.traced = program, source, seed, smaller, traced
        self.tensors = drawn_tensors(source, {**source.made_buffers, **program.made_buffers, **tensors}, seed)
        self.args, self.kwargs = drawn_call(source, tuple(args), dict(kwargs), seed)
        self.values: list[Any] = []

    def compared(self) -> tuple[set[str], list[Difference]]:
        """The names of the values that are equal, and those that are not: of a step, then of a call under no_grad."""
        tangents = self._tangents()
        given = self._tangents_of_program(tangents)
        with torch.enable_grad():
            wanted = self._wanted(tangents)
        equal, differences = self._against(wanted, lambda make: self._run(given, make))
        roles = [part.required_role for part in self.program.parts]
        if not differences and any(role.inference is not role.forward for role in roles):
            results = {name: one for name, one in wanted.named.items() if not name.startswith(GRADIENT)}
            _, found = self._against(replace(wanted, named=results), lambda make: self._run(None, make, trains=False))
            differences = [replace(one, name=f"{one.name} under torch.no_grad()") for one in found]
        return equal, differences

    def _wanted(self, tangents: Mapping[str, Tensor]) -> FieldStep:
        rows = rows_of_parts(self.program, (self.args, self.kwargs))
        if self.traced is not None and is_in_parts(self.program.plan, rows):
            return step_in_parts(self.program, self.traced, self.tensors, self.kwargs, tangents, self.seed)
        return reference_step(self.source, self.tensors, self.args, self.kwargs, tangents, Seeds(self.seed, rows))

    def _against(
        self, wanted: FieldStep, run: Callable[[Callable[[Mesh], Lockstep]], Named]
    ) -> tuple[set[str], list[Difference]]:
        try:
            found = run(FieldLockstep)
        except InvariantError as problem:
            if isinstance(problem.__cause__, NoFieldForm | NotImplementedError):
                raise NoFieldForm(str(problem)) from problem
            return set(), [disagreement(problem)]
        equal, differences = self._judged(wanted, found)
        if differences:
            seen = Seen(self.program)
            run(seen.lockstep)  # once more, and the values of all nodes are kept
            causes = likely_causes(seen, wanted, found, [one.name for one in differences])
            differences = [replace(one, **causes.get(one.name, {})) for one in differences]
        return equal, differences

    def _run(self, tangents: list[Tensor] | None, make: Callable[[Mesh], Lockstep], trains: bool = True) -> Named:
        call = (self.args, self.kwargs)
        given = (self.program, self.source, self.tensors, call, tangents, self.seed, make, self.smaller)
        return program_step(*given, trains=trains)

    def _judged(self, wanted: FieldStep, found: Named) -> tuple[set[str], list[Difference]]:
        equal, differences = set[str](), []
        for name, one in wanted.named.items():
            self.values.append(one)
            if name not in found:
                differences.append(Difference(name, "the program does not give it"))
            elif isinstance(found[name], Untold):
                continue  # nor do ranks
            elif not same(one, found[name]):
                differences.append(Difference(name, "it is another function of the parameters and inputs"))
            else:
                equal.add(name)
        differences += [
            Difference(name, "the model has none") for name in found.keys() - wanted.named.keys()
            if field.has_codes(elements_of(found[name])) or bool(elements_of(found[name]).any())
        ]  # fmt: skip
        return equal, differences

    def _tangents(self) -> dict[str, Tensor]:
        """Of the loss one; of the outputs of a model without one random elements."""
        source = self.source
        users = [
            (out.target, node) for out, node in zip(source.outputs, source.returned) if out.kind is OutputKind.USER
        ]
        if source.loss is not None:
            target = source.outputs[source.loss].target
            kind = value(source.returned[source.loss])
            return {target: FieldTensor(torch.ones(kind.shape, dtype=torch.int64), kind.dtype)}  # that no dtype rounds
        if isinstance(self.program, PipelinedProgram):
            return {}
        role = self.program.required_role
        wanted = {self.program.outputs[place].target for place in role.differentiable}
        return {
            target: _drawn(value(node).shape, value(node).dtype, f"tangent {target}", self.seed)
            for target, node in users
            if target in wanted
        }

    def _tangents_of_program(self, tangents: Mapping[str, Tensor]) -> list[Tensor] | None:
        if isinstance(self.program, PipelinedProgram):
            return None
        if self.source.loss is not None:  # elements of the field: 1/3 in bfloat16, 1/600 in float32 are not those
            results = [self.program.returned[place] for place in self.program.required_role.differentiable]
            kinds = [(value(node).shape, value(node).dtype) for node in results]
            return [FieldTensor(torch.ones(shape, dtype=torch.int64), dtype) for shape, dtype in kinds]
        return [tangents[self.program.outputs[place].target] for place in self.program.required_role.differentiable]

    def chance(self) -> float:
        facts = [x.facts for x in self.values if isinstance(x, FieldTensor)]
        degree = max((fact.degree for fact in facts), default=1)
        return min(1.0, max((fact.depth + 1 for fact in facts), default=1) * degree / field.PRIME)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(elements_of(a, hides=False), elements_of(b, hides=False))


# ---------------------------------------------------------------- what is drawn


def drawn_tensors(source: Program, known: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random parameters and buffers by all their names; whole numbers and bools are those that are known."""
    found: dict[str, Tensor] = {}
    for node, entry in source.placeholders(InputKind.PARAMETER, InputKind.BUFFER):
        shape, dtype = value(node).shape, value(node).dtype
        if dtype.is_floating_point or dtype.is_complex:
            one = _drawn(shape, dtype, entry.target, seed)
        else:
            given = (known[name] for name in entry.names if name in known and not known[name].is_meta)
            one = next(given, torch.zeros(shape, dtype=dtype))
        found |= dict.fromkeys(entry.names, one)
    return found


def _drawn(shape: Sequence[int], dtype: torch.dtype, name: str, seed: int) -> Tensor:
    if dtype.is_complex:
        real = torch.float64 if dtype is torch.complex128 else torch.float32
        return ComplexFieldTensor(*(_drawn(shape, real, f"{name} {part}", seed) for part in ("re", "im")))
    return FieldTensor(field.drawn(shape, name, seed), dtype)


def drawn_call(
    source: Program, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with random floating-point numbers, its rows in another order for each seed, and fewer labels in one row.

    So ranks count unequally many tokens: a third of the first row of what is nothing but labels is ignored.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    entries = source.placeholders(InputKind.INPUT)
    for (place, leaf), (node, entry) in zip(tensors, entries):
        if leaf.dtype.is_floating_point or leaf.dtype.is_complex:
            leaves[place] = _drawn(leaf.shape, leaf.dtype, f"input {entry.target}", seed)
            continue
        (dim,) = batch_dims([(entry.target, leaf.shape)], source.plan.batch_dims)
        leaves[place] = leaf if dim is None else leaf.roll(seed, dim)
        ignored = ignored_label(node)
        if ignored is not None and leaf.dim() and dim == 0 and len(leaf) > 1:
            leaves[place] = leaves[place].clone()
            first = leaves[place][0].view(-1)
            first[: len(first) // 3] = ignored
    return pytree.tree_unflatten(leaves, spec)  # type: ignore[no-any-return]


def ignored_label(node: Node) -> int | None:
    """The label that every loss leaves out to which an input goes; None where it is used for anything else."""
    found: set[int | None] = set()
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user.target is aten.cross_entropy_loss.default:
            given: Any = user.args[4] if len(user.args) > 4 else user.kwargs.get("ignore_index", -100)
            found.add(given if given < 0 else None)
        elif only_moves(user.target) or user.target is aten._to_copy.default:
            waiting += user.users
        elif user.users:
            return None
    return found.pop() if len(found) == 1 else None
