"""The step that a parallel program has to take: that of the unmodified model in float64, and how exact it can be.

Where the model draws random numbers, that is the step of the program for one device, which draws the same ones as any
other, by their positions; and its traced graph is compared with the model, where both draw at one point.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.compiler import finish_program, pinned, place, retraced
from autopar.errors import InvariantError
from autopar.frontend.double_copy import double_copy
from autopar.frontend.numerics import GraphErrors, graph_errors, promote_float32
from autopar.frontend.rounding import RoundedOtherwise
from autopar.frontend.trace import trace
from autopar.ir.loss import loss_of
from autopar.ir.program import AnyProgram, Program
from autopar.ir.signature import restore_output
from autopar.ir.tables import OutputKind
from autopar.mesh import Mesh
from autopar.pipeline import microbatches
from autopar.plan import Plan
from autopar.simulate import simulate
from autopar.simulator.parts import counts_of

STEP = 0.01  # of the size of all parameters: how far a step of the optimizer goes
ROUNDINGS = 3  # steps that round otherwise
HEADROOM = 100.0  # for the many roundings inside one operator
Batch = Mapping[str, Any]
State = Mapping[str, Tensor]
Name = tuple[str, str]  # ("loss", ""), ("output", "['logits']"), ("gradient", "up.weight"), ("buffer", "seen")


@dataclass(frozen=True)
class Outcome:
    """The results of one step: whole tensors. ``loss`` is None for a model without one.

    Its gradients are those of a random projection of its outputs then (:func:`projected`).
    """

    output: Any
    loss: Tensor | None
    grads: Mapping[str, Tensor | None]
    buffers: State

    def named(self) -> Iterator[tuple[Name, Tensor]]:
        """Every number of the step that can be compared."""
        if self.loss is not None:
            yield ("loss", ""), self.loss
        yield from ((("output", path), leaf) for path, leaf in leaves(self.output))
        yield from ((("gradient", name), dense(grad)) for name, grad in self.grads.items() if grad is not None)
        yield from ((("buffer", name), buffer) for name, buffer in self.buffers.items())


class UnmodifiedSteps:
    """A model in float64 on one batch, and its steps with SGD.

    The model is copied; its own casts to float32 are lifted. Parameters that are constant (biases of zero, norms of
    one) get some noise in the copy, since their initial values would hide that they are used wrongly.

    Raises TraceError for a model that cannot be copied or traced.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model = self._runs = double_copy(model)
        _disturb_constants(self.model)
        self.batch: dict[str, Any] = pytree.tree_map_only(Tensor, _as_double, dict(batch))
        self._parts: dict[str, Program] = {}
        self._alone: dict[tuple[int, str], Program] = {}  # by the id of what was traced, and the plan
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        named = {**parameters, **dict(self.model.named_buffers(remove_duplicate=False))}
        self.state: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in named.items()}
        first = {id(one): name for name, one in reversed(parameters.items())}
        self._first_names = {name: first[id(one)] for name, one in parameters.items()}  # of tied ones
        self.traced = self.traced_part(self.batch)
        made = {name: one for name, one in self.model.named_buffers() if name not in self.state}  # by forward, a cache
        self.state |= {name: tensor.detach().clone() for name, tensor in made.items()}
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            self._eagerly = self._eager(self.state, self.batch)
            self.draws = not torch.equal(before, torch.get_rng_state())  # random numbers, in every step
        self._wholes: list[tuple[State, Outcome]] = []

    def traced_part(self, batch: Batch) -> Program:
        """The program of a batch, or of a microbatch, of these sizes, as it is traced."""
        sizes = repr(pytree.tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), dict(batch)))
        if sizes not in self._parts:
            _load(self.model, self.state)
            with promote_float32():
                self._parts[sizes] = trace(self.model, (), batch, plan=Plan(check_numerics=False))
        return self._parts[sizes]

    def stepping_as(self, model: nn.Module) -> Self:
        """The same programs, to be compared with the steps of another float64 model that has the same tensors."""
        found = copy.copy(self)
        for name in ("_rate", "noise", "drawn_otherwise"):
            vars(found).pop(name, None)
        found._runs, found._wholes = model, []
        found._eagerly = found._eager(found.state, found.batch)
        return found

    def whole(self, number: int) -> Outcome:
        """The step ``number`` of the whole batch; made once."""
        while len(self._wholes) <= number:
            state = self.next_state(*self._wholes[-1]) if self._wholes else self.state
            self._wholes.append((state, self._of(state, self.batch) if self._wholes or self.draws else self._eagerly))
        return self._wholes[number][1]

    def in_parts(self, program: AnyProgram, state: State, shares: Sequence[float]) -> Outcome:
        """The step that accumulates the gradients of the microbatches of ``program``, with these weights."""
        batches = microbatches.parts((), self.batch, program.mesh, program.plan)
        found = (
            self._weighed(program, state, batches)
            if (self.draws or program.plan.microbatch_weights == "statistics") and program.is_weighed
            else _one_after_the_other(
                program, state, [partial(self._of, batch=batch, seed=seed) for seed, batch in enumerate(batches)]
            )
        )
        losses = [outcome.loss * share for outcome, share in zip(found, shares) if outcome.loss is not None]
        last = found[-1]

        def joined(*parts: Any) -> Any:
            if parts[-1] is last.loss:
                return torch.stack(losses).sum()
            return microbatches.together("", parts, None) if isinstance(parts[-1], Tensor) else parts[-1]

        output = pytree.tree_map(joined, *(outcome.output for outcome in found))
        grads = {name: _weighted([one.grads[name] for one in found], shares) for name in last.grads}
        buffers = microbatches.buffers_together(program, [outcome.buffers for outcome in found])
        return Outcome(output, torch.stack(losses).sum() if losses else None, grads, buffers)

    def next_state(self, state: State, outcome: Outcome) -> dict[str, Tensor]:
        """What a step of SGD makes of ``state``; its rate follows from the first step of the whole batch."""
        grads = {name: dense(grad) for name, grad in outcome.grads.items() if grad is not None}
        changed = {name: state[name] - self._rate * grad for name, grad in grads.items() if name in state}
        found = {name: changed.get(self._first_names.get(name, name), tensor) for name, tensor in state.items()}
        return {**found, **outcome.buffers}

    @cached_property
    def _rate(self) -> float:
        grads = {name: dense(grad) for name, grad in self.whole(0).grads.items() if grad is not None}
        length = math.hypot(*(float(self.state[name].norm()) for name in grads))
        way = math.hypot(*(float(grad.norm()) for grad in grads.values()))
        return STEP * length / way if way else 0.0

    @cached_property
    def drawn_otherwise(self) -> GraphErrors:
        """For a model that draws: the errors of its graph against it, where both draw at one point."""
        if not self.draws:
            return GraphErrors({}, {}, set())
        _load(self.model, self.state)
        with promote_float32():
            return graph_errors(self.traced, self.model, (), self.batch, replayed=True)

    @cached_property
    def noise(self) -> dict[Name, float]:
        """How far rounding carries each number of a step: no program comes nearer. The largest difference, absolute.

        It is measured, by a few more steps whose operators round otherwise, with ``HEADROOM``. Gradients that are zero
        in exact arithmetic (of a bias in front of a norm) are nothing but this.
        """
        exact = dict(self.whole(0).named())
        found = dict.fromkeys(exact, 0.0)
        for seed in range(ROUNDINGS):
            with RoundedOtherwise(seed):
                outcome = self._of(self.state, self.batch)
            for name, tensor in outcome.named():
                if name in exact and tensor.shape == exact[name].shape:
                    found[name] = max(found[name], HEADROOM * largest(tensor.double() - exact[name].double()))
        return found

    def tangents(self, program: Program) -> list[Tensor] | None:
        """The gradients of the outputs of a program without a loss; None for one that has one."""
        if program.loss is not None or program.role is None or program.out_spec is None:
            return None
        users = [place for place, entry in enumerate(program.outputs) if entry.kind is OutputKind.USER]
        tree = restore_output(program, [_Place(place) for place in users])
        flat = pytree.tree_flatten_with_path(tree)[0]
        paths = {leaf.place: pytree.keystr(path) for path, leaf in flat if isinstance(leaf, _Place)}
        given = dict(leaves(self._eagerly.output))
        return [weights(paths[place], given[paths[place]]) for place in program.role.differentiable]

    def _of(self, state: State, batch: Batch, seed: int = 0) -> Outcome:
        return self._simulated(state, batch, seed) if self.draws else self._eager(state, batch)

    def _eager(self, state: State, batch: Batch) -> Outcome:
        model = self._runs
        _load(model, state)
        parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        found: dict[str, Tensor | None] = {name: None for name, _ in model.named_parameters()}
        with promote_float32():
            output = model(**batch)
            loss = loss_in(output)
            goal = projected(output) if loss is None else loss
            if goal is not None and goal.requires_grad and parameters:
                grads = torch.autograd.grad(goal, list(parameters.values()), allow_unused=True)
                found |= dict(zip(parameters, grads))
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
        _load(model, self.state)
        return Outcome(output, loss, found, buffers)

    def _weighed(self, program: AnyProgram, state: State, batches: Sequence[Batch]) -> list[Outcome]:
        """The steps of the microbatches on one device, each a summand of that of the batch."""
        rows = microbatches.rows(self.batch, batches, program.plan)
        own = program.plan
        plan = Plan(microbatches=len(batches), batch_dims=own.batch_dims, microbatch_weights=own.microbatch_weights)
        alone = [self._on_one_device(batch, plan) for batch in batches]
        parts = zip(alone, batches, microbatches.shares(rows))
        counted = [counts_of(one, state, (), batch, share) for one, batch, share in parts]
        weights = microbatches.weights(alone[0], counted, rows)
        steps = [
            partial(self._outcome, one, batch=batch, seed=seed, wholes=weight.wholes)
            for seed, (one, batch, weight) in enumerate(zip(alone, batches, weights))
        ]
        return _one_after_the_other(program, state, steps)

    def _simulated(self, state: State, batch: Batch, seed: int) -> Outcome:
        """The step of the program for one device."""
        return self._outcome(self._on_one_device(batch, Plan()), state, batch, seed)

    def _on_one_device(self, batch: Batch, plan: Plan) -> Program:
        """The program of a batch, or a microbatch; made once for each of its sizes."""
        traced = self.traced_part(batch)
        key = id(traced), repr(plan)
        if key not in self._alone:
            again = retraced(lambda _, resized: self.traced_part(resized), traced, (), batch, plan)
            with promote_float32():
                program = finish_program(place(pinned(traced, None, of_rows=again), Mesh(), plan))
            assert isinstance(program, Program)
            self._alone[key] = program
        return self._alone[key]

    def _outcome(
        self, alone: Program, state: State, batch: Batch, seed: int, wholes: Mapping[str, Tensor] | None = None
    ) -> Outcome:
        tangents = self.tangents(alone)
        with promote_float32():
            step = simulate(alone, state, (), batch, seed=seed, tangents=tangents, emitted=False, wholes=wholes)
        every: dict[str, Tensor | None] = {name: None for name, _ in self.model.named_parameters()}
        return Outcome(step.output, step.loss, {**every, **step.grads}, step.buffers)


def _one_after_the_other(
    program: AnyProgram, state: State, steps: Sequence[Callable[[State], Outcome]]
) -> list[Outcome]:
    """The ``steps`` of the microbatches, each of which finds the buffers that the one before has written."""
    found: list[Outcome] = []
    for step in steps:
        before = microbatches.found_by_next(program, found[-1].buffers) if found else {}
        state = {**state, **before}
        found.append(step(state))
    return found


def _load(model: nn.Module, state: State) -> None:
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in state:  # else it is a cache, not yet made
                tensor.copy_(state[name])


@dataclass(frozen=True)
class _Place:
    """A value's position among the outputs of a program."""

    place: int


def loss_in(output: Any) -> Tensor | None:
    """The loss in the output of a model, if there is one that can be trained on."""
    try:
        found = loss_of(output)
    except InvariantError:
        return None
    return found if found.requires_grad else None


def projected(output: Any) -> Tensor | None:
    """The sum of all outputs that have a gradient, with :func:`weights`; None where there are none."""
    terms = [(leaf * weights(path, leaf)).sum() for path, leaf in leaves(output) if leaf.requires_grad]
    return torch.stack(terms).sum() if terms else None


def weights(path: str, like: Tensor) -> Tensor:
    """Random numbers for the elements of the output at ``path``, the same in each run."""
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def leaves(tree: Any) -> list[tuple[str, Tensor]]:
    """The tensors in an output, by path."""
    found = pytree.tree_flatten_with_path(tree)[0]
    return [(pytree.keystr(path), leaf) for path, leaf in found if isinstance(leaf, Tensor)]


def dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor  # type: ignore[no-any-return]


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def _weighted(grads: Sequence[Tensor | None], shares: Sequence[float]) -> Tensor | None:
    """``shares``: of the losses."""
    found = [dense(grad) * share for grad, share in zip(grads, shares) if grad is not None]
    return torch.stack(found).sum(0) if found else None


def _disturb_constants(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.1 * noise.to(parameter.device))


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
