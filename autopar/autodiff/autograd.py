"""The one door to the private parts of torch's autograd, for the sake of speed and memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from autopar.errors import InvariantError

is_autocasting: Any = torch._C._is_any_autocast_enabled  # whether on any kind of device
keeps_graph: Any = torch._C._autograd._get_current_graph_task_keep_graph  # within a backward pass: retain_graph=True
_runs: Any = torch._C._will_engine_execute_node  # type: ignore[attr-defined]


def below_autograd() -> AbstractContextManager[Any]:
    """Within this context, operators bypass autograd, which a rank program does not need: 0.3 us less for each."""
    guard: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return guard


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, without looking through ``args`` for what functorch has left of its wrappers: 5 us of a step.

    Raises InvariantError within transforms of torch.func.
    """
    refuse_transforms()
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


@contextmanager
def alone_in_autograd() -> Iterator[None]:
    """Within this context nobody sees what is saved for a backward pass: torch's checkpoint around a call would.

    Raises InvariantError within transforms of torch.func.
    """
    refuse_transforms()
    hooks = list[Any]()
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def without_anomalies() -> AbstractContextManager[Any]:
    """Within this context torch looks for no nan in gradients (``detect_anomaly``): of a trace, there are no values."""
    return torch.autograd.set_detect_anomaly(False)


def refuse_transforms() -> None:
    """Raise InvariantError within torch.func's transforms, which see operators of a model, and not of a program."""
    if torch._C._are_functorch_transforms_active():
        raise InvariantError(
            "a parallel model is called within a transform of torch.func (grad, vmap, jvp, ...), which would have to "
            "see its operators, and a program of ranks is no function of torch's\n"
            "Way out: put the transform into forward of a small nn.Module around the model, and parallelize that; for "
            "gradients of inputs, x.requires_grad_() and loss.backward()."
        )


def _node_elsewhere() -> Any:
    """A node of a graph through which no backward pass goes."""
    with torch.inference_mode(False), torch.enable_grad():
        return torch.zeros((), requires_grad=True, device="cpu").view(()).grad_fn


def _leaf() -> tuple[Tensor, Any]:
    """A leaf, and the node that adds gradients to it: one for all graphs while somebody holds it."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), requires_grad=True, device="cpu")
        return leaf, leaf.view(()).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


_ELSEWHERE = _node_elsewhere()
WITNESS, _OF_WITNESS = _leaf()  # nobody knows it, so nobody asks for its gradient by name


def take_saved(backward: Any) -> list[Tensor]:
    """The saved tensors of an ``autograd.Function`` context, which releases them unless the graph is retained."""
    saved = list(backward.saved_tensors)
    backward.maybe_clear_saved_tensors()
    return saved


def accumulating(backward: Any, others: int = 0) -> list[bool]:
    """For each tensor that an ``autograd.Function`` took, whether this pass adds its gradient to ``.grad`` (of a leaf).

    ``others``: how many arguments it took before them, which are no tensors.

    False for all under ``torch.autograd.grad``, which returns the gradients themselves. A pass that has not been told
    whose gradients it computes adds all: that is one question where :data:`WITNESS` was taken too, else one for each
    tensor, 0.4 us.
    """
    if _is_unasked():
        return list(backward.needs_input_grad[others:])
    try:
        return [node is not None and _runs(node) for node, _ in backward.next_functions]
    except RuntimeError:
        return [False] * len(backward.next_functions)


def _is_unasked() -> bool:
    """Whether the pass under way goes to nodes that nobody can have asked for."""
    try:
        return bool(_runs(_OF_WITNESS) or _runs(_ELSEWHERE))
    except RuntimeError:
        return False


def keep_hooks(tensor: Tensor) -> None:
    """Keep hooks that are registered on ``tensor``, an output of a node, and do not call them."""
    tensor._backward_hooks = OrderedDict()  # torch would tell the node of the first hook, where there is no table yet


def is_watched(tensor: Tensor) -> bool:
    """Whether hooks are registered on the gradient of ``tensor``."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)
