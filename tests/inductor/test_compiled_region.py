"""One tiny region, really compiled: its numbers, its variants, its cache; and what happens where none can be."""

from __future__ import annotations

import copy
import errno
import fcntl
import gc
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.compiler import compile_program
from autopar.errors import AutoparError
from autopar.inductor import compiled_region, functions, torch_inductor
from autopar.inductor.compiled_region import CompiledRegion, Counts, counted
from autopar.inductor.one_at_a_time import one_at_a_time
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.notes import heard
from autopar.plan import Plan

PLAN = Plan(compile="inductor", check_numerics=False)


class Blocks(nn.Module):
    """``number`` equal blocks, each of which a compiler makes one loop of."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(number))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x).tanh() * 2 + x
        return {"loss": x.square().sum()}


class Curved(nn.Module):
    """A block without parameters, so that its lines are the only region."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).sin() * 3 + x


@pytest.fixture(autouse=True)
def no_program_of_before() -> Iterator[None]:
    gc.collect()
    yield


def launched(model: nn.Module) -> autopar.ParallelModule:
    return autopar.parallelize(copy.deepcopy(model), Mesh(), PLAN)


def test_a_region_is_compiled_once_for_each_kind_of_strides_and_frees_what_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(torch_inductor.SETTINGS, "cpp_cache_precompile_headers", False)  # 5 s, for later kernels
    x, scale = torch.randn(3, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    program = compile_program(Curved(), Mesh(), PLAN, (x,))
    assert isinstance(program, Program)
    function = functions.regional_function("inference", program.required_role.inference, program)

    def check(given: Tensor) -> None:
        (found,) = function(_Rank, [scale, given])
        assert (found - ((given * scale).sin() * 3 + given)).abs().max() <= 1e-15

    with counted() as count, torch.no_grad():
        check(x)
        check(2 * x)
        assert count == Counts(compiled=1)
        (region,) = (each for each in function.__globals__.values() if isinstance(each, CompiledRegion))
        operands = [x.clone(), scale]
        seen = weakref.ref(operands[0])
        region(_Rank, operands)
        assert operands == [] and seen() is None
        monkeypatch.setattr(compiled_region, "compiled", lambda graph, given: lambda operands: graph(*operands))
        check(x.t().contiguous().t())
        check(x)
    assert count == Counts(compiled=2)


class _Rank:
    device = torch.device("cpu")


def test_equal_blocks_are_compiled_once_and_what_fails_runs_as_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor itself is left out here: what it gets, and what becomes of its errors."""
    graphs: list[Any] = []

    def refused(graph: Any, given: Any) -> Any:
        graphs.append(graph)
        raise RuntimeError("LoweringException: no such loop\n  target: aten.tanh.default\n  args[0]: ...")

    monkeypatch.setattr(compiled_region, "compiled", refused)
    x = torch.randn(3, 4, dtype=torch.float64)
    numbers = []
    for layers in (2, 5):
        model, parallel = Blocks(layers), None
        gc.collect()  # of the first program, whose regions the second would share
        graphs.clear()
        with counted() as count, heard() as notes, torch.no_grad():
            parallel = launched(model)
            assert torch.equal(parallel(x)["loss"], model(x)["loss"])
        numbers.append(len(graphs))
        assert len(count.left) == len(graphs) and "aten.tanh.default" in count.left
        assert any("aten.tanh.default runs as generated Python: LoweringException" in note for note in notes)
    assert numbers[0] == numbers[1] > 0


def test_an_operator_that_only_decomposing_shows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_region, "takes", lambda target: target is not torch.ops.aten.sin.default)
    with counted() as count, torch.no_grad():
        launched(Curved())(torch.randn(5, 4, dtype=torch.float64))
    assert count.left == ["aten.sin.default"] and not count.compiled


def test_a_full_disk_is_an_error_and_not_other_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(graph: Any, given: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled_region, "compiled", full)
    with pytest.raises(AutoparError, match=r"No space left(.|\n)*Way out: .*TORCHINDUCTOR_CACHE_DIR"), torch.no_grad():
        launched(Curved())(torch.randn(6, 4, dtype=torch.float64))


def test_a_disk_without_locks_lets_all_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", refused)
    with one_at_a_time("region"), one_at_a_time("region"):
        assert [path.name for path in tmp_path.rglob("region")] == ["region"]
    with pytest.raises(OSError, match="is full"), one_at_a_time("region"):
        raise OSError("it is full")  # of what is done within it: that is not let pass


def test_a_machine_without_a_compiler_is_told_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "compiler_missing", lambda device: "a C++ compiler")
    with pytest.raises(AutoparError, match=r'needs a C\+\+ compiler(.|\n)*Plan\(compile="python"\)'), torch.no_grad():
        launched(Curved())(torch.randn(7, 4, dtype=torch.float64))
    assert torch_inductor.compiler_missing(torch.device("cpu")) == ""
