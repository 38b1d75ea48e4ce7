"""All ranks of a mesh in one process, by the very code that ranks run: once, on variables with a value for each rank.

    linear = aten_linear(x, p_up_weight)            torch's function, for each rank
    add_ = aten_add__Tensor(linear, bias); del ...  writes into the memory of ``linear``, as on a rank
    start = comm.start_all_reduce(add_, "dp")       poison until
    wait = comm.wait(start, "dp")                   the collective runs here, on what its argument holds by now

So a wait that is missing, and memory that is used again while something is still needed there, give other numbers than
:mod:`autopar.simulator.lockstep`, which runs the graphs and writes nothing in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from autopar.codegen.python import compile_source, emit
from autopar.errors import AutoparError, InvariantError
from autopar.ir import collectives as comm
from autopar.ir.operator_facts import argument_names
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.simulator.lockstep import Lockstep, Ranks, collective

FIRST = ("x", "axis", "op")  # the arguments of a collective that emitted code passes by position
LEFT_OUT = {"op": "sum", "outer": 1, "ratio": [1], "length": 0}
ERRORS = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)


class EmittedLockstep(Lockstep):
    """As :class:`Lockstep`, by emitted code. It counts neither bytes sent nor bytes held.

    ``compiles``: what lies between collectives is compiled by Inductor, as on ranks with ``Plan(compile="inductor")``.
    """

    def __init__(self, mesh: Mesh, compiles: bool = False) -> None:
        super().__init__(mesh)
        self._compiles = compiles
        self._functions: dict[int, tuple[fx.Graph, Callable[..., Any]]] = {}

    def run(self, graph: fx.Graph, inputs: list[Ranks], phase: str = "forward") -> list[Ranks]:
        """Raises InvariantError where the code fails, or leaves a collective under way."""
        if id(graph) not in self._functions:
            self._functions[id(graph)] = graph, _function(graph, self.mesh, phase, self._compiles)
        given = [Values(ranks) for ranks in inputs]
        inputs.clear()
        communicator = LockstepCommunicator(self)
        try:
            found = self._functions[id(graph)][1](communicator, given)
        except AutoparError:
            raise
        except ERRORS as problem:
            raise InvariantError(f"the code of {phase} fails: {type(problem).__name__}: {problem}") from problem
        communicator.refuse_left_over()
        return [value.of if isinstance(value, Values) else [value] * self.mesh.world_size for value in found]

    def hold(self, values: Iterable[Ranks]) -> None:
        """Nothing is counted."""

    def drop(self, values: Iterable[Ranks]) -> None:
        """Nothing is counted."""

    @contextmanager
    def holding(self, values: Iterable[Ranks]) -> Iterator[None]:
        """Nothing is counted."""
        yield

    def count(self, phase: str, axis: str, name: str, operations: int, sent: int) -> None:
        """Nothing is counted."""


class Values:
    """The value of a variable on each rank."""

    def __init__(self, of: Ranks) -> None:
        self.of = of

    def __getitem__(self, index: Any) -> Any:
        return _on_ranks(operator.getitem, self, index)


def _infix(apply: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (lambda self, other: _on_ranks(apply, self, other)), (lambda self, other: _on_ranks(apply, other, self))


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod"):
    _there, _back = _infix(getattr(operator, _name))
    setattr(Values, f"__{_name}__", _there)
    setattr(Values, f"__r{_name}__", _back)


def _function(graph: fx.Graph, mesh: Mesh, name: str, compiles: bool) -> Callable[..., Any]:
    """The emitted function of ``graph``, whose operators and regions take and give :class:`Values`."""
    program = Program(graph, mesh, Plan(), (), ())
    function: Any
    if compiles:
        from autopar.inductor.functions import regional_function

        function = regional_function(name, graph, program)
    else:
        function = compile_source(emit({name: graph}, program), name)
    bound = function.__globals__
    for key, value in list(bound.items()):
        if key == "op":
            bound[key] = _Operators(value)
        elif callable(value) and value is not function:
            bound[key] = partial(_on_ranks, value)
    return function  # type: ignore[no-any-return]


class _Operators:
    """The operators of autopar, on :class:`Values`."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(_on_ranks, getattr(self._module, name))


def _on_ranks(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``apply`` on every rank; ranks that hold the very same arguments share the work, and the result."""
    several = [value for value in _flat((args, kwargs)) if isinstance(value, Values)]
    if not several:
        return apply(*args, **kwargs)
    ranks = range(len(several[0].of))
    calls = {tuple(id(value.of[rank]) for value in several): rank for rank in reversed(ranks)}
    arguments = {key: (_at(args, rank), _at(kwargs, rank)) for key, rank in calls.items()}
    if _writes(apply):
        _part(arguments)
    done = {key: apply(*given, **named) for key, (given, named) in arguments.items()}
    return Values([done[tuple(id(value.of[rank]) for value in several)] for rank in ranks])


def _part(arguments: dict[Any, tuple[Any, Any]]) -> None:
    """Before a write: of several ranks that share the memory, and write other things, all but one get their own."""
    owners: set[int] = set()
    for key, (given, named) in arguments.items():
        if id(given[0]) in owners:
            arguments[key] = (given[0].clone(), *given[1:]), named
        owners.add(id(given[0]))


def _writes(apply: Any) -> bool:
    schema = getattr(apply, "_schema", None)
    name = getattr(apply, "__name__", "")
    return bool(schema.is_mutable) if schema is not None else name.endswith("_") and not name.endswith("__")


def _flat(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple | list):
        for inner in tree:
            yield from _flat(inner)
    elif isinstance(tree, dict):
        yield from _flat(list(tree.values()))
    else:
        yield tree


def _at(tree: Any, rank: int) -> Any:
    if isinstance(tree, Values):
        return tree.of[rank]
    if isinstance(tree, tuple | list):
        return type(tree)(_at(inner, rank) for inner in tree)
    if isinstance(tree, dict):
        return {key: _at(inner, rank) for key, inner in tree.items()}
    return tree


class LockstepCommunicator:
    """The ``comm`` of emitted code, for all ranks at once. It stands for the methods of a communicator of one rank."""

    device = torch.device("cpu")

    def __init__(self, lockstep: Lockstep) -> None:
        self._lockstep, self._mesh = lockstep, lockstep.mesh
        self._under_way: dict[tuple[int, ...], tuple[Values, Callable[[], Ranks], str]] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in comm.NAMES:
            raise AttributeError(name)
        return partial(self._communicate, name)

    def axis_index(self, axis: str) -> Values:
        ranks = map(self._mesh.coordinates, range(self._mesh.world_size))
        return Values([torch.tensor(self._mesh.position(axis, here)) for here in ranks])

    def wait(self, x: Values, axis: str) -> Values:
        """Let the collective arrive in the memory of ``x``."""
        if self._mesh.size(axis) == 1:
            return x
        if _key(x) not in self._under_way:
            raise InvariantError(f"a wait over axis '{axis}' for what was never started")
        _, compute, _ = self._under_way.pop(_key(x))
        return _arrived(x, compute())

    def refuse_left_over(self) -> None:
        """Raise InvariantError for a collective that nobody has waited for."""
        for _, _, name in self._under_way.values():
            raise InvariantError(f"the code starts {name} and never waits for it")

    def _on_each(self, x: Any) -> Values:
        """``x``, or the same on every rank: what is made of no argument (positions of a sequence) is made once."""
        return x if isinstance(x, Values) else Values([x] * self._mesh.world_size)

    def _communicate(self, name: str, *given: Any, **named: Any) -> Values:
        arguments = {**LEFT_OUT, **dict(zip(FIRST, given)), **named}
        axis, x = arguments["axis"], self._on_each(arguments["x"])
        moves = comm.moving(getattr(comm.OPS, name).default) is not None
        if moves and self._mesh.size(axis) == 1:
            return Values([part.clone() for part in x.of]) if name.endswith("shift") else x
        names = argument_names(getattr(comm.OPS, name).default)
        rest = [arguments[key] for key in names if key not in ("x", "axis")]
        compute: Callable[[], Ranks] = partial(self._computed, name, x, axis, rest)
        in_place = bool(arguments.get("in_place"))
        if name not in comm.STARTED and not in_place:
            return Values(compute())
        results = compute()
        memory = _in_memory_of(x, results) if in_place else _poisoned(results)
        if name not in comm.STARTED:
            return _arrived(memory, results)
        self._under_way[_key(memory)] = memory, (lambda: results) if in_place else compute, f"{name} over axis '{axis}'"
        return memory

    def _computed(self, name: str, x: Values, axis: str, rest: Sequence[Any]) -> Ranks:
        results: Ranks = [None] * self._mesh.world_size
        for group in self._lockstep.groups(axis):
            own = [x.of[rank] for rank in group]
            given = (axis, *([of.of[rank] for rank in group] if isinstance(of, Values) else of for of in rest))
            for rank, result in zip(group, collective(name, own, given)):
                results[rank] = result
        return results


def _key(values: Values) -> tuple[int, ...]:
    return tuple(map(id, values.of))


def _arrived(x: Values, results: Ranks) -> Values:
    """``x``, in whose memory ``results`` are now."""
    for memory, value in {id(memory): (memory, value) for memory, value in zip(x.of, results)}.values():
        memory.copy_(value)
    return x


def _in_memory_of(x: Values, results: Ranks) -> Values:
    """Memory for ``results``, shared as they are, from that of ``x``, in which nobody may read any more."""
    found: dict[int, Tensor] = {}
    for part, result in zip(x.of, results):
        if not any(part is memory for memory in found.values()):
            found.setdefault(id(result), part)
    for part in x.of:
        part.copy_(_poison(part))
    return Values([found.setdefault(id(result), _poison(result)) for result in results])


def _poisoned(results: Ranks) -> Values:
    """Memory for ``results``, with what nobody may read in it; shared as they are."""
    made = {id(result): _poison(result) for result in results}
    return Values([made[id(result)] for result in results])


def _poison(like: Tensor) -> Tensor:
    empty = torch.empty(like.shape, dtype=like.dtype)
    if like.dtype is torch.bool:
        return torch.logical_not(like)
    if like.is_floating_point() or like.is_complex():
        return empty.fill_(torch.nan)
    return empty.fill_(torch.iinfo(like.dtype).min)
