"""Hand-written ``torch.autograd.Function``s in a traced model: forward and backward become ordinary operators.

Export would record the forward pass and differentiate *that*. Instead the backward pass B, which is linear in the
incoming gradient for almost every Function, is traced on its own and transposed. The graph then contains

    y = forward(x)                            without gradient
    t = transpose(B)(x)                       its derivative is B, whatever its value
    straight_through(y, t)                    the value of y, the gradient of t

so the derivative of the graph is exactly the hand-written one, and every pass sees operators that it can split.
(A linear map is transposed by differentiating it: Radul et al. 2023, "You only linearize once".) The linearity of B is
proven operator by operator (:mod:`autopar.frontend.linearity`), on tensors without data; a Function whose backward pass
is not proven linear is refused by name.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from autopar.errors import TraceError
from autopar.frontend.linearity import not_linear
from autopar.observation.source_lines import user_line
from autopar.operators.straight_through import STRAIGHT_THROUGH

aten = torch.ops.aten

_LOOKS_AT_VALUES = ("DataDependentOutputException", "GuardOnDataDependentSymNode", "DynamicOutputShapeException")


@contextmanager
def handwritten_gradients_kept() -> Iterator[None]:
    """Within this context, a Function gives its value, and the gradient that its backward pass defines.

    Raises TraceError, with the class, the line and the reason, for a Function whose gradient cannot be written so.
    """
    before = _APPLY.__code__
    _APPLY.__code__ = _Hook.apply.__code__
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, TraceError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause is error:
            raise
        raise cause from None  # torch has wrapped it
    finally:
        _APPLY.__code__ = before


# Models keep bound methods (``gelu = GeLUFunction.apply``). Replacing ``apply`` would come too late for those, so the
# code of the function is replaced.
_APPLY: Any = Function.apply.__func__  # type: ignore[attr-defined]
_ORIGINAL = FunctionType(_APPLY.__code__, _APPLY.__globals__, "apply", _APPLY.__defaults__, _APPLY.__closure__)


class _Hook:
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        __class__  # type: ignore[name-defined]  # noqa: B018  # the one free variable that torch's code has too
        from autopar.frontend.autograd_functions import applied

        return applied(cls, *args, **kwargs)


def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``cls.apply(*args, **kwargs)`` as operators; unchanged where no gradient flows."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    control_flow = cls.__module__.startswith("torch._higher_order_ops")
    if control_flow and gradient:
        raise TraceError(
            f"the model uses a control-flow operator ({cls.__name__})\n  at {user_line()}\n"
            "Way out: compute both sides and choose with torch.where."
        )
    if control_flow or cls.__name__.startswith("GeneratedBackwardFor_"):  # an operator with a formula stays whole
        return _ORIGINAL(cls, *args, **kwargs)
    try:
        return _as_operators(cls, *args, **kwargs) if gradient else _forward(cls, args, kwargs)[2]
    except _Refusal as refusal:
        raise _refused(cls, refusal) from None


class _Context:
    """The ``ctx`` of forward and backward."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.without_gradient: tuple[Tensor, ...] = ()
        self.materialized = True
        self.dirty = False

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        pass  # for forward-mode differentiation

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.without_gradient += tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialized = value

    def mark_dirty(self, *tensors: Tensor) -> None:
        self.dirty = True

    def tensors(self) -> list[Tensor]:
        """All tensors that backward can find in this context, in a fixed order."""
        leaves = [leaf for leaf in pytree.tree_leaves(vars(self)) if isinstance(leaf, Tensor)]
        return list({id(leaf): leaf for leaf in leaves}.values())

    def with_tensors(self, new: Sequence[Tensor]) -> _Context:
        """A copy of this context with ``new`` in place of its :meth:`tensors`."""
        table = {id(old): tensor for old, tensor in zip(self.tensors(), new)}
        twin = copy.copy(self)
        vars(twin).update(pytree.tree_map_only(Tensor, lambda leaf: table[id(leaf)], vars(self)))
        return twin


class _Refusal(Exception):
    """A reason why a Function cannot be traced, and the way out."""

    def __init__(self, reason: str, way_out: str = "") -> None:
        super().__init__(reason)
        self.way_out = way_out


def _refused(cls: type, refusal: _Refusal) -> TraceError:
    way_out = refusal.way_out or "write it with ordinary torch operators"
    return TraceError(
        f"the model applies the hand-written autograd.Function {cls.__module__}.{cls.__qualname__}\n"
        f"  at {user_line()}\n"
        f"Its gradient cannot be kept: {refusal}.\n"
        f"Way out: {way_out}; or make it an operator of its own: torch.library.custom_op with register_fake and "
        "register_autograd, and autopar.register_rule."
    )


def _as_operators(cls: Any, *args: Any, **kwargs: Any) -> Any:
    ctx, args, output = _forward(cls, args, kwargs)
    if ctx.dirty:
        raise _Refusal("its forward writes into its inputs", "let it return new tensors (x = x - m for x -= m)")
    outputs = list(output) if isinstance(output, (tuple, list)) else [output]
    marked = {id(tensor) for tensor in ctx.without_gradient}
    flowing = [isinstance(y, Tensor) and _is_continuous(y) and id(y) not in marked for y in outputs]
    results = [y.detach() if isinstance(y, Tensor) else y for y in outputs]
    if any(ctx.needs_input_grad) and any(flowing):
        for position, surrogate in _Transpose(cls, ctx, args, outputs, flowing).run().items():
            results[position] = STRAIGHT_THROUGH(results[position], surrogate)
    return tuple(results) if isinstance(output, (tuple, list)) else results[0]


def _forward(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Context, tuple[Any, ...], Any]:
    """The context after the forward pass, all arguments by position, and the result of forward."""
    apart = cls.setup_context is not Function.setup_context  # forward(x), setup_context(ctx, inputs, output)
    if apart:
        bound = inspect.signature(cls.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        args = bound.args
    ctx = _Context(tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in args))
    before = _versions(args)
    with torch.no_grad():
        output = cls.forward(*args) if apart else cls.forward(ctx, *args)
        if apart:
            cls.setup_context(ctx, args, output)
    ctx.dirty |= _versions(args) != before
    return ctx, args, output


def _versions(args: tuple[Any, ...]) -> list[int]:
    """How often each tensor was written to."""
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


@dataclass(frozen=True)
class _Transpose:
    """The transpose of the backward pass of one application."""

    cls: Any
    ctx: _Context
    args: tuple[Any, ...]
    outputs: list[Any]
    flowing: list[bool]  # which outputs have a gradient

    def run(self) -> dict[int, Tensor]:
        """For each output (by number) that depends on an input: a tensor of its type whose derivative is backward."""
        fixed, wanted = self.ctx.tensors(), self._wanted()
        positions = [position for position, flows in enumerate(self.flowing) if flows]
        with _apart_from_export():
            copies = [_like(tensor) for tensor in fixed]
            grads = [_like(self.outputs[position]) for position in positions]
            backward = self._backward(copies, grads)
            problem = not_linear(backward, _placeholders(backward)[len(fixed) :])
            if problem:
                raise _Refusal(problem)
            transposed = _transposed(backward, copies, grads, [_like(self.args[position]) for position in wanted])
        given = [*(tensor.detach() for tensor in fixed), *(self.args[position] for position in wanted)]
        with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
            found = _Replay(transposed).run(*given)
        return {position: tensor for position, tensor in zip(positions, found) if tensor is not None}

    def _wanted(self) -> list[int]:
        return [position for position, needed in enumerate(self.ctx.needs_input_grad) if needed]

    def _backward(self, fixed: Sequence[Tensor], grads: Sequence[Tensor]) -> fx.GraphModule:
        """``(fixed, grads) -> gradients`` of the inputs that need one, as operators that write into nothing."""
        count = len(fixed)

        def run(*tensors: Tensor) -> list[Tensor | None]:
            found = self._gradients(self.ctx.with_tensors(tensors[:count]), iter(tensors[count:]))
            return [self._as_autograd_takes(found[position], self.args[position]) for position in self._wanted()]

        try:
            with torch.no_grad():
                graph = make_fx(torch.func.functionalize(run))(*fixed, *grads)
        except _Refusal:
            raise
        except Exception as error:  # anything that the user's code, or tracing it, may raise
            raise _not_traced(error) from error
        graph.graph.eliminate_dead_code()
        constants = [getattr(graph, node.target) for node in graph.graph.nodes if node.op == "get_attr"]
        if any(isinstance(tensor, FakeTensor) and tensor.constant is None for tensor in constants):
            raise _Refusal(
                "its backward reads a tensor that forward has not saved",
                "save it with ctx.save_for_backward, or as an attribute of ctx",
            )
        return graph

    def _gradients(self, ctx: _Context, grads: Iterator[Tensor]) -> tuple[Any, ...]:
        """The results of backward, one for each argument."""
        incoming = [next(grads) if flows else self._no_gradient(y) for y, flows in zip(self.outputs, self.flowing)]
        own = self.cls.backward is not Function.backward
        found = (self.cls.backward if own else self.cls.vjp)(ctx, *incoming)
        found = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        surplus = found[len(self.args) :]
        if len(found) < len(self.args) or any(grad is not None for grad in surplus):
            raise _Refusal(
                f"its backward returns {len(found)} gradients for {len(self.args)} arguments of forward",
                "return one gradient, or None, for each argument",
            )
        return found

    def _no_gradient(self, output: Any) -> Tensor | None:
        materialized = self.ctx.materialized and isinstance(output, Tensor)
        return torch.zeros(output.shape, dtype=output.dtype) if materialized else None

    def _as_autograd_takes(self, grad: Tensor | None, x: Tensor) -> Tensor | None:
        """The gradient in the shape and dtype of the argument, as torch's engine converts it."""
        if grad is None:
            return None
        return (grad if grad.shape == x.shape else grad.sum_to_size(x.shape)).to(x.dtype)


def _not_traced(error: Exception) -> _Refusal:
    kind, where = type(error).__name__, user_line(traceback.extract_tb(error.__traceback__))
    if kind in _LOOKS_AT_VALUES:
        reason = "its backward looks at the values in a tensor (.item(), a branch, boolean indexing)"
    else:
        reason = f"its backward cannot be traced: {kind}: {' '.join(str(error).split())[:200]}"
    return _Refusal(f"{reason}\n  at {where}")


def _transposed(
    backward: fx.GraphModule, fixed: Sequence[Tensor], grads: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> fx.GraphModule:
    """``(fixed, cotangents) -> transpose(backward)(cotangents)``; None for a gradient on which nothing depends."""
    count, ends = len(fixed), len(fixed) + len(grads)

    def run(*tensors: Tensor) -> Any:
        variables = [tensor.detach().requires_grad_() for tensor in tensors[count:ends]]
        found = pytree.tree_leaves(_Replay(backward).run(*tensors[:count], *variables))
        pairs = [(grad, end) for grad, end in zip(found, tensors[ends:]) if grad is not None and grad.requires_grad]
        if not pairs:
            return [None] * len(variables)
        outputs, cotangents = zip(*pairs)
        return torch.autograd.grad(outputs, variables, cotangents, allow_unused=True)

    try:
        with torch.enable_grad():
            graph = make_fx(run, decomposition_table=_DECOMPOSED)(*fixed, *grads, *cotangents)
    except RuntimeError as error:  # an operator without a derivative
        raise _Refusal(f"its backward cannot be transposed: {' '.join(str(error).split())[:200]}") from error
    graph.graph.eliminate_dead_code()
    for node in _placeholders(graph)[count:ends]:
        assert not node.users, f"a transpose that depends on its gradient: {node.users}"
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


_DECOMPOSED = {
    target: decomposition
    for target, decomposition in torch._decomp.core_aten_decompositions().items()  # type: ignore[no-untyped-call]
    if target._schema.name.endswith(("_backward", "_backward_data"))
}


class _Replay(fx.Interpreter):
    """Run a traced graph as if the user had written its operators."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A constant; a fake one (of a number in the user's code) is created anew from the number."""
        tensor = super().get_attr(target, args, kwargs)
        return torch.tensor(tensor.tolist(), dtype=tensor.dtype) if isinstance(tensor, FakeTensor) else tensor

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.copy.default:  # the one functional operator without a derivative
            return args[1].to(args[0].dtype).expand(args[0].shape)
        if target is aten.detach.default:  # nothing stops the gradients that backward passes on
            return args[0]
        return super().call_function(target, args, kwargs)


def _placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


@contextmanager
def _apart_from_export() -> Iterator[None]:
    """Hide the operators within from the export under way; fake tensors, and modes of others, stay on."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    kept = [mode for mode in modes if not type(mode).__module__.startswith("torch.")]

    def switch(off: Sequence[Any], on: Sequence[Any]) -> None:
        for _ in off:
            _pop_mode()  # type: ignore[no-untyped-call]
        for mode in on:
            _push_mode(mode)  # type: ignore[no-untyped-call]

    switch(modes, kept)
    try:
        with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", enabled=False):
            yield
    finally:
        switch(kept, modes)
