"""The laptop check: simulate all ranks of the parallel program and compare with the unmodified model in float64.

Two steps are compared, with SGD between them: weights that start at zero (a LoRA, a gate) hide mistakes in the first.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.compiler import finish_program, pipelined, place
from autopar.errors import check_kind
from autopar.frontend.numerics import gradient_error, promote_float32
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.mesh import Mesh
from autopar.pipeline import microbatches
from autopar.plan import Plan
from autopar.precision import Precision
from autopar.reference import Name, Outcome, UnmodifiedSteps, largest, leaves
from autopar.simulate import simulate
from autopar.simulator.parts import Step

TOLERANCE = 1e-10
STEPS = 2


@dataclass(frozen=True)
class Report:
    """Errors of the parallel program against the model: the largest of its steps.

    Loss and outputs are measured relative to their largest element, gradients as in
    :func:`autopar.frontend.numerics.gradient_error`. What rounding changes (:attr:`UnmodifiedSteps.noise`) is no error:
    where a number has an error above the tolerance, its scale is at least its noise over the tolerance; but never above
    the largest number of its kind (gradients, outputs).

    Attributes:
        step: the first of the simulated steps.
        loss: None for a model without one; then gradients are those of a random projection of its outputs (and there
            are none on a pipeline, which trains on a loss only).
        buffers: of those that forward writes.
    """

    program: AnyProgram
    step: Step
    loss: float | None
    outputs: Mapping[str, float]
    grads: Mapping[str, float]
    buffers: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        of_loss = [] if self.loss is None else [self.loss]
        errors = [*of_loss, *self.outputs.values(), *self.grads.values(), *self.buffers.values()]
        return math.inf if any(math.isnan(error) for error in errors) else max(errors, default=0.0)

    @property
    def passed(self) -> bool:
        return self.worst <= TOLERANCE


class Reference(UnmodifiedSteps):
    """A model in float64 on one batch, with its programs for meshes compared with it."""

    def program(self, mesh: Mesh, plan: Plan | None = None) -> AnyProgram:
        """The program for ``mesh``, in float64 whatever ``plan.precision`` is. Raises the errors of the compiler."""
        plan = replace(plan or Plan(), precision=Precision())
        with promote_float32():
            if mesh.is_pipelined:
                return pipelined(self.traced_part, mesh, plan, (), self.batch)
            return finish_program(place(self.traced, mesh, replace(plan, microbatches=1)))

    def check(self, mesh: Mesh, plan: Plan | None = None, steps: int = STEPS) -> Report:
        """Compare ``steps`` steps of :meth:`program`, simulated on all ranks. Raises what that raises."""
        return self.compare(self.program(mesh, plan), steps)

    def compare(self, program: AnyProgram, steps: int = STEPS) -> Report:
        """Compare ``steps`` steps of a program of this model and batch, in float64. Raises what simulation raises."""
        tangents = None if isinstance(program, PipelinedProgram) else self.tangents(program)
        trains = not (isinstance(program, PipelinedProgram) and self.whole(0).loss is None)
        pairs: list[tuple[Step, Outcome]] = []
        state = wanted_state = self.state
        for number in range(steps if trains else 1):
            with promote_float32():
                given: dict[str, Any] = {"backward": trains, "tangents": tangents, "emitted": number == 0}
                step = simulate(program, state, (), self.batch, untold=True, **given)
            for leaf in pytree.tree_leaves(step.output) if number == 0 else ():
                if isinstance(leaf, microbatches.Untold):
                    warnings.warn(f"not compared: {leaf}", stacklevel=4)
            shares = self._shares(program, step)
            wanted = self.whole(number) if shares is None else self.in_parts(program, wanted_state, shares)
            wanted = wanted if trains else replace(wanted, grads={})
            pairs.append((step, wanted))
            state = self.next_state(state, Outcome(step.output, step.loss, step.grads, step.buffers))
            wanted_state = self.next_state(wanted_state, wanted)
        report = self._report(program, pairs, {})
        return report if report.passed else self._report(program, pairs, self.noise)

    def _shares(self, program: AnyProgram, step: Step) -> list[float] | None:
        """The weights of the microbatches, where their step is another than that of the whole batch."""
        plan = program.plan
        if not program.mesh.is_pipelined or plan.microbatches == 1:
            return None
        if plan.microbatch_weights == "rows":
            batches = microbatches.parts((), self.batch, program.mesh, plan)
            rows = microbatches.rows(self.batch, batches, plan)
            return [count / sum(rows) for count in rows]
        return list(step.shares) if self.draws or plan.microbatch_weights == "statistics" else None

    def _scales(self, noise: Mapping[Name, float]) -> dict[Name, float]:
        most: dict[str, float] = defaultdict(float)
        for (kind, _), tensor in self.whole(0).named():
            most[kind] = max(most[kind], largest(tensor.double()))
        return {name: min(amount / TOLERANCE, most[name[0]]) for name, amount in noise.items()}

    def _report(self, program: AnyProgram, pairs: list[tuple[Step, Outcome]], noise: Mapping[Name, float]) -> Report:
        scales = self._scales(noise)
        losses: list[float] = []
        outputs, grads = dict(self.drawn_otherwise.outputs), dict(self.drawn_otherwise.grads)
        buffers: dict[str, float] = {}
        of_grads = {name: scale for (kind, name), scale in scales.items() if kind == "gradient"}
        for step, wanted in pairs:
            given = dict(leaves(step.output))
            if wanted.loss is not None:
                assert step.loss is not None
                losses.append(relative_error(step.loss, wanted.loss, scales.get(("loss", ""), 0.0)))
            for path, leaf in leaves(wanted.output):
                if path in given:  # what tracing leaves out (a key/value cache) it says
                    error = relative_error(given[path], leaf, scales.get(("output", path), 0.0))
                    outputs[path] = _worse(outputs.get(path, 0.0), error)
            for name, error in gradient_error(step.grads, wanted.grads, of_grads).items():
                grads[name] = _worse(grads.get(name, 0.0), error)
            for name in step.buffers.keys() & wanted.buffers.keys():
                error = relative_error(step.buffers[name], wanted.buffers[name], scales.get(("buffer", name), 0.0))
                buffers[name] = _worse(buffers.get(name, 0.0), error)
        loss = None
        for error in losses:
            loss = _worse(loss or 0.0, error)
        return Report(program, pairs[0][0], loss, outputs, grads, dict(sorted(buffers.items())))


def check(model: nn.Module, batch: Mapping[str, Any], mesh: Mesh, plan: Plan | None = None) -> Report:
    """Compare loss, outputs, buffers and every gradient of the program for ``mesh`` with the eager model, in float64.

    See :class:`Reference`, which serves several meshes. Raises what tracing and compiling raise.
    """
    check_kind("batch", batch, Mapping, "a dict by name: check(model, {'x': x}, autopar.Mesh(dp=2))")
    check_kind("mesh", mesh, Mesh, "autopar.Mesh(dp=2, tp=2)")
    return Reference(model, batch).check(mesh, plan)


def relative_error(found: Tensor, wanted: Tensor, scale: float = 0.0) -> float:
    """Largest absolute difference over the largest element of ``wanted``, or over ``scale`` if that is larger."""
    if wanted.numel() == 0:
        return 0.0
    scale = max(largest(wanted.double()), scale, 1e-30)
    return largest(found.detach().double() - wanted.detach().double()) / scale


def _worse(one: float, other: float) -> float:
    """The larger error; NaN is larger than any."""
    return other if math.isnan(other) or other > one else one
