"""The laptop check: simulate all ranks of the parallel program and compare with the unmodified model in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.mesh import Mesh
from autopar.numerics import gradient_error, promote_float32
from autopar.plan import Plan
from autopar.program import Program
from autopar.simulate import Step, simulate

TOLERANCE = 1e-10


@dataclass(frozen=True)
class Report:
    """Errors of the parallel program against the model: loss and outputs relative to their largest element,
    gradients as :func:`autopar.numerics.gradient_error` measures them."""

    program: Program
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


def check(model: nn.Module, batch: Mapping[str, Any], mesh: Mesh, plan: Plan | None = None) -> Report:
    """Compare loss, outputs and every gradient of the program for ``mesh`` with the eager model, both in float64.

    The model is copied; its own casts to float32 are lifted on both sides. Dropout should be off.
    """
    from autopar.driver import compile_program

    model = copy.deepcopy(model).double()
    batch = pytree.tree_map_only(Tensor, _as_double, dict(batch))
    with promote_float32():
        program = compile_program(model, mesh, plan or Plan(), (), batch)
        state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        state = {name: tensor.detach().clone() for name, tensor in state.items()}
        step = simulate(program, state, (), batch)
        expected = model(**batch)
    loss = loss_of(expected)
    loss.backward()  # type: ignore[no-untyped-call]
    reference = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert step.loss is not None
    given = dict(_leaves(step.output))
    outputs = {
        path: relative_error(given[path], wanted)
        for path, wanted in _leaves(expected)
        if path in given  # what tracing leaves out (a key/value cache) it says
    }
    return Report(program, step, relative_error(step.loss, loss), outputs, gradient_error(step.grads, reference))


def loss_of(output: Any) -> Tensor:
    """The scalar that a model returns as its loss: its ``loss`` entry, or the output itself."""
    if isinstance(output, Tensor):
        return output
    found = output["loss"] if isinstance(output, Mapping) else output[0]
    assert isinstance(found, Tensor)
    return found


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
