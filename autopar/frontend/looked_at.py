"""Python that looks at values: the branch, or the size, of the example is taken, and guarded.

The model runs once on the example's inputs, with fake parameters; what Python looks at there depends on inputs and
buffers, or the model is refused. While the model is exported Python sees the same again. What it looked at becomes a
graph of its own (:mod:`autopar.ir.value_guards`), which each call computes before it takes a program. So it is with
sizes that depend on values (:mod:`autopar.selections.known_sizes`), where these cannot stay unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind as ExportInput
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from autopar.errors import TraceError
from autopar.frontend.capture import gradients_kept, inline_no_grad
from autopar.frontend.grouped_products import GroupedProducts
from autopar.frontend.kept_composites import decomposed
from autopar.frontend.steady_state import runnable_on_fakes
from autopar.frontend.torch_layers import without_fast_paths
from autopar.ir.node import output_node
from autopar.ir.operator_facts import is_random
from autopar.ir.torch_export import export_as_run
from autopar.ir.value_guards import READ, SIZE, Look, ValueGuard, guard_of
from autopar.observation.source_lines import user_line
from autopar.selections.empty_selections import Selections
from autopar.selections.known_sizes import depends_on_values, with_sizes

_LOOKS: dict[Callable[..., Any], str] = {
    Tensor.__bool__: "bool",
    Tensor.__int__: "int",
    Tensor.__index__: "int",
    Tensor.__float__: "float",
    Tensor.item: "item",
    Tensor.tolist: "tolist",
    torch.is_nonzero: "bool",
    torch.equal: "bool",
    torch.allclose: "bool",
    Tensor.equal: "bool",
    Tensor.allclose: "bool",
    Tensor.__contains__: "bool",
}


def _looked_at(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor whose value decides."""
    if func in (torch.equal, Tensor.equal):
        same = args[0].shape == args[1].shape and args[0].dtype == args[1].dtype
        tensor: Tensor = (args[0] == args[1]).all() if same else torch.tensor(False)
    elif func in (torch.allclose, Tensor.allclose):
        tensor = torch.isclose(*args, **kwargs).all()
    else:
        tensor = (args[0] == args[1]).any() if func is Tensor.__contains__ else args[0]
    return tensor


class Recorded(TorchFunctionMode):
    """Within this context, what Python looks at in tensors is written down; ``sizes``: and how large results are."""

    def __init__(self, sizes: bool) -> None:
        super().__init__()
        self.looks = list[Look]()
        self._sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS:
            return self._look(_looked_at(func, args, kwargs), _LOOKS[func])
        if self._sizes and depends_on_values(func, args, kwargs):
            return with_sizes(func, args, kwargs, lambda count: self._look(count, SIZE))
        return func(*args, **kwargs)

    def _look(self, tensor: Tensor, kind: str) -> Any:
        if isinstance(tensor, FakeTensor):
            raise DependsOnParameters(user_line(), kind)
        seen = READ[kind](tensor)
        self.looks.append(Look(kind, seen, user_line()))
        return seen


class DependsOnParameters(Exception):
    """Python looks at what is computed from parameters; the arguments are the line and the kind of look."""


class Replayed(TorchFunctionMode):
    """Within this context, Python sees what it has seen on the example; ``tensors`` are those that it looks at."""

    def __init__(self, looks: Sequence[Look], *, sizes: bool) -> None:
        super().__init__()
        self._looks, self._sizes = looks, sizes
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS and len(self.tensors) < len(self._looks):
            return self._look(_looked_at(func, args, kwargs))
        if self._sizes and depends_on_values(func, args, kwargs):
            return with_sizes(func, args, kwargs, self._look)
        return func(*args, **kwargs)

    def _look(self, tensor: Tensor) -> Any:
        self.tensors.append(tensor)
        return self._looks[len(self.tensors) - 1].seen


def looks_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], refusal: Exception, *, sizes: bool
) -> list[Look]:
    """What Python looks at when the model runs on these inputs; ``sizes``: with sizes that depend on values.

    Raises TraceError where that is computed from parameters; ``refusal`` where the model does not run on fake ones, or
    a size is computed from parameters.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    recorded = Recorded(sizes)
    try:
        with runnable_on_fakes(model, mode), recorded:
            model(*args, **kwargs)
    except DependsOnParameters as problem:
        line, kind = problem.args
        if kind == SIZE:
            raise refusal from None
        raise _of_parameters(model, [line]) from None
    except Exception:
        if not sizes:
            return []
        raise refusal from None
    return recorded.looks


_ASSERTIONS = {
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_async.msg,
}


class _LooksOnly(nn.Module):
    """The model, returning what Python looks at."""

    def __init__(self, model: nn.Module, looks: Sequence[Look], sizes: bool) -> None:
        super().__init__()
        self.model, self.looks, self.sizes = model, looks, sizes

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with Replayed(self.looks, sizes=self.sizes) as replayed:
            self.model(*args, **kwargs)
        return tuple(tensor.detach().clone() for tensor in replayed.tensors)


def value_guard(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], looks: Sequence[Look], *, sizes: bool
) -> ValueGuard:
    """The graph that computes what is looked at. Raises TraceError where random numbers decide."""
    wrapper = _LooksOnly(model, looks, sizes)
    some = (
        nullcontext() if sizes else Selections(empty=False)
    )  # for torch's own questions: what it computes is left out
    with without_fast_paths(), GroupedProducts(), gradients_kept(), some:
        exported = export_as_run(wrapper, args, kwargs)
    inline_no_grad(exported.graph_module)
    exported = decomposed(exported)
    graph = exported.graph
    output = output_node(graph)
    wanted = set(exported.graph_signature.user_outputs)
    (nodes,) = output.args
    assert isinstance(nodes, (tuple, list))
    output.args = (tuple(node for node in nodes if getattr(node, "name", None) in wanted),)
    for node in reversed(graph.nodes):
        if node.target in _ASSERTIONS:  # of what else the model computes
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if is_random(node.target):
            lines = "\n".join(f"  at {look.line}" for look in looks)
            raise TraceError(
                f"{type(model).__name__} cannot be traced: a random number decides what it does next\n{lines}\n"
                "Way out: draw it outside and pass it as an argument, or multiply with a mask instead of 'if'."
            )
    sources = _sources(exported, model, looks)
    return guard_of(graph, sources, looks)


def _sources(exported: ExportedProgram, model: nn.Module, looks: Sequence[Look]) -> list[int | tuple[Any, str]]:
    """Where each placeholder's tensor is found; those that nothing needs are taken out of the graph."""
    graph, sources, position = exported.graph, list[int | tuple[Any, str]](), 0
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, exported.graph_signature.input_specs):
        here = position
        position += spec.kind is ExportInput.USER_INPUT
        if not node.users:
            graph.erase_node(node)
        elif spec.kind is ExportInput.USER_INPUT:
            sources.append(here)
        elif spec.kind is ExportInput.BUFFER:
            path, _, key = str(spec.target).removeprefix("model.").rpartition(".")
            sources.append((model.get_submodule(path)._buffers, key))
        else:
            if spec.kind is not ExportInput.CONSTANT_TENSOR:  # through a buffer that forward has written to
                raise _of_parameters(model, [look.line for look in looks])
            sources.append((exported.constants, str(spec.target)))
    return sources


def _of_parameters(model: nn.Module, lines: Sequence[str]) -> TraceError:
    where = "\n".join(f"  at {line}" for line in dict.fromkeys(lines))
    return TraceError(
        f"{type(model).__name__} cannot be traced: what it does next depends on the values in a tensor that is "
        f"computed from parameters\n{where}\n"
        "No rank has all of that before the program runs. A value that is computed from inputs may decide.\n"
        "Way out: torch.where or a mask instead of 'if'; no .item(), float(tensor) or .tolist() of it in forward."
    )
