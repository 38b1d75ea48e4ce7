"""What forward leaves on its model: brought to rest before tracing, or refused by name.

A cache that forward makes once (a table of positions, a mask) is made here, by a run on fake parameters and inputs:
what depends on neither is computed as always. After that run forward finds the cache. A counter never comes to rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from autopar.errors import TraceError
from autopar.frontend.capture import fake_like
from autopar.frontend.grouped_products import GroupedProducts
from autopar.frontend.torch_layers import without_fast_paths
from autopar.ir.same_values import shown
from autopar.observation.observation import Observation
from autopar.observation.other_state import is_position

KEEPS = "a program computes what forward returns, and leaves nothing for the next call but what it writes into buffers"
WAY_OUT = (
    "Way out: compute it before the model is parallelised, return it from forward and pass it as an argument, or count "
    "in a buffer (self.steps.add_(1)) and use that as a tensor."
)


def refuse_backward_hooks(model: nn.Module) -> None:
    """Raise TraceError for a module whose backward pass calls a hook."""
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            kind = "register_full_backward_hook" if module._backward_hooks else "register_full_backward_pre_hook"
            raise TraceError(
                f"module '{path or 'the model'}' has a backward hook ({kind}), which a program does not call: its "
                "backward pass is no longer made of modules\n"
                "Way out: remove the hook (handle.remove()); put one on a parameter (parameter.register_hook), or "
                "change gradients in forward by an autograd.Function."
            )


def check_at_rest(observation: Observation) -> None:
    """Raise TraceError for what a call leaves for the next one to read, the user's generators and iterators too."""
    for label, state, before in observation.readings.generators:
        if repr(state()) != before:
            if is_position(state):
                raise TraceError(
                    f"forward takes the next item of '{label}', an iterator, in each call, and a graph would keep the "
                    "first\nWay out: take it outside of the model, and pass it as an argument: a tensor, which may "
                    "change from call to call."
                )
            raise TraceError(
                f"forward draws random numbers from {label}, which would be those of the first call in every call\n"
                "Way out: draw with torch, or outside of the model, and pass the numbers as a tensor."
            )
    for change in observation.unstable:
        line = f"\n  at {change.line}" if change.line else ""
        raise TraceError(
            f"forward changes '{change.label}' from call to call (from {shown(change.before)} to {shown(change.now)}), "
            f"and reads it{line}\nA graph would keep what it was at first: {KEEPS}.\n{WAY_OUT}"
        )
    for met in observation.grown:
        raise TraceError(
            f"forward, or a hook, changes what {met.label} holds ({len(met.items)} items before)\n"
            f"That would happen once, while the graph is made: {KEEPS}.\n{WAY_OUT}"
        )


def bring_to_rest(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    moving: Observation,
    answering: AbstractContextManager[Any],
) -> Observation:
    """Run forward once so that its caches are made; gives that run, to be undone if it did not help.

    ``answering`` says what Python sees where it looks at values of the inputs, which are fake here.
    Raises the TraceError of ``moving`` where the run fails, or a cache depends on inputs or parameters.
    """
    run = Observation(model, keeps=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = pytree.tree_map_only(Tensor, lambda tensor: fake_like(mode, tensor), (args, dict(kwargs)))
    try:
        with runnable_on_fakes(model, mode), run.watching(), answering:
            model(*fake[0], **fake[1])
    except Exception:
        run.undo()
        check_at_rest(moving)
        raise
    of_inputs = [
        one for one in run.unstable if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(one.now))
    ]
    for change in of_inputs:
        if change.is_seen:
            run.undo()
            check_at_rest(moving)
        run.make_unavailable(change)
    return run


@contextmanager
def runnable_on_fakes(model: nn.Module, mode: FakeTensorMode, *, anywhere: bool = False) -> Iterator[None]:
    """Within this context forward runs on fake parameters whatever a trace can take, and leaves buffers as they are.

    ``anywhere``: buffers on other devices than the CPU, where the inputs are, are fake too.
    """
    fake = _fake_parameters(model, mode, anywhere)
    with without_fast_paths(), GroupedProducts(), fake, _buffers_kept(model), torch.no_grad():
        yield


@contextmanager
def _fake_parameters(model: nn.Module, mode: FakeTensorMode, anywhere: bool) -> Iterator[None]:
    """Within this context the parameters are fake; buffers and whatever is computed from them are not.

    Buffers without data are, and with ``anywhere`` those that are on no CPU.
    """
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for key, tensor in table.items():
                is_elsewhere = tensor is not None and (tensor.is_meta or anywhere and tensor.device.type != "cpu")
                if isinstance(tensor, nn.Parameter) or (tensor is not None and is_elsewhere):
                    swapped.append((table, key, tensor))
                    made.setdefault(id(tensor), fake_like(mode, tensor))
    for table, key, tensor in swapped:
        table[key] = made[id(tensor)]
    try:
        yield
    finally:
        for table, key, tensor in swapped:
            table[key] = tensor


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what is written into buffers within this context."""
    known = [buffer for buffer in model.buffers() if not buffer.is_meta and not isinstance(buffer, FakeTensor)]
    before = [(buffer, buffer.detach().clone()) for buffer in known]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if buffer.shape == value.shape and not torch.equal(buffer, value):
                    buffer.copy_(value)
