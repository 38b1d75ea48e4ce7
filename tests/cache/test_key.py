"""What a program is found by: everything outside the model's Python that may be in it, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar import Mesh, Plan, rules
from autopar.cache import key
from autopar.cache.key import Request, facts_of
from autopar.cache.reasons import Unstorable
from autopar.ir.layout import Layout
from autopar.observation.trace_record import TraceRecord, recorded_variables

Change = Callable[[Request], Request] | AbstractContextManager[Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor, mode: str = "", n: float = 0) -> Tensor:
        return self.down(self.up(x)) * self.scale + n


def request(**given: Any) -> Request:
    return replace(Request(Net(), Mesh(dp=2, tp=2), Plan(), (torch.ones(4, 4),), {}), **given)


def of_model(change: Callable[[Net], Any]) -> Callable[[Request], Request]:
    def made(before: Request) -> Request:
        model = Net()
        change(model)
        return replace(before, model=model)

    return made


def tie(model: Net) -> None:
    model.down.weight = model.up.weight


def with_kwargs(**kwargs: Any) -> Callable[[Request], Request]:
    return lambda before: replace(before, kwargs=kwargs)


def put(owner: Any, name: str, value: Any) -> AbstractContextManager[Any]:
    return mock.patch.object(owner, name, value)


@contextmanager
def set_by(setter: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    (folder / "site-packages" / "more-1.0.dist-info").mkdir(parents=True)
    with mock.patch("sys.path", [str(folder / "site-packages")]):
        yield


CHANGES: dict[str, Callable[[Path], Change]] = {
    "another torch": lambda _: put(torch, "__version__", "2.99.0"),
    "another build of torch": lambda _: put(torch.version, "git_version", "0" * 40),
    "another Python": lambda _: put(key.sys, "version", "3.99"),
    "another autopar": lambda _: mock.patch("autopar.frontend.fingerprint.own_files", lambda: "other"),
    "another package": installed,
    "another machine": lambda _: put(key.platform, "machine", lambda: "vax"),
    "the default dtype": lambda _: set_by(torch.set_default_dtype, torch.float64, torch.float32),
    "autocast": lambda _: torch.autocast("cpu", torch.bfloat16),
    "no gradients": lambda _: torch.no_grad(),
    "deterministic": lambda _: set_by(torch.use_deterministic_algorithms, True, False),
    "the precision of products": lambda _: set_by(torch.set_float32_matmul_precision, "high", "highest"),
    "a kernel of attention": lambda _: set_by(torch.backends.cuda.enable_flash_sdp, False, True),
    "a setting of torch's": lambda _: put(torch._functorch.config, "functionalize_rng_ops", True),
    "a variable of the environment": lambda _: mock.patch.dict("os.environ", {"TORCH_ANYTHING": "1"}),
    "a rule": lambda _: mock.patch.dict(rules.ADDED, {"mylib.op": rules.from_line("a, a -> a")}),
    "a function of torch": lambda _: put(functional, "gelu", lambda x: x),
    "a method of tensors": lambda _: put(Tensor, "sum", lambda self: self),
    "the mesh": lambda _: lambda before: replace(before, mesh=Mesh(dp=4)),
    "the order of axes": lambda _: lambda before: replace(before, mesh=Mesh(dp=2, sp=2)),
    "the nodes": lambda _: lambda before: replace(before, mesh=Mesh(dp=2, tp=2, node_size=2)),
    "the plan": lambda _: lambda before: replace(before, plan=Plan(zero=3)),
    "comparing numbers": lambda _: lambda before: replace(before, plan=Plan(check_numerics=False)),
    "a layout": lambda _: lambda before: replace(before, layouts={"up.weight": Layout.whole((4, 4))}),
    "a stage": lambda _: lambda before: replace(before, homes={"up.weight": (1,)}),
    "the shape": lambda _: lambda before: replace(before, args=(torch.ones(8, 4),)),
    "the dtype": lambda _: lambda before: replace(before, args=(torch.ones(4, 4).double(),)),
    "the strides": lambda _: lambda before: replace(before, args=(torch.ones(4, 4).t(),)),
    "the device": lambda _: lambda before: replace(before, args=(torch.ones(4, 4, device="meta"),)),
    "a gradient of an input": lambda _: lambda before: replace(before, args=(torch.ones(4, 4, requires_grad=True),)),
    "a text": lambda _: with_kwargs(mode="m" * 500 + "1"),
    "a number": lambda _: with_kwargs(n=1.0),
    "the kind of a number": lambda _: with_kwargs(n=1),
    "a sign of zero": lambda _: with_kwargs(n=-0.0),
    "a frozen parameter": lambda _: of_model(lambda model: model.up.weight.requires_grad_(False)),
    "a tied parameter": lambda _: of_model(tie),
    "evaluation": lambda _: of_model(lambda model: model.eval()),
    "evaluation of a part": lambda _: of_model(lambda model: model.up.eval()),
    "a buffer": lambda _: of_model(lambda model: model.register_buffer("scale", torch.ones(1))),
    "a module more": lambda _: of_model(lambda model: model.add_module("more", nn.ReLU())),
    "the dtype of the model": lambda _: of_model(lambda model: model.double()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_another_key(name: str, tmp_path: Path) -> None:
    change = CHANGES[name](tmp_path)
    before = request()
    facts = facts_of(before)
    if isinstance(change, AbstractContextManager):
        with change:
            after = facts_of(before)
    else:
        after = facts_of(change(before))
    assert facts != after
    assert facts == facts_of(request())


def test_texts_that_begin_alike_are_apart() -> None:
    one, other = (facts_of(request(kwargs={"mode": "m" * 500 + end})) for end in "12")
    assert one != other


@pytest.mark.parametrize(
    "same",
    [
        request(),
        request(plan=Plan(seed=7, timeout=9.0, initial="checked")),
        request(args=(torch.zeros(4, 4),)),
    ],
    ids=["another model", "choices at run time", "other numbers"],
)
def test_it_is_the_same_key(same: Request) -> None:
    with mock.patch.dict("os.environ", {"RANK": "3", "MASTER_PORT": "1", "HOSTNAME": "other"}):
        assert facts_of(same) == facts_of(request())


def test_modes_and_hooks_that_see_each_operator_are_refused() -> None:
    with torch.device("meta"), pytest.raises(Unstorable, match="a mode of torch is on"):
        facts_of(request())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(Unstorable, match="hooks for all modules"):
            facts_of(request())
    finally:
        handle.remove()


def test_what_torch_reads_of_its_own_environment_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads it where one of its modules is loaded first, which is in one process within a trace, in another not."""
    monkeypatch.setenv("TORCHINDUCTOR_SOMETHING", "1")
    record = TraceRecord()
    ask = "import os; os.environ.get('TORCHINDUCTOR_SOMETHING'); os.environ.get('OTHER')"
    with recorded_variables(record):
        exec(compile(ask, f"{os.path.dirname(torch.__file__)}/loaded.py", "exec"))
    assert record.variables == {"OTHER"}
    with recorded_variables(record):
        exec(compile(ask, "/home/script.py", "exec"))
    assert record.variables == {"OTHER", "TORCHINDUCTOR_SOMETHING"}
    assert "environment variable TORCHINDUCTOR_SOMETHING" in facts_of(request())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/some")
    assert "environment variable TORCHINDUCTOR_CACHE_DIR" not in facts_of(request())
