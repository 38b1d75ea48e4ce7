"""The emitted code on all ranks in one process: the numbers of the graphs, and what is wrong in the code is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from autopar.codegen import in_place
from autopar.codegen.python import emit
from autopar.errors import InvariantError
from autopar.ir import collectives as comm
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.models import gpt
from autopar.plan import Plan
from autopar.simulate import simulate
from autopar.simulator.emitted import EmittedLockstep
from autopar.simulator.lockstep import Lockstep
from tests.test_check import Mlp

CODE = """
program mesh(dp=2)
  x    = input : f64[8@dp,3]
  y    = input : f64[4,3]
  g    = aten.mul.Tensor(x, 2) : f64[8@dp,3]
  s    = comm.start_all_reduce(g, dp) : f64[4,3]
  h    = aten.mul.Tensor(y, y) : f64[4,3]
  w    = comm.wait(s, dp) : f64[4,3]
  {rest}
"""
RIGHT = """k = aten.add.Tensor(w, h) : f64[4,3]
  m = aten.mul.Tensor(k, x) : f64[8@dp,3]
  return m, x"""


def free_too_early(self: Any, node: fx.Node, position: int) -> bool:
    """As if nothing were needed any more."""
    source = node.args[position]
    sizes = isinstance(source, fx.Node) and source.op != "placeholder" and self._size(source) == self._size(node)
    return bool(sizes and self._is_dense(source))


def both(text: str, rest: str) -> tuple[list[Any], list[Any]]:
    """What each rank gets from the graph, and from its code."""
    graph = parse(text.format(rest=rest).strip()).graph
    given = [[torch.randn(4, 3, dtype=torch.float64) for _ in range(2)], [torch.ones(4, 3, dtype=torch.float64)] * 2]
    plain = Lockstep(Mesh(dp=2)).run(graph, list(given))
    return plain, EmittedLockstep(Mesh(dp=2)).run(graph, list(given))


def same(pair: tuple[list[Any], list[Any]]) -> bool:
    return all(torch.equal(a, b) for one, other in zip(*pair, strict=True) for a, b in zip(one, other, strict=True))


def test_the_same_numbers() -> None:
    assert same(both(CODE, RIGHT))


HASTY = """k = aten.add.Tensor(s, h) : f64[4,3]
  w = comm.wait(s, dp) : f64[4,3]
  return k, w"""
WAIT = "  w    = comm.wait(s, dp) : f64[4,3]\n"


def test_what_is_read_before_its_wait_is_poison() -> None:
    plain, found = both(CODE.replace(WAIT, ""), HASTY)
    assert all(value.isfinite().all() for value in plain[0]) and all(value.isnan().all() for value in found[0])
    assert all(map(torch.equal, plain[1], found[1]))


def test_nobody_waits() -> None:
    text = CODE.replace(WAIT, "")
    with pytest.raises(InvariantError, match="starts start_all_reduce over axis 'dp' and never waits"):
        both(text, RIGHT.replace("(w, h)", "(h, h)"))


EARLY = """k = aten.add.Tensor(g, 1) : f64[8@dp,3]
  w = comm.wait(s, dp) : f64[4,3]
  return w, k"""


def test_memory_of_a_collective_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    text = CODE.replace(WAIT, "")
    assert same(both(text, EARLY))
    monkeypatch.setattr(in_place._Memory, "is_free", free_too_early)
    assert not same(both(text, EARLY))


LARGE = """
program mesh(dp=2)
  x    = input : f64[128@dp,64]
  g    = aten.mul.Tensor(x, 2) : f64[128@dp,64]
  s    = comm.{start}all_reduce(g, dp) : f64[64,64]
  {rest}
"""
MORE = {
    "start_": "  k = aten.add.Tensor(g, 1) : f64[128@dp,64]\n  w = comm.wait(s, dp) : f64[64,64]\n  return w, k",
    "": "  k = aten.add.Tensor(g, s) : f64[128@dp,64]\n  return s, k",
}


@pytest.mark.parametrize("start", MORE)
def test_a_large_sum_takes_the_memory_of_what_nobody_reads(monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    lonely = "w = comm.wait(s, dp) : f64[64,64]\n  return w" if start else "return s"
    read_later = MORE[start].strip()

    def results(rest: str) -> bool:
        graph = parse(LARGE.format(start=start, rest=rest).strip()).graph
        given = [[torch.randn(64, 64, dtype=torch.float64) for _ in range(2)]]
        plain = Lockstep(Mesh(dp=2)).run(graph, list(given))
        return same((plain, EmittedLockstep(Mesh(dp=2)).run(graph, list(given))))

    def written(rest: str) -> int:
        program = parse(LARGE.format(start=start, rest=rest).strip())
        return emit({"f": program.graph}, program).count("in_place=True")

    assert written(lonely) == 1 and results(lonely)
    assert written(read_later) == 0 and results(read_later)
    monkeypatch.setattr(in_place._Memory, "is_free", free_too_early)
    assert written(read_later) == 1 and not results(read_later)


ALONE = """program mesh(dp=1)
  x = input : f64[4,3]
  s = comm.start_all_reduce(x, dp) : f64[4,3]
  w = comm.wait(s, dp) : f64[4,3]
  y = aten.mul.Tensor(w, 2) : f64[4,3]
  return y"""


def test_a_start_over_one_rank_is_its_operand() -> None:
    graph, x = parse(ALONE).graph, torch.randn(4, 3, dtype=torch.float64)
    before = x.clone()
    (y,) = EmittedLockstep(Mesh(dp=1)).run(graph, [[x]])
    assert torch.equal(x, before) and torch.equal(y[0], before * 2)


SHARED = """program mesh(dp=2)
  x = input : f64[8@dp,3]
  y = input : f64[4,3]
  g = comm.all_reduce(x, dp) : f64[4,3]
  k = aten.mul.Tensor(g, x) : f64[8@dp,3]
  return k
{rest}"""


def test_ranks_that_share_memory_in_the_simulator_write_apart() -> None:
    assert same(both(SHARED, ""))


# ---------------------------------------------------------------- whole programs


def compiled(plan: Plan) -> tuple[Program, dict[str, Tensor], dict[str, Tensor]]:
    from autopar.compiler import compile_program

    torch.manual_seed(0)
    model = Mlp(torch.tanh).double()
    batch = {"x": torch.randn(8, 8, dtype=torch.float64)}
    program = compile_program(model, Mesh(dp=2, tp=2), plan, (), batch)
    assert isinstance(program, Program)
    return program, dict(model.named_parameters()), batch


def backward_of(program: Program) -> fx.Graph:
    found = program.required_role.backward
    assert found is not None
    return found


def lose_a_wait(program: Program) -> None:
    wait = next(node for node in backward_of(program).nodes if comm.TARGETS.get(node.target) == "wait")
    wait.replace_all_uses_with(wait.args[0])
    backward_of(program).erase_node(wait)


def test_a_lost_wait() -> None:
    program, parameters, batch = compiled(Plan(bucket_mb=0))
    simulate(program, parameters, (), batch)
    lose_a_wait(program)
    simulate(program, parameters, (), batch, emitted=False)  # the graph says nothing of time
    with pytest.raises(InvariantError, match="never waits"):
        simulate(program, parameters, (), batch)


def test_memory_that_is_used_again_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    program, parameters, batch = compiled(Plan())
    monkeypatch.setattr(in_place._Memory, "is_free", free_too_early)
    simulate(program, parameters, (), batch, emitted=False)
    with pytest.raises(InvariantError, match="gives something else than the graph .*\nLikely: a wait is missing"):
        simulate(program, parameters, (), batch)


PLANS: list[tuple[Mesh, Plan]] = [
    (Mesh(dp=2, tp=2), Plan(sequence="megatron", zero=3)),
    (Mesh(sp=2), Plan(attention="ring")),
    (Mesh(pp=2, dp=2), Plan(microbatches=2, zero=2, schedule="zb-h1")),
]


@pytest.mark.parametrize(("mesh", "plan"), PLANS, ids=lambda value: str(value) if isinstance(value, Mesh) else "")
def test_a_transformer(mesh: Mesh, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from autopar.check import Reference

    torch.manual_seed(0)
    model = gpt.build()
    reference = Reference(model, gpt.example_batch(model.config, 4))
    runs = spied(monkeypatch)
    assert reference.check(mesh, plan).passed
    assert len(runs) >= 2


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The phases that are run as code from now on."""
    runs: list[str] = []
    usual: Callable[..., Any] = EmittedLockstep.run

    def run(self: Any, graph: fx.Graph, inputs: Any, phase: str = "forward") -> Any:
        runs.append(phase)
        return usual(self, graph, inputs, phase)

    monkeypatch.setattr(EmittedLockstep, "run", run)
    return runs
