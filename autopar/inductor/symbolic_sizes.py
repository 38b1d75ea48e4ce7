"""The one door to torch's symbolic shapes: a function of tensors of many sizes, compiled by Inductor once.

Sizes of a batch are symbols of torch's (``SymInt``), the first arguments of what is compiled. What Inductor assumes of
them (a size is not 1, two are equal) it writes down, and that is asked of other sizes before they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from autopar.inductor.torch_inductor import Pure, inductor_of, patched
from autopar.ir.sizes import is_expression

Order = tuple[tuple[int, int], ...]  # of dims, the innermost first: (dim, stride in units of the one before)
aten = torch.ops.aten
SIZES = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)


@dataclass(frozen=True)
class ForSizes:
    """What Inductor made of a function: ``pure`` takes the values of the symbols before the tensors.

    ``orders``: of the tensors in memory. ``assumed``: what was written down, in torch's words; "" for nothing.
    """

    pure: Pure
    orders: tuple[Order, ...]
    assumed: str

    def fits(self, orders: tuple[Order, ...], values: Sequence[int]) -> bool:
        """Whether it serves tensors in these ``orders``, of the sizes that ``values`` of the symbols make."""
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        if orders != self.orders:
            return False
        return not self.assumed or bool(ShapeEnv().evaluate_guards_expression(self.assumed, list(values)))

    def at(self, values: Sequence[int]) -> Pure:
        """The function of tensors of one size."""
        pure, first = self.pure, list(values)

        def of_tensors(operands: list[Tensor]) -> tuple[Tensor, ...]:
            given: list[Any] = [*first, *operands]
            operands.clear()
            return pure(given)

        return of_tensors


def order_of(tensor: Tensor) -> Order | None:
    """How ``tensor`` lies in memory, but for its sizes; None where that depends on them."""
    dims = [dim for dim in range(tensor.dim()) if tensor.shape[dim] != 1 and tensor.stride(dim)]
    found, unit = [], 1
    for dim in sorted(dims, key=lambda dim: (tensor.stride(dim), -dim)):
        ratio, rest = divmod(tensor.stride(dim), unit)
        if rest or not ratio:
            return None
        found.append((dim, ratio))
        unit = tensor.stride(dim) * tensor.shape[dim]
    return tuple(found)


def value_at(expression: Any, symbols: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression of :mod:`autopar.families.forms` at ``symbols``: SymInts, or whole numbers."""
    if not is_expression(expression):
        return expression
    top, bottom = sympy.fraction(sympy.together(expression))
    upper, lower = (sympy.lambdify(list(symbols), part, modules=[{}])(*symbols.values()) for part in (top, bottom))
    if bottom.free_symbols:
        return upper / lower  # a float, the inverse of a number of rows
    return upper if bottom == 1 else upper // int(bottom)


def compiled_for_sizes(
    function: Callable[[list[Tensor], tuple[Any, ...]], Sequence[Tensor]],
    operands: Sequence[Tensor],
    shapes: Sequence[Sequence[Any]],
    sizes: Sequence[Any],
    values: Mapping[sympy.Symbol, int],
    allows: Callable[[fx.GraphModule], None],
) -> ForSizes:
    """``function(tensors, sizes)`` for all sizes; ``shapes`` (of the ``operands``) and ``sizes`` are expressions.

    ``values``: of the symbols in them, for these operands. ``allows`` raises for a graph that is not to be compiled.
    Raises ValueError where the operands' strides depend on sizes, and whatever Inductor does.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    orders = [order for tensor in operands if (order := order_of(tensor)) is not None]
    if len(orders) < len(operands):
        raise ValueError("its operands lie in memory in a way that depends on the length")
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    symbols = {symbol: _symint(env, str(symbol), value) for symbol, value in values.items()}
    count = len(symbols)

    def whole(*given: Any) -> tuple[Tensor, ...]:
        at = dict(zip(symbols, given[:count]))
        return tuple(function(list(given[count:]), tuple(value_at(size, at) for size in sizes)))

    with mode:
        fakes = [_fake(*one, symbols) for one in zip(operands, shapes, orders)]
        inputs = [*symbols.values(), *fakes]
        table = inductor_of().decompositions | {aten.addcmul.default: _addcmul, aten.constant_pad_nd.default: _padded}
        graph: fx.GraphModule = make_fx(whole, decomposition_table=table)(*inputs)
    allows(graph)
    with mode, tracing(TracingContext(mode)), patched():
        found = inductor_of().compile(graph, inputs)
    assumed = env.produce_guards_expression(list(symbols.values()))
    return ForSizes(found.current_callable or found, tuple(orders), assumed or "")


def _addcmul(x: Tensor, one: Tensor, other: Tensor, *, value: float = 1) -> Tensor:
    """As torch (2.13) fails to do with symbols where one is broadcast."""
    return x + (one * other if value == 1 else one * other * value)


def _padded(x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    """``constant_pad_nd``, for which torch (2.13) puts numbers in the places of symbols."""
    for place, (before, after) in enumerate(zip(pad[::2], pad[1::2])):
        dim = x.dim() - 1 - place
        x = aten.slice.Tensor(x, dim, max(-before, 0), x.shape[dim] - max(-after, 0))
        sizes = [[many if at == dim else size for at, size in enumerate(x.shape)] for many in (before, after)]
        around = [x.new_full(size, value) if many > 0 else None for size, many in zip(sizes, (before, after))]
        parts = [part for part in (around[0], x, around[1]) if part is not None]
        x = torch.cat(parts, dim) if len(parts) > 1 else x
    return x


def _symint(env: Any, name: str, value: int) -> Any:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(name)
    symbol = env.create_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return env.create_symintnode(symbol, hint=value, source=source)


def _fake(tensor: Tensor, shape: Sequence[Any], order: Order, symbols: Mapping[sympy.Symbol, Any]) -> Tensor:
    """A tensor without data like ``tensor``, with symbols in its sizes and strides."""
    sizes = [value_at(size, symbols) for size in shape]
    strides: list[Any] = [0 if size != 1 and not stride else 1 for size, stride in zip(tensor.shape, tensor.stride())]
    unit: Any = 1
    for dim, ratio in order:
        strides[dim] = unit * ratio
        unit = strides[dim] * sizes[dim]
    return torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
