"""The laptop check: simulate all ranks of the parallel program and compare with the unmodified model in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.compiler import finish_program, pipelined, place
from autopar.frontend.numerics import gradient_error, promote_float32
from autopar.frontend.trace import trace
from autopar.ir.loss import loss_of
from autopar.ir.program import AnyProgram, Program
from autopar.mesh import Mesh
from autopar.pipeline import microbatches
from autopar.plan import Plan
from autopar.precision import Precision
from autopar.simulate import simulate
from autopar.simulator.parts import Step

TOLERANCE = 1e-10


@dataclass(frozen=True)
class Report:
    """Errors of the parallel program against the model: loss and outputs relative to their largest element.

    Gradients are measured as in :func:`autopar.frontend.numerics.gradient_error`.
    """

    program: AnyProgram
    step: Step
    loss: float
    outputs: Mapping[str, float]
    grads: Mapping[str, float]

    @property
    def worst(self) -> float:
        errors = [self.loss, *self.outputs.values(), *self.grads.values()]
        return math.inf if any(math.isnan(error) for error in errors) else max(errors)

    @property
    def passed(self) -> bool:
        return self.worst <= TOLERANCE


class Reference:
    """A model in float64 on one batch: its loss, outputs and gradients, and its traced graph, made once for any mesh.

    The model is copied; its own casts to float32 are lifted. Parameters that are constant (biases of zero, norms of
    one) get some noise in the copy, since their initial values would hide that they are used wrongly. Dropout should
    be off.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self.model = copy.deepcopy(model).double()
        _disturb_constants(self.model)
        self.batch: dict[str, Any] = pytree.tree_map_only(Tensor, _as_double, dict(batch))
        self._parts: dict[str, Program] = {}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with promote_float32():
            self.traced = trace(self.model, (), self.batch, plan=Plan(check_numerics=False))
            self.expected = self.model(**self.batch)
            self.loss = loss_of(self.expected)
            self.loss.backward()  # type: ignore[no-untyped-call]
        self.grads = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.state = {name: parameter.detach() for name, parameter in parameters.items()}
        self.state |= dict(self.model.named_buffers(remove_duplicate=False)) | buffers  # as they were before that step

    def program(self, mesh: Mesh, plan: Plan | None = None) -> AnyProgram:
        """The program for ``mesh``, in float64 whatever ``plan.precision`` is. Raises the errors of the compiler."""
        plan = replace(plan or Plan(), precision=Precision())
        with promote_float32():
            if mesh.is_pipelined:
                return pipelined(self._traced_part, mesh, plan, (), self.batch)
            return finish_program(place(self.traced, mesh, plan))

    def _traced_part(self, batch: Mapping[str, Any]) -> Program:
        """The program of a microbatch of these sizes."""
        sizes = repr(pytree.tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), dict(batch)))
        if sizes not in self._parts:
            self._parts[sizes] = trace(self.model, (), batch, plan=Plan(check_numerics=False))
        return self._parts[sizes]

    def check(self, mesh: Mesh, plan: Plan | None = None) -> Report:
        """Compare one step of :meth:`program`, simulated on all ranks. Raises what that raises."""
        program = self.program(mesh, plan)
        with promote_float32():
            step = simulate(program, self.state, (), self.batch)
            expected, loss, wanted_grads = self._expected(program)
        assert step.loss is not None
        given = dict(_leaves(step.output))
        outputs = {
            path: relative_error(given[path], wanted)
            for path, wanted in _leaves(expected)
            if path in given  # what tracing leaves out (a key/value cache) it says
        }
        errors = gradient_error(step.grads, wanted_grads)
        return Report(program, step, relative_error(step.loss, loss), outputs, errors)

    def _expected(self, program: AnyProgram) -> tuple[Any, Tensor, dict[str, Tensor | None]]:
        """Outputs, loss and gradients of the model's step.

        Where a pipeline weighs its microbatches by their rows, it is the step that accumulates the gradients of these.
        """
        plan = program.plan
        if plan.microbatch_weights != "rows" or not program.mesh.is_pipelined or plan.microbatches == 1:
            return self.expected, self.loss, self.grads
        batches = microbatches.parts((), self.batch, program.mesh, plan)
        rows = microbatches.rows(self.batch, batches, plan)
        model = copy.deepcopy(self.model)
        model.zero_grad()
        outputs, losses = [model(**batch) for batch in batches], []
        for output, share in zip(outputs, microbatches.shares([None] * len(rows), rows)):
            losses.append(loss_of(output) * share)
            losses[-1].backward()  # type: ignore[no-untyped-call]
        total, last = torch.stack(losses).sum(), loss_of(outputs[-1])

        def joined(*parts: Any) -> Any:
            if parts[-1] is last:
                return total
            return microbatches.together(parts) if isinstance(parts[-1], Tensor) else parts[-1]

        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        return pytree.tree_map(joined, *outputs), total, grads


def check(model: nn.Module, batch: Mapping[str, Any], mesh: Mesh, plan: Plan | None = None) -> Report:
    """Compare loss, outputs and every gradient of the program for ``mesh`` with the eager model, both in float64.

    See :class:`Reference`, which serves several meshes. Raises what tracing and compiling raise.
    """
    return Reference(model, batch).check(mesh, plan)


def _disturb_constants(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.1 * noise.to(parameter.device))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference over the largest element of ``wanted``."""
    if wanted.numel() == 0:
        return 0.0
    scale = max(float(wanted.detach().double().abs().max()), 1e-30)
    return float((found.detach().double() - wanted.detach().double()).abs().max()) / scale


def _leaves(tree: Any) -> list[tuple[str, Tensor]]:
    found = pytree.tree_flatten_with_path(tree)[0]
    return [(pytree.keystr(path), leaf) for path, leaf in found if isinstance(leaf, Tensor)]


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
