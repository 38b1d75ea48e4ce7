"""What the Python of a model asks about the sizes of its inputs: ``if length % 3 == 0``, ``if rows > 8``.

The door to torch's record of such questions (``ShapeEnv``): forward runs once on inputs without data, whose sizes are
symbols (``SymInt``). Each time Python asks for a truth of one, torch answers for the example's size and writes down the
question. Source: https://docs.pytorch.org/docs/stable/user_guide/torch_compiler/compile/dynamic_shapes.html.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import sympy
import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopar import operators
from autopar.frontend.block_stand_ins import alike_blocks_run_once
from autopar.frontend.capture import explained, without_checkpointing
from autopar.frontend.steady_state import runnable_on_fakes
from autopar.frontend.trace import ALONE
from autopar.ir.size_conditions import ROUNDED, Condition, Dims, Sizes, Tree, is_plain, is_rounded, rounded
from autopar.observation.observation import Observation
from autopar.observation.source_lines import is_users_file, line_of_user

logger = logging.getLogger("autopar")

_NAMES = {  # of torch's operations on sizes
    "Mod": "mod", "PythonMod": "mod", "FloorDiv": "floordiv", "CleanDiv": "floordiv", "IntTrueDiv": "truediv",
    "FloatTrueDiv": "truediv", "ToFloat": "float", "FloorToInt": "floor", "floor": "floor", "CeilToInt": "ceil",
    "ceiling": "ceil", "TruncToInt": "trunc", "TruncToFloat": "trunc", "OpaqueUnaryFn_sqrt": "sqrt",
    "OpaqueUnaryFn_log": "log", "OpaqueUnaryFn_log2": "log2", "BitwiseFn_bitwise_and": "bitand",
    "BitwiseFn_bitwise_or": "bitor", "Max": "max", "Min": "min", "Add": "add", "Mul": "mul", "And": "and", "Or": "or",
    "Not": "not", "Equality": "eq", "Unequality": "ne", "StrictLessThan": "lt", "LessThan": "le",
    "StrictGreaterThan": "gt", "GreaterThan": "ge",
}  # fmt: skip
_OPERATORS = str(Path(operators.__file__).parent)
MOST_FACTORS = 4  # of a power of a size
LEAST = 2  # sizes that are symbols: torch takes 0 and 1 for numbers, and what is asked about those is not seen
MOST, MOST_CALLS = 64, 20_000  # questions, and calls of operators, of one run
MOST_ROUNDED = 6  # sizes that are made of others by rounding: of more, too many expressions would give a number


@dataclass(frozen=True)
class Asked:
    """A question with its answer, in torch's symbols; ``line`` and ``is_number`` as of :class:`Condition`."""

    expression: Any
    line: str = ""
    is_number: bool = False


def questions(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dims: Dims,
    sizes: Sizes,
) -> list[Condition]:  # fmt: skip
    """What forward asks, as conditions that hold at ``sizes``.

    ``dims``: for each tensor among the arguments, of each dim its size or the name of it. Where the user's code makes a
    number of a size (``int(length)``, ``len(rows)``, ``math.sqrt(length)``, a key of a dict), what it asks of that is
    not seen, and the condition is that size itself; so it is for a size of 0 or 1. Nothing is seen of a model that does
    not run on symbols, or asks
    more than ``MOST`` questions. The model is as it was, afterwards; a run that came to its end tells those who collect
    guards and records of traces what it has read. The sizes of tensors that forward makes of others by rounding are
    among the conditions, see :func:`autopar.ir.size_conditions.rounded`.
    """
    environment = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=environment)
    symbols = {name: _symint(environment, name, size) for name, size in sizes.items() if size >= LEAST}
    names = {str(symint.node.expr): name for name, symint in symbols.items()}
    places, asked, made = iter(dims), list[Asked](), dict[Any, None]()

    def fake(leaf: Tensor) -> Tensor:
        shape = [symbols.get(size, sizes[size]) if isinstance(size, str) else size for size in next(places)]
        return torch.empty(shape, dtype=leaf.dtype).requires_grad_(leaf.requires_grad)

    try:
        with mode:
            given = pytree.tree_map_only(Tensor, fake, (args, dict(kwargs)))
        observation = Observation(model)
        with (
            ALONE, explained(model), runnable_on_fakes(model, mode, anywhere=True), without_checkpointing([]),
            _as_exported(), mode, enable_python_dispatcher(), alike_blocks_run_once(model, observation),
            observation.watching(), _noticed(asked), _Limited(environment, made),
        ):  # fmt: skip
            model(*given[0], **given[1])
        observation.report(None)
    except Exception as problem:  # a family without conditions is what there was before
        logger.debug("what the model asks about sizes was not seen: %r", problem)
    asked += [Asked(guard.expr) for guard in environment.guards if not _is_number_of(guard.expr)]
    found = [one for one in dict.fromkeys(_conditions(asked, names)) if one.holds(sizes)]
    alone = [Condition(("eq", name, size)) for name, size in sizes.items() if size < LEAST]
    return alone + (found if len(found) <= MOST else []) + _rounded(made, names, sizes)


class _Limited(TorchFunctionMode):
    """Ends a run that asks more than can be kept: of long expressions each question takes longer than the last.

    ``made``: takes what is rounded in the sizes of tensors.
    """

    def __init__(self, environment: ShapeEnv, made: dict[Any, None]) -> None:
        super().__init__()
        self._environment, self._calls, self._made = environment, 0, made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls += 1
        if len(self._environment.guards) > MOST or self._calls > MOST_CALLS:
            raise RuntimeError(f"it calls {self._calls} operators, and asks {len(self._environment.guards)} questions")
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, Tensor) and len(self._made) <= MOST_ROUNDED:
                shape: Any = tensor.shape
                sizes = [size.node.expr for size in shape if isinstance(size, torch.SymInt)]
                self._made.update((size, None) for size in sizes if size not in self._made and _rounds(size))
        return found


def _rounds(size: Any) -> bool:
    """Whether ``size`` is made of one other, in which something is rounded."""
    names = (_NAMES.get(type(part).__name__) for part in sympy.preorder_traversal(size))
    return len(size.free_symbols) == 1 and any(name in ROUNDED for name in names)


def _rounded(made: Iterable[Any], names: Mapping[str, str], sizes: Sizes) -> list[Condition]:
    """Conditions of those that can be written as one; none of too many."""
    found = []
    for size in made:
        with suppress(_Unknown):
            tree = _tree(size, names)
            if is_plain(tree) and is_rounded(tree):
                found.append(rounded(tree, sizes))
    return found if len(found) <= MOST_ROUNDED else []


@contextmanager
def _noticed(asked: list[Asked]) -> Iterator[None]:
    """Within this context a number that is made of a symbol is that of the example, and the symbol stays one.

    ``asked`` gets what the user's code made a number of, and what it asked: torch notes neither where, nor whether it
    made a number itself.
    """
    answered: Callable[[torch.SymBool], bool] = torch.SymBool.__bool__
    is_not_zero: Callable[[torch.SymInt], bool] = torch.SymInt.__bool__

    def number(symint: torch.SymInt) -> int:
        found = int(symint.node.hint)
        if _is_from_user():
            asked.append(Asked(sympy.Eq(symint.node.expr, found), line_of_user(sys._getframe(1)), is_number=True))
        return found

    def key(symint: torch.SymInt) -> int:
        found = int(symint.node.hint)
        if _is_from_user():
            asked.append(Asked(sympy.Eq(symint.node.expr, found), line_of_user(sys._getframe(1)), is_number=True))
        return hash(found)

    def truth(symbool: torch.SymBool) -> bool:
        question = symbool.node.expr  # afterwards torch knows the answer, and it is True
        answer = answered(symbool)
        if _is_from_user():
            asked.append(Asked(question if answer else sympy.Not(question), line_of_user(sys._getframe(1))))
        return answer

    def is_some(symint: torch.SymInt) -> bool:
        question = sympy.Ne(symint.node.expr, 0)
        answer = is_not_zero(symint)
        if _is_from_user():
            asked.append(Asked(question if answer else sympy.Not(question), line_of_user(sys._getframe(1))))
        return answer

    def divided(symint: torch.SymInt, by: int) -> tuple[Any, Any]:
        return symint // by, symint % by

    methods: dict[str, Any] = {"__int__": number, "__index__": number, "__hash__": key, "__divmod__": divided}
    methods["__bool__"] = is_some
    with mock.patch.multiple(torch.SymInt, create=True, **methods), mock.patch.object(torch.SymBool, "__bool__", truth):
        yield


def _is_from_user() -> bool:
    """Whether the caller's caller is the user's code."""
    file = sys._getframe(2).f_code.co_filename
    return is_users_file(file) and not file.startswith(_OPERATORS)


def _symint(environment: ShapeEnv, name: str, size: int) -> Any:
    from torch._dynamo.source import ConstantSource

    source = ConstantSource(name)
    symbol = environment.create_symbol(size, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return environment.create_symintnode(symbol, hint=size, source=source)


def _as_exported() -> Any:
    """What a model asks of torch is answered as while it is exported."""
    return mock.patch.multiple(torch.compiler, _is_exporting_flag=True, _is_compiling_flag=True)


# ---------------------------------------------------------------- torch's expressions


def _is_number_of(expression: Any) -> bool:
    """Whether torch may have noted that it made a number of a size; what the user's code asks is noticed by itself."""
    return isinstance(expression, sympy.Eq) and any(side.is_number for side in expression.args)


class _Unknown(Exception):
    """An expression of other operations than those of a condition."""


def _conditions(asked: Iterable[Asked], names: Mapping[str, str]) -> Iterator[Condition]:
    for one in asked:
        with suppress(_Unknown):
            tree = _tree(one.expression, names)
            if isinstance(tree, tuple) and is_plain(tree):
                yield Condition(tree, one.line, one.is_number)


def _tree(expression: Any, names: Mapping[str, str]) -> Tree:
    """``expression`` as the tree of a condition. Raises _Unknown."""
    if expression.is_Symbol:
        if str(expression) not in names:
            raise _Unknown
        return names[str(expression)]
    if expression.is_Integer:
        return int(expression)
    if expression.is_Rational:
        return ("truediv", int(expression.p), int(expression.q))
    if expression.is_Float:
        return float(expression)
    parts = [_tree(part, names) for part in expression.args]
    kind = type(expression).__name__
    if kind == "Identity":
        return parts[0]
    if kind in ("Pow", "PowByNatural") and type(parts[1]) is int and 1 < parts[1] <= MOST_FACTORS:
        return ("mul", *[parts[0]] * parts[1])
    if kind == "CeilDiv":
        return ("ceil", ("truediv", *parts))
    if kind not in _NAMES or not parts:
        raise _Unknown
    return (_NAMES[kind], *parts)
