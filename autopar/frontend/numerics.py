"""A traced graph compared with its model: tensors for the program's inputs, a run of its graph, the errors.

Hugging Face code casts to float32 inside norms, rotary tables and softmax, so a float64 model still rounds to float32
there. :func:`promote_float32` lifts those casts, for the reference and for tracing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.errors import NumericsError, TraceError
from autopar.frontend.capture import explained, plain_output, without_checkpointing
from autopar.frontend.grouped_products import GroupedProducts
from autopar.frontend.torch_layers import packs_padding
from autopar.ir.operator_facts import is_random
from autopar.ir.program import Program
from autopar.ir.signature import restore_output, user_tensors
from autopar.ir.tables import InputKind
from autopar.observation.gradient_mode import are_off
from autopar.observation.kept_places import STAND_INS

REPLAY = 7  # the seed of each draw that is replayed
NOISE_FLOOR = 1e-6  # of the model's largest gradient: below it, a gradient that is zero in exact arithmetic is noise


class _PromoteFloat32(GroupedProducts):
    """Each request for float32 becomes one for float64: as a dtype argument, or by the method ``float``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.set_default_dtype:
            return func(*args)
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def promote_float32() -> Iterator[None]:
    """Within this context, casts to float32 are casts to float64 and the default dtype is float64.

    Use it around the reference run of a float64 model **and** around :func:`autopar.frontend.trace.trace`.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _PromoteFloat32():
            yield
    finally:
        torch.set_default_dtype(default)


def gradient_error(
    grads: Mapping[str, Tensor | None],
    reference: Mapping[str, Tensor | None],
    scales: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Parameter name -> largest absolute error, relative to the parameter's own largest reference gradient.

    That scale is floored at 1e-6 of the model's largest gradient, since some gradients (a key bias under softmax) are
    zero in exact arithmetic, and at ``scales``. A gradient that only one side has (None counts as zeros) is an error of
    its full size.
    """
    floor = NOISE_FLOOR * max((_largest(grad) for grad in reference.values()), default=0.0)
    errors = {}
    for name, expected in reference.items():
        found = grads.get(name)
        if found is None or expected is None:
            difference = max(_largest(found), _largest(expected))
        else:
            difference = _largest(_difference(_dense(found).detach(), _dense(expected).detach().to(found.device)))
        scale = max(_largest(expected), floor, scales.get(name, 0.0))
        errors[name] = difference / scale if scale else (float("inf") if difference else 0.0)
    return errors


def _largest(tensor: Tensor | None) -> float:
    """The largest element, of those that are numbers."""
    if tensor is None or tensor.numel() == 0:
        return 0.0
    return float(_dense(tensor).detach().abs().nan_to_num(nan=0.0, posinf=torch.inf).max())


def _difference(found: Tensor, wanted: Tensor) -> Tensor:
    """``found - wanted``; none where both are infinite or no number, infinite where one of them is no number."""
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    return (found - wanted).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).masked_fill(same, 0)


def _dense(tensor: Tensor) -> Tensor:
    """The gradient as a dense tensor; that of an embedding may be sparse."""
    return tensor.to_dense() if tensor.is_sparse else tensor  # type: ignore[no-any-return]


def input_tensors(program: Program, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors for the program's placeholders, in their order, from an unmodified model and one call of it.

    Raises TraceError when the call does not have the structure, or the non-tensor arguments, of the traced one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    inputs = iter(user_tensors(program, args, kwargs))
    tables: dict[InputKind, Mapping[str, Tensor]] = {
        InputKind.PARAMETER: parameters,
        InputKind.BUFFER: buffers,
        InputKind.CONSTANT: program.constants,
    }
    return [
        next(inputs) if entry.kind is InputKind.INPUT else tables[entry.kind][entry.target] for entry in program.inputs
    ]


def run_graph(graph: fx.Graph, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Run a whole (unsplit) graph on ``tensors``, one for each placeholder, and return what it returns."""
    found: tuple[Any, ...] = fx.Interpreter(nn.Module(), graph=graph).run(*tensors, enable_io_processing=False)
    return found


@dataclass(frozen=True)
class GraphErrors:
    """Errors of outputs, by path (``['loss']``), and of gradients, by name; the dtypes of the outputs."""

    outputs: Mapping[str, float]
    grads: Mapping[str, float]
    dtypes: set[torch.dtype]

    @property
    def worst(self) -> float:
        return max([*self.outputs.values(), *self.grads.values()], default=0.0)


def check_numerics(program: Program, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run the model and its traced graph on the same inputs and random numbers; outputs and gradients must agree.

    Raises NumericsError, with the number and the path of the output or the parameter's name, when they differ by more
    than the square root of the dtype's resolution. Neither gradients nor buffers of the model change.
    """
    found = graph_errors(program, model, args, kwargs)
    coarse = {*found.dtypes, *(parameter.dtype for parameter in model.parameters() if _is_floating(parameter))}
    allowed = max((torch.finfo(dtype).eps for dtype in coarse), default=0.0) ** 0.5
    if found.worst > allowed and any(is_random(node.target) for node in program.graph.nodes):
        found = graph_errors(program, model, args, kwargs, replayed=True)
    errors = {**{f"output{path}": error for path, error in found.outputs.items()}, **found.grads}
    worst = max(errors, key=lambda name: errors[name], default=None)
    if worst is None or errors[worst] <= allowed:
        return
    raise NumericsError(
        f"the traced graph of {type(model).__name__} disagrees with the model: {worst} differs by {errors[worst]:.3g} "
        f"of its size (allowed {allowed:.1g})\n"
        f"{sum(error > allowed for error in errors.values())} of {len(errors)} outputs and gradients differ.\n"
        "Likely: the model reads something while it runs that is neither argument, parameter nor buffer (a global, the "
        "time, a counter), does not give the same result twice, or changes gradients as they pass (a hook on a "
        "tensor).\n"
        "Way out: pass it as an argument; or, if you know better, Plan(check_numerics=False)."
    )


def graph_errors(
    program: Program, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, replayed: bool = False
) -> GraphErrors:
    """The errors of a traced graph against its model.

    ``replayed``: both draw the same numbers whatever the order in which they draw them (:class:`Replayed`).
    """
    names = [entry.target for entry in program.inputs if entry.kind is InputKind.PARAMETER]
    table = dict(model.named_parameters(remove_duplicate=False))
    trainable = {name: table[name] for name in names if table[name].requires_grad}
    packs = packs_padding(model)  # then the caller's mode matters; a mode that sees each call would change it
    devices = sorted({tensor.device.index for tensor in table.values() if tensor.is_cuda}) if replayed else []
    with (
        torch.set_grad_enabled(torch.is_grad_enabled() or not (packs or are_off())),
        torch.random.fork_rng(devices=devices), without_checkpointing([]),
        nullcontext() if packs else GroupedProducts(),
        Replayed() if replayed else nullcontext(),  # type: ignore[no-untyped-call]
    ):  # fmt: skip
        state = torch.get_rng_state()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with explained(model):
            expected, _ = plain_output(functional_call(model, buffers, args, dict(kwargs)))
        _refuse_stand_ins(expected)
        torch.set_rng_state(state)
        found = restore_output(program, run_graph(program.graph, input_tensors(program, model, args, kwargs)))
        grads = gradient_error(_gradients(found, trainable), _gradients(expected, trainable))
        dtypes = {leaf.dtype for leaf in pytree.tree_leaves(expected) if _is_floating(leaf)}
        return GraphErrors(_output_errors(found, expected), grads, dtypes)


def _refuse_stand_ins(expected: Any) -> None:
    """Raise TraceError where the model, run by itself, finds what stood for a tensor while it was traced."""
    if any(isinstance(leaf, STAND_INS) for leaf in pytree.tree_leaves(expected)):
        raise TraceError(
            "forward puts a tensor where autopar does not look (an attribute of a module of torch or Python, of an "
            "object in C), and a later call reads it: it has found there what stood for the tensor in the trace\n"
            "Way out: keep it in an attribute of a module, or in a dict; or call the model once before it is "
            "parallelised. Without autopar the model runs in a new process."
        )


class Replayed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, every operator that draws random numbers starts at the same point of the generator.

    So two runs that draw the same kinds of numbers draw the same ones, in whatever order.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.manual_seed(REPLAY)
        return func(*args, **(kwargs or {}))


def _is_floating(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype.is_floating_point


def _output_errors(found: Any, expected: Any) -> dict[str, float]:
    """Path of each tensor in the output -> its largest error, relative to the largest element."""
    pairs = zip(pytree.tree_leaves_with_path(expected), pytree.tree_leaves(found))
    errors = {}
    for (path, reference), tensor in pairs:
        if isinstance(reference, Tensor):
            difference = _difference(tensor.detach().double(), reference.detach().double())
            errors[pytree.keystr(path)] = _largest(difference) / (_largest(reference.detach().double()) or 1.0)
    return errors


def _gradients(output: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The gradients of the loss, or of a weighted sum of all outputs where no output is a scalar."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if _is_floating(leaf) and leaf.requires_grad]
    scalars = [leaf for leaf in leaves if leaf.ndim == 0]
    if not leaves or not parameters:
        return {}
    loss = scalars[0] if scalars else sum((leaf * _weights(leaf)).sum() for leaf in leaves)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, grads))


def _weights(tensor: Tensor) -> Tensor:
    """Uneven weights, so that a sum over a softmax does not come out constant."""
    count = torch.arange(tensor.numel(), dtype=torch.float64).cos() / tensor.numel()
    return count.to(tensor.dtype).to(tensor.device).reshape(tensor.shape)
