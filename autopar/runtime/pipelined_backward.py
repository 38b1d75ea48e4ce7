"""Backward passes that a pipeline cannot do."""

from __future__ import annotations

from typing import Any

from autopar.autodiff.autograd import accumulating, is_watched
from autopar.errors import InvariantError
from autopar.runtime.beside_loss import check_unwatched, outputs_of
from autopar.runtime.shared_with_users import check_shared


def check_backward(ctx: Any) -> None:
    """Raise InvariantError for a backward pass that ``ctx``, the node of a pipeline's forward pass, cannot do."""
    check_unwatched(outputs_of(ctx))
    added = zip(accumulating(ctx, 1), ctx.needs_input_grad[1:])
    if not all(adds for adds, needed in added if needed):
        raise InvariantError(
            "gradients are asked for by name (autograd.grad, backward(inputs=)), and a pipeline adds those of all "
            "parameters to .grad\nWay out: loss.backward(), then parameter.grad; zero_grad() before it."
        )
    if ctx.step.is_done:
        raise InvariantError(
            "this backward pass has run already: on a pipeline it frees the values of the forward pass\n"
            "Way out: call the model again for a second backward pass; retain_graph=True is not supported on pp. "
            "Scale the loss, loss * 2, for gradients that are twice as large."
        )
    late = [name for name, parameter in ctx.step.trained.items() if is_watched(parameter)]
    if late:
        raise InvariantError(
            f"a hook on the gradient of '{late[0]}' was registered between the forward pass and this backward pass: a "
            "pipeline would call it with None\nWay out: register hooks before the model is called."
        )
    ctx.step.executable.kept.check(ctx.step.versions)
    check_shared(ctx.step.shared, lambda: ctx.step.saved)
