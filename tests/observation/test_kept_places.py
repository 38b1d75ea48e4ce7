"""What forward keeps in classes, functions, variables around and caches: made before a trace, or refused by name."""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.errors import AutoparError, TraceError
from autopar.observation.kept_places import STAND_INS, KeptPlaces
from tests.observation.test_observation import compare


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def table(rows: int) -> Tensor:
    return torch.arange(rows)[:, None] * torch.linspace(0.1, 1.0, 4)


class Tables:
    latest: Tensor | None = None
    passed: Tensor = torch.zeros(0)
    by_rows: dict[int, Tensor] = {}
    only: Tables | None = None
    average: Tensor = torch.zeros(4)
    calls = 0

    def __init__(self) -> None:
        self.own: dict[int, Tensor] = {}

    @classmethod
    def instance(cls) -> Tables:
        if cls.only is None:
            cls.only = cls()
        return cls.only

    @classmethod
    def of(cls, rows: int) -> Tensor:
        if cls.latest is None or len(cls.latest) != rows:
            cls.latest = table(rows)
        return cls.latest

    @classmethod
    def kept_of(cls, rows: int) -> Tensor:
        if rows not in cls.by_rows:
            cls.by_rows[rows] = table(rows)
        return cls.by_rows[rows]

    def own_of(self, rows: int) -> Tensor:
        if rows not in self.own:
            self.own[rows] = table(rows)
        return self.own[rows]


class Slotted:
    __slots__ = ("made",)

    def __init__(self) -> None:
        self.made: Tensor | None = None


class Equal:
    """All are equal, so that what one has remembered is there for the next."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    def __hash__(self) -> int:
        return 1

    @functools.lru_cache  # noqa: B019
    def table(self, rows: int) -> Tensor:
        return table(rows)


def of_function(rows: int) -> Tensor:
    made: dict[int, Tensor] = of_function.__dict__.setdefault("made", {})
    if rows not in made:
        made[rows] = table(rows)
    return made[rows]


@functools.lru_cache
def remembered(rows: int) -> dict[str, Tensor]:
    return {"table": table(rows)}


@functools.cache
def remembered_for_ever(rows: int) -> Tensor:
    return table(rows)


def around() -> tuple[Callable[[int], Tensor], Callable[[Tensor], None], Callable[[], Tensor], Callable[[], int]]:
    made, current, count = None, torch.zeros(0), 0

    def get(rows: int) -> Tensor:
        nonlocal made
        if made is None or len(made) != rows:
            made = table(rows)
        return made

    def put(x: Tensor) -> None:
        nonlocal current
        current = x

    def counted() -> int:
        nonlocal count
        count += 1
        return count

    return get, put, lambda: current, counted


OF_VARIABLE, PUT, CURRENT, COUNTED = around()
BY_MODULE: weakref.WeakKeyDictionary[nn.Module, dict[int, Tensor]] = weakref.WeakKeyDictionary()
GLOBAL: Any = None
Body = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    slotted = Slotted()

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.linear, self.body = nn.Linear(4, 4), body

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.body(self, x)).square().mean()  # type: ignore[no-any-return]

    @functools.lru_cache  # noqa: B019
    def table(self, rows: int) -> Tensor:
        return table(rows)

    @staticmethod
    @functools.cache
    def static_table(rows: int) -> Tensor:
        return table(rows)


def _in_slot(net: Net, x: Tensor) -> Tensor:
    if net.slotted.made is None or len(net.slotted.made) != len(x):
        net.slotted.made = table(len(x))
    return x + net.slotted.made


def _by_module(net: Net, x: Tensor) -> Tensor:
    return x + BY_MODULE.setdefault(net, {}).setdefault(len(x), table(len(x)))


def _passed_in_class(net: Net, x: Tensor) -> Tensor:
    Tables.passed = x
    return x + Tables.passed.mean(0)


def _passed_around(net: Net, x: Tensor) -> Tensor:
    PUT(x)
    return x + CURRENT().mean(0)


def _passed_in_global(net: Net, x: Tensor) -> Tensor:
    global GLOBAL
    GLOBAL = x
    return x + GLOBAL.mean(0)  # type: ignore[no-any-return]


RIGHT: dict[str, Body] = {
    "an attribute of a class": lambda net, x: x + Tables.of(len(x)),
    "a dict of a class": lambda net, x: x + Tables.kept_of(len(x)),
    "the only object of a class": lambda net, x: x + Tables.instance().own_of(len(x)),
    "an attribute of a function": lambda net, x: x + of_function(len(x)),
    "a variable around": lambda net, x: x + OF_VARIABLE(len(x)),
    "a slot": _in_slot,
    "a dict of weak references": _by_module,
    "a function that remembers": lambda net, x: x + remembered(len(x))["table"],
    "a function that remembers for ever": lambda net, x: x + remembered_for_ever(len(x)),
    "a method that remembers": lambda net, x: x + net.table(len(x)),
    "a static method that remembers": lambda net, x: x + net.static_table(len(x)),
    "a method that remembers, of what forward makes": lambda net, x: x + Equal().table(len(x)),
    "passed on in a class": _passed_in_class,
    "passed on in a variable around": _passed_around,
    "passed on in a global": _passed_in_global,
}


def _averages(net: Net, x: Tensor) -> Tensor:
    Tables.average = 0.9 * Tables.average + 0.1 * x.mean(0)
    return x - Tables.average


def _counts(net: Net, x: Tensor) -> Tensor:
    Tables.calls += 1
    return x * Tables.calls


def _counts_in_function(net: Net, x: Tensor) -> Tensor:
    of_function.__dict__["calls"] = of_function.__dict__.get("calls", 0) + 1
    return x * of_function.__dict__["calls"]


REFUSED: dict[str, tuple[Body, str]] = {
    "an average in a class": (_averages, "'Tables.average' from call to call .from a tensor .4. to a tensor .4."),
    "a count in a class": (_counts, "'Tables.calls' from call to call .from 1 to 2"),
    "a count in a function": (_counts_in_function, "'of_function.calls' from call to call"),
    "a count in a variable around": (lambda net, x: x * COUNTED(), "'count .variable around .*counted.' from call"),
}


def _all(net: Net, x: Tensor) -> Tensor:
    for body in RIGHT.values():
        x = body(net, x)
    return x


@pytest.mark.parametrize(
    "body", [_all, *(pytest.param(body, marks=pytest.mark.slow) for body in RIGHT.values())], ids=["all", *RIGHT]
)
def test_what_is_made_once_is_made_before_the_trace(body: Body) -> None:
    torch.manual_seed(0)
    model = Net(body)
    parallel = autopar.parallelize(model, Mesh(dp=2))
    for rows in (4, 6):
        compare(parallel, model, torch.randn(rows, 4))


@pytest.mark.parametrize(("body", "said"), REFUSED.values(), ids=REFUSED)
def test_what_changes_from_call_to_call_is_refused_and_undone(body: Body, said: str) -> None:
    parallel = autopar.parallelize(Net(body), Mesh(dp=2), Plan(check_numerics=False))
    with pytest.raises(TraceError, match=said):
        parallel.simulate(torch.randn(4, 4))
    assert inspect.getclosurevars(COUNTED).nonlocals == {"count": 0}
    assert Tables.calls == 0 and "calls" not in vars(of_function)
    assert torch.equal(Tables.average, torch.zeros(4))


def test_what_is_passed_on_is_not_available_afterwards() -> None:
    parallel = autopar.parallelize(Net(_passed_in_class), Mesh(dp=2), example_inputs=(torch.randn(4, 4),))
    parallel.simulate(torch.randn(4, 4))
    with pytest.raises(AutoparError, match=r"'Tables.passed'.*\n.*return the tensor"):
        Tables.passed.sum()


def test_a_place_at_which_nobody_looks_is_said() -> None:
    def use(net: Net, x: Tensor) -> Tensor:
        if not hasattr(math, "table_of_test"):
            math.table_of_test = table(len(x))  # type: ignore[attr-defined]
        return x + math.table_of_test  # type: ignore[attr-defined, no-any-return]

    try:
        with pytest.raises(TraceError, match="where autopar does not look.*\nWay out"):
            autopar.parallelize(Net(use), Mesh(dp=2)).simulate(torch.randn(4, 4))
    finally:
        del math.table_of_test  # type: ignore[attr-defined]


def test_a_function_forgets_what_is_of_a_trace_alone() -> None:
    held: list[Any] = [torch.ones(2)]

    @functools.lru_cache
    def own(number: int) -> Any:
        return {"of": [held[0], number]}

    kept, stands = KeptPlaces(), torch._subclasses.FakeTensorMode().from_tensor(torch.ones(2))
    kept.meet(own)
    own(1)
    kept.forget()
    assert own.cache_info().currsize == 1
    held[0] = stands
    assert isinstance(own(2)["of"][0], STAND_INS)
    kept.forget()
    assert own.cache_info().currsize == 0
