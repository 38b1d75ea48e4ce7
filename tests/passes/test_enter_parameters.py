"""Parameters enter in place of what is made of them: every way to make something of weights, and the bytes it takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autopar.analysis.footprint import sent
from autopar.check import TOLERANCE, Reference, check
from autopar.compiler import split_program
from autopar.ir import collectives as comm
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.passes.enter_parameters import enter_parameters
from autopar.plan import Plan
from tests.selection import slow_but

WIDTH = 12
ENTER = comm.OPS.enter.default

# what a model makes of its weights (each of WIDTH x WIDTH) before a row of the batch meets them: matrices again
FORMS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    "as they are": lambda a, b: [a, b],
    "transposed": lambda a, b: [a.t(), b.t()],
    "once as it is, once transposed": lambda a, b: [a, a.t(), b],
    "through two views": lambda a, b: [a.reshape(6, 24)[:, :12].repeat(2, 1), a.reshape(WIDTH, WIDTH).t(), b],
    "stacked": lambda a, b: list(torch.stack([a, b]).transpose(1, 2).unbind()),
    "concatenated": lambda a, b: list(torch.cat([a, b]).reshape(2, WIDTH, WIDTH)),
    "in pieces": lambda a, b: [torch.cat([x, x, x], 1).reshape(WIDTH, WIDTH) for x in a.chunk(3, 1)] + [b],
    "only one piece": lambda a, b: [a.chunk(2)[0].repeat(2, 1), b],
    "cast": lambda a, b: [a.to(torch.float32).to(torch.float64).t(), b],
    "by index": lambda a, b: [a[torch.tensor([3, 1, 2, 0, 4, 5, 9, 8, 7, 6, 11, 10])], b],
    "with a norm": lambda a, b: [a / a.norm(dim=1, keepdim=True), b],
    "sum and product": lambda a, b: [a + a @ b],
    "scaled by the other": lambda a, b: [a * b.mean(), b.t()],
    "sorted": lambda a, b: [torch.sort(a.t(), 0).values, b],
}


class Made(nn.Module):
    """Rows go through the matrices that ``form`` makes of two weights.

    ``alike``: a penalty takes the weights, and what is made of them, whatever the batch is.
    """

    def __init__(self, form: str, alike: bool = False) -> None:
        super().__init__()
        self.form, self.alike = FORMS[form], alike
        self.a, self.b = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        made = self.form(self.a, self.b)
        penalty = sum((w.square().sum() for w in [self.a, *made]), torch.zeros(())) if self.alike else 0.0
        for matrix in made:
            x = (x @ matrix).tanh()
        return x.square().sum() + penalty


CASES = [("dp=2", 0), ("dp=2", 2), ("dp=3", 2), ("dp=2,tp=2", 3), ("dp_replicate=2,dp_shard=2", 1), ("dp=1,tp=1", 3)]


@pytest.mark.parametrize("alike", slow_but([1], [False, True]), ids=["", "alike too"])
@pytest.mark.parametrize("form", slow_but([0, 2, 4, 5, 7, 9, 11, 12], FORMS))
def test_gradients_are_exact_and_send_what_the_formulas_say(form: str, alike: bool) -> None:
    """Rajbhandari et al. 2020, section 7: P (n-1)/n with ZeRO, twice that without, whatever is made of the weights."""
    reference = Reference(Made(form, alike), {"x": torch.randn(12, WIDTH)})
    for mesh, zero in CASES:
        on = Mesh.parse(mesh)
        report = reference.check(on, Plan(zero=zero, check_numerics=False))
        assert report.worst <= TOLERANCE, (mesh, zero, report)
        if on.names == ("dp",):
            (found,) = (t for t in report.step.traffic if t.phase == "backward")
            share, size = (on.world_size - 1) / on.world_size, 2 * WIDTH * WIDTH * 8
            assert found.bytes == size * share if zero else found.bytes <= 2 * size * share
            assert found.name == ("reduce_scatter" if zero else "all_reduce")


def of_lines(mesh: str, *lines: str) -> Program:
    text = f"program mesh({mesh})\n  p = param p : f64[64,8]\n  q = param q : f64[64,8]\n  x = input : f64[4,8]\n"
    return parse(text + "".join(f"  {line}\n" for line in lines))


def entering(program: object) -> list[tuple[str, str]]:
    """(what enters, the axis) of each enter."""
    assert isinstance(program, Program)
    return [(str(node.args[0]), str(node.args[1])) for node in program.graph.nodes if node.target is ENTER]


STAY = {  # why: lines
    "a small slice": ("s = aten.slice.Tensor(p, 0, 0, 8) : f64[8,8]", "e = comm.enter(s, dp) : f64[8,8]"),
    "a sum": ("s = aten.add.Tensor(p, q) : f64[64,8]", "e = comm.enter(s, dp) : f64[64,8]"),
    "a value of inputs": ("s = aten.mm(x, p) : f64[4,8]", "e = comm.enter(s, dp) : f64[4,8]"),
    "a random one": ("s = aten.bernoulli(p) : f64[64,8]", "e = comm.enter(s, dp) : f64[64,8]"),
    "a sum over the same ranks": (
        "f = comm.keep_first(p, dp) : f64[64,8]{sum:dp}",
        "s = comm.all_reduce(f, dp) : f64[64,8]",
        "e = comm.enter(s, dp) : f64[64,8]",
    ),
}


@pytest.mark.parametrize("why", STAY)
def test_what_stays(why: str) -> None:
    program = of_lines("dp=2", *STAY[why], "return e")
    assert str(enter_parameters(program)) == str(program), why


def test_what_costs_little_where_the_parameter_enters_anyway() -> None:
    """Over sp alone the parameter would send four times its slice; over sp beside dp=4 as much as that."""
    lines = ["s = aten.slice.Tensor(p, 0, 0, 16) : f64[16,8]", "e = comm.enter(s, sp) : f64[16,8]"]
    assert entering(enter_parameters(of_lines("dp=4 sp=2", *lines, "return e"))) == [("s", "sp")]
    both = of_lines("dp=4 sp=2", *lines, "d = comm.enter(p, dp) : f64[64,8]", "return e, d")
    assert entering(enter_parameters(both)) == [("p", "dp"), ("enter_1", "sp")]
    fewer = of_lines("dp=2 sp=2", *lines, "d = comm.enter(p, dp) : f64[64,8]", "return e, d")
    assert entering(enter_parameters(fewer)) == [("s", "sp"), ("p", "dp")]


class Positions(nn.Module):
    """An embedding of positions, of which a batch uses a part."""

    def __init__(self, table: int) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(table, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x[:, None] * self.table(torch.arange(WIDTH))).square().sum()


@pytest.mark.parametrize(("table", "collectives"), [(WIDTH, 1), (2 * WIDTH, 1), (8 * WIDTH, 2)])
def test_a_table_of_positions_is_reduced_by_rows_where_most_are_not_used(table: int, collectives: int) -> None:
    report = check(Positions(table), {"x": torch.randn(4, WIDTH)}, Mesh(dp=2), Plan(zero=2, check_numerics=False))
    assert report.worst <= TOLERANCE
    found = {(t.axis, t.name): t.bytes for t in report.step.traffic if t.phase == "backward"}
    assert len(found) == collectives and ("dp", "reduce_scatter") in found
    size = (table if collectives == 1 else 0) * WIDTH * 8 + WIDTH * (WIDTH + 1) * 8
    assert found["dp", "reduce_scatter"] == size // 2


def test_one_reduction_over_two_axes_of_what_enters_them_in_two_places() -> None:
    program = of_lines(
        "dp=2 sp=2",
        "d = comm.enter(p, dp) : f64[64,8]",
        "t = aten.t(d) : f64[8,64]",
        "e = comm.enter(t, sp) : f64[8,64]",
        "y = aten.mm(x, e) : f64[4,64]",
        "return y",
    )
    assert entering(enter_parameters(program)) == [("p", "sp"), ("enter", "dp")]


def test_experts_of_hugging_face_enter_as_they_are_stored() -> None:
    pytest.importorskip("transformers")
    from autopar.zoo.named import named_model

    example = named_model("hf:mixtral", {"num_hidden_layers": 1})
    program = split_program(example.model, Mesh(dp=2), Plan(), (), example.batch)
    names = {source for source, _ in entering(program)}
    assert {name for name in names if "experts" in name} == {
        "p_model_layers_0_mlp_experts_gate_up_proj",
        "p_model_layers_0_mlp_experts_down_proj",
    }
    assert all(name.startswith("p_") for name in names) and sent(program)
