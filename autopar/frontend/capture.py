"""The conditions under which ``torch.export`` runs a model, so that the graph means the same as the model.

Export records the forward pass only, so everything that changes the backward pass without being an operator would be
lost silently: ``torch.no_grad`` (a ``detach`` is put where a value that needs a gradient enters the region), ``.data``
(likewise), a hand-written ``autograd.Function`` (:mod:`autopar.frontend.autograd_functions`), and activation
checkpointing (which is noted; the plan decides instead).
"""

from __future__ import annotations

import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from autopar.errors import TraceError
from autopar.frontend.autograd_functions import handwritten_gradients_kept
from autopar.observation.gradient_mode import are_off
from autopar.observation.source_lines import UNKNOWN_LINE, user_line

_DATA_GETTER = Tensor.data.__get__  # type: ignore[attr-defined]
_VIEWS: set[Any] = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}


class _GradientBoundaries(TorchFunctionMode):
    """Writes the effect of ``torch.no_grad`` and ``.data`` into the graph, as ``detach`` operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":
            if func == _DATA_GETTER:
                return args[0].detach()
            if torch.is_grad_enabled() or func not in _VIEWS:
                return func(*args, **kwargs)
        if torch.is_grad_enabled():
            return func(*args, **kwargs)
        original: dict[int, Tensor] = {}

        def stop(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.requires_grad:
                return leaf
            stopped = leaf.detach()
            original[id(stopped)] = leaf
            return stopped

        if getattr(func, "__name__", "") in ("__set__", "requires_grad_", "detach"):
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map(stop, (args, kwargs))
        result = func(*args, **kwargs)
        # x.to(x.dtype) returns x itself, which keeps its gradient even there
        return original.get(id(result), result)


@contextmanager
def gradients_kept() -> Iterator[list[str]]:
    """Guard one export; gives the list of notes (activation checkpointing) that it fills.

    Raises TraceError, with the class and the line, when the model applies a hand-written ``autograd.Function`` whose
    backward pass cannot be written as operators.
    """
    notes: list[str] = []
    modes = (torch.no_grad(), nullcontext()) if are_off() else (torch.enable_grad(), _GradientBoundaries())
    with handwritten_gradients_kept(), without_checkpointing(notes), modes[0], modes[1]:
        yield notes


@contextmanager
def without_checkpointing(notes: list[str]) -> Iterator[None]:
    """Make calls of ``torch.utils.checkpoint`` plain calls of the function, and note them."""
    note = (
        "the model asks for activation checkpointing (torch.utils.checkpoint); autopar decides itself what to "
        "recompute, so those calls are traced through and have no effect; what torch would then do twice, as updating "
        "the statistics of batch normalisation, is done once"
    )

    def reentrant(cls: Any, function: Any, preserve: Any, *args: Any) -> Any:
        notes.append(note)
        return function(*args)

    def other(*args: Any, **kwargs: Any) -> Iterator[None]:
        notes.append(note)
        yield

    with (
        mock.patch.object(checkpoint.CheckpointFunction, "apply", classmethod(reentrant)),
        mock.patch.object(checkpoint, "_checkpoint_without_reentrant_generator", other),
    ):
        yield


_DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")
_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export._trace")


@contextmanager
def explained(model: nn.Module) -> Iterator[None]:
    """Turn the errors that torch raises (and prints) while it traces into one short TraceError with the user's line."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.disabled for logger in loggers]
    printed = io.StringIO()
    try:
        for logger in loggers:
            logger.disabled = True
        with redirect_stderr(printed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*", category=FutureWarning)
            yield
        sys.stderr.write(printed.getvalue())
    except TraceError:
        raise
    except Exception as error:
        raise _explanation(error, model) from (None if is_data_dependent(error) else error)
    finally:
        for logger, disabled in zip(loggers, before):
            logger.disabled = disabled


def is_data_dependent(error: Exception) -> bool:
    """Whether torch could not trace what depends on the values in a tensor."""
    return type(error).__name__ in _DATA_DEPENDENT


def _explanation(error: Exception, model: nn.Module) -> TraceError:
    kind, where = type(error).__name__, user_line(traceback.extract_tb(error.__traceback__))
    text = " ".join(str(error).split("\n\n")[0].split())[:400]
    name = type(model).__name__
    if is_data_dependent(error):
        return TraceError(
            f"{name} cannot be traced: what it does next depends on the values in a tensor\n  at {where}\n"
            "One graph has to serve every batch, so Python may not branch, loop or index on such values.\n"
            "Way out: torch.where or a mask instead of 'if' and boolean indexing; no .item(), float(tensor), .tolist() "
            "or print of a value inside forward."
        )
    if "Unsupported input type" in text or "not a known type" in text:
        return TraceError(
            f"{name} cannot be traced with this call: {text}\n"
            "Way out: pass tensors, numbers, strings and None, or lists, tuples and dicts of them."
        )
    if "expected compiled_fn to be GraphModule" in text:
        names = [path for path, module in model.named_modules(remove_duplicate=False) if module._buffers]
        twice = [path for path in names if path not in {own for own, _ in model.named_modules()}]
        return TraceError(
            f"{name} cannot be traced: a buffer that changes stands under several names "
            f"({', '.join(repr(path) for path in twice[:3]) or 'one of them is not a submodule'} is a submodule under "
            "another name too), which torch.export cannot write as a graph\n"
            "Way out: keep such a module (batch normalisation) under one name, and call it by that."
        )
    way_out = "run the model once without autopar on the same inputs. If it fails there too, mend that first."
    if ".numpy()" in text:
        way_out = "compute with torch operators; what passes through numpy has no gradient either."
    place = f"  at {where}\n" if where != UNKNOWN_LINE else ""
    return TraceError(f"{name} cannot be traced: {kind}: {text}\n{place}Way out: {way_out}")


def inline_no_grad(module: fx.GraphModule) -> None:
    """Put the operators of ``torch.no_grad`` regions in place of their calls; the detaches are in place already.

    A decomposition would do so too, but it loses the line of the model from which each operator comes.
    """
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            continue
        inner: fx.Graph = getattr(module, node.args[1].target).graph
        if any(part.op == "get_attr" for part in inner.nodes):
            continue  # a nested region, such as autocast
        values = dict(zip((part for part in inner.nodes if part.op == "placeholder"), node.args[2:]))
        with module.graph.inserting_before(node):
            results: Any = module.graph.graph_copy(inner, values)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)


MISSING = "autopar: no output of a program"  # None in its place might be dropped by the class of an output
PLAIN = (Tensor, int, float, bool, str, type(None))


def plain_output(output: Any, instead: str | None = None) -> tuple[Any, list[str]]:
    """``output`` with ``instead`` of leaves that a graph cannot return (a key/value cache), and the kinds of those."""
    leaves, spec = pytree.tree_flatten(output)
    dropped = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, PLAIN)]
    if not dropped:
        return output, []
    return pytree.tree_unflatten([leaf if isinstance(leaf, PLAIN) else instead for leaf in leaves], spec), dropped


@contextmanager
def only_plain_outputs(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Within this context, the model returns MISSING for outputs that are no tensors, numbers or strings (noted)."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        output, dropped = plain_output(output, MISSING)
        for kind in dropped:
            said = f"the model returns a {kind}, which a parallel program does not; it is None in its output"
            notes.append(said + ("; only generation needs one" if "Cache" in kind else ""))
        return output

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def needs_fakes(model: nn.Module, leaves: list[Any]) -> bool:
    """Whether the model cannot run on this machine as it is: weights or inputs without data, or on another device."""
    tensors = [*model.parameters(), *model.buffers(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
    return any(isinstance(tensor, FakeTensor) or tensor.device.type != "cpu" for tensor in tensors)


@contextmanager
def faked(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Within this context, the model has fake CPU tensors as weights (meta tensors lose gradients in AOTAutograd)."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = fake_like(mode, tensor)
        return made[id(tensor)]

    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for table in tables:
            for name, tensor in list(table.items()):
                if isinstance(tensor, Tensor):
                    swapped.append((table, name, tensor))
                    table[name] = fake(tensor)
    try:
        yield mode
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor


def fake_like(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake CPU tensor of the same type; a parameter stays a parameter."""
    with mode:
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)
