"""A ring of tiles, as ring attention will be: keys travel once around, each step hidden behind the tile before.

The program is text; it is differentiated, its shifts are started early, and it runs on ranks in lock-step and on gloo.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopar.autodiff.differentiate import differentiate
from autopar.codegen.python import compile_source, emit
from autopar.communication.connect import connect
from autopar.compiler import compile_program
from autopar.ir import collectives as comm
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.models import llama
from autopar.passes.overlap_collectives import overlap_collectives
from autopar.plan import Plan
from autopar.simulator.lockstep import Lockstep
from tests.launch import run_ranks

ROWS, WIDTH = 4, 5  # of each rank


def ring(ways: int, by: int) -> Program:
    """On each rank ``sum(tanh(q @ k_i.t()) @ k_i)`` over all parts k_i, and of that the sum over the ranks."""
    rows, part = ways * ROWS, f"f64[{ways * ROWS}@sp,{WIDTH}]"
    lines = [f"q = param q : {part}", f"k0 = param k : {part}"]
    for step in range(ways):
        if step + 1 < ways:
            lines.append(f"k{step + 1} = comm.shift(k{step}, sp, by={by}) : {part}")
        lines += [
            f"t{step} = aten.t(k{step}) : f64[{WIDTH},{rows}@sp]",
            f"s{step} = aten.mm(q, t{step}) : f64[{rows}@sp,{ROWS}]",
            f"w{step} = aten.tanh(s{step}) : f64[{rows}@sp,{ROWS}]",
            f"o{step} = aten.mm(w{step}, k{step}) : {part}",
        ]
        lines.append(
            f"y{step} = aten.add.Tensor(y{step - 1}, o{step}) : {part}" if step else f"y0 = aten.neg(o0) : {part}"
        )
    lines += [f"own = aten.sum(y{ways - 1}) : f64[]{{sum:sp}}", "loss = comm.all_reduce(own, sp) : f64[]"]
    text = "\n  ".join([f"program mesh(sp={ways})", *lines, "return loss=loss"])
    return overlap_collectives(differentiate(parse(text, Plan())))


def parts(ways: int) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    q, k = torch.randn(2, ways, ROWS, WIDTH, dtype=torch.float64)
    return list(q), list(k)


def expected(ways: int, by: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and the gradients of all parts, of the same sum in one process."""
    q, k = ([part.requires_grad_() for part in ranks] for ranks in parts(ways))
    loss = torch.zeros((), dtype=torch.float64)
    for rank in range(ways):
        for step in range(ways):
            there = k[(rank - step * by) % ways]
            loss = loss + (1 if step else -1) * (torch.tanh(q[rank] @ there.t()) @ there).sum()
    return loss.detach(), torch.autograd.grad(loss, [*q, *k])


def check(ways: int, by: int, losses: list[Tensor], gradients: list[Tensor]) -> None:
    loss, true = expected(ways, by)
    torch.testing.assert_close(losses, [loss] * ways, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients, list(true), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("ways", "by"), [(1, 1), (2, 1), (3, 1), (3, -1), (4, 3), (4, 6), (2, 4)])
def test_on_ranks_in_lock_step(ways: int, by: int) -> None:
    role = ring(ways, by).required_role
    assert role.backward is not None
    lockstep = Lockstep(Mesh(sp=ways))
    losses, *saved = lockstep.run(role.forward, list(parts(ways)))
    ones = [torch.ones((), dtype=torch.float64)] * ways
    found = lockstep.run(role.backward, [*saved, ones], "backward")
    check(ways, by, losses, [part for name in "qk" for part in found[role.grads.index(name)]])
    sent = {(t.phase, t.operations, t.bytes) for t in lockstep.traffic if t.name == "shift"}
    steps = ways - 1 if by % ways else 0
    size = steps * ROWS * WIDTH * 8
    assert sent == ({("forward", steps, size), ("backward", steps, size)} if steps else set())


def test_a_step_travels_while_the_tile_before_is_computed() -> None:
    role = ring(3, 1).required_role
    assert role.backward is not None
    names = [
        comm.TARGETS.get(node.target, node.target.__name__) for node in role.forward.nodes if node.op == "call_function"
    ]
    first, second = (i for i, name in enumerate(names) if name == "start_shift")
    waits = [i for i, name in enumerate(names) if name == "wait"]
    assert "mm.default" in names[first : waits[0]] and "mm.default" in names[second : waits[1]], names
    assert "shift" in {comm.TARGETS.get(node.target) for node in role.backward.nodes}  # of a gradient that is used next


def test_backward_of_attention_sends_while_tiles_are_computed() -> None:
    batch = {"input_ids": torch.zeros(1, 16, dtype=torch.int64), "labels": torch.zeros(1, 16, dtype=torch.int64)}
    model = llama.build("tiny", vocab=16, width=16, layers=1, heads=2, kv_heads=2, ff=16)
    program = compile_program(model, Mesh(sp=2), Plan(attention="ring", check_numerics=False), (), batch)
    assert isinstance(program, Program) and program.required_role.backward is not None
    names = [getattr(node.target, "_opname", "") for node in program.required_role.backward.nodes]
    first = names.index("start_shift")
    assert "attention_tile_backward" in names[first : names.index("wait", first)]


def run(ways: int, by: int) -> tuple[Tensor, list[Tensor]]:
    """What one rank of the emitted code has: the loss and the gradients of its parts."""
    program, rank = ring(ways, by), connect(Mesh(sp=ways), 60.0, torch.device("cpu")).comm
    role, graphs = program.required_role, {}
    assert role.backward is not None
    for name, graph in (("forward", role.forward), ("backward", role.backward)):
        graphs[name] = compile_source(emit({name: graph}, program, rank.coordinates), name)
    loss, *saved = graphs["forward"](rank, [ranks[rank.rank] for ranks in parts(ways)])
    found = graphs["backward"](rank, [*saved, torch.ones((), dtype=torch.float64)])
    return loss, [found[role.grads.index(name)] for name in "qk"]


@pytest.mark.parametrize(("ways", "by"), [(2, 1), (3, 1), (3, -1), (4, 6)])
def test_on_gloo(ways: int, by: int) -> None:
    results = run_ranks(run, ways, ways, by)
    check(ways, by, [loss for loss, _ in results], [grads[i] for i in range(2) for _, grads in results])
