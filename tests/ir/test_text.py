"""The text form: programs as they print, reading them back, and the messages for a wrong text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from autopar.autodiff.differentiate import differentiate
from autopar.errors import ProgramFileError
from autopar.frontend.trace import trace
from autopar.ir import collectives as comm
from autopar.ir.layout import PARTIAL, Layout, Split
from autopar.ir.node import Origin, Value, origin, set_origin, set_values, value, values
from autopar.ir.parse import parse
from autopar.ir.program import Program, format_program
from autopar.ir.tables import Input, InputKind, Output, OutputKind
from autopar.mesh import Mesh
from autopar.operators.registry import REGISTRY
from autopar.plan import Plan
from tests.conftest import Golden
from tests.texts import MLP, NORMALISED, ROLES, line, node_of, reads_back

# ---------------------------------------------------------------- programs


def test_the_example_of_the_design_is_printed_to_the_letter() -> None:
    assert str(parse(MLP)) == MLP
    program = reads_back(MLP)
    assert program.mesh == Mesh(dp=2, tp=2)
    assert program.plan == Plan()
    assert program.inputs[0] == Input("p_up_weight", InputKind.PARAMETER, "up.weight")
    assert program.outputs == (Output(OutputKind.USER, ""),)
    split = Layout.whole([4, 16, 8]).place("dp", Split(0), program.mesh)
    assert value(node_of(program, "linear_1")).layout == split.place("tp", PARTIAL, program.mesh)


def test_every_kind_of_input_and_output() -> None:
    program = reads_back(NORMALISED)
    kinds = [entry.kind.value for entry in program.inputs]
    assert kinds == ["param", "param", "buffer", "buffer", "const", "input", "input", "seed"]
    assert [entry.target for entry in program.inputs[-3:]] == ["images", "labels", "seed"]
    assert [(entry.kind.value, entry.target) for entry in program.outputs] == [
        ("output", "loss"),
        ("output", "past key"),
        ("update", "bn.running_mean"),
    ]
    assert program.constants["lifted.0"].tolist() == [0, 0, 0]
    assert len(values(node_of(program, "norm"))) == 5
    given_ = parse(NORMALISED, constants={"lifted.0": torch.tensor([1, 2, 3])}, plan=Plan(seed=7))
    assert given_.constants["lifted.0"].tolist() == [1, 2, 3]
    assert given_.plan.seed == 7


def test_tied_and_oddly_named_parameters() -> None:
    program = reads_back(
        "program mesh()\n"
        "  a = param emb.weight also head.weight, 0.weight : f32[2]\n"
        '  b = param "a weight/\\u00e4" also "x,y" : f32[2]\n'
        "  c = param also : f32[2]\n"
        "  return"
    )
    assert program.inputs[0].aliases == ("head.weight", "0.weight")
    assert (program.inputs[1].target, program.inputs[1].aliases) == ("a weight/ä", ("x,y",))
    assert program.inputs[2].target == "also"
    assert program.returned == ()


def test_names_that_mean_something_elsewhere() -> None:
    """Values called like a dtype, a keyword of the text or an axis, outputs called ``update`` and ``saved``."""
    program = reads_back(
        "program mesh(tp=2)\n"
        "  f32  = param w                     : f32[4]\n"
        "  tp   = input                       : f32[4]\n"
        "  saved = aten.add.Tensor(f32, tp)   : f32[4]\n"
        "  update = aten.to.dtype(saved, torch.float32) : f32[4]\n"
        "  param = comm.all_reduce(update, tp) : f32[4]\n"
        "  return update=param, saved=saved, update"
    )
    assert node_of(program, "update").args[1] is torch.float32
    assert node_of(program, "param").args[1] == "tp"
    assert [entry.target for entry in program.outputs] == ["update", "saved", ""]


def test_comments_blank_lines_and_columns_mean_nothing() -> None:
    messy = "\n# first\n" + MLP.replace(" : ", ":").replace("  return", "  # the end\n\n\treturn") + "  # done\n"
    assert str(parse(messy)) == MLP


def test_a_hash_inside_a_string_is_no_comment() -> None:
    program = reads_back(line('aten.gelu(x, approximate="# : ]\\"\\\\") : f32[8]'))
    assert node_of(program, "y").kwargs == {"approximate": '# : ]"\\'}


def test_printing_is_the_same_for_a_clone() -> None:
    program = parse(ROLES)
    assert str(program.clone()) == str(program)


def test_a_long_return_takes_several_lines() -> None:
    names = [f"value_number_{i}" for i in range(40)]
    lines = [f"  {name} = input" for name in names]
    items = ", ".join(f"update buffer.{i}={name}" for i, name in enumerate(names))
    program = parse("\n".join(["program mesh()", *lines, f"  return {items}  # all of it"]))
    printed = str(program)
    assert max(map(len, printed.splitlines())) <= 112
    assert len([line for line in printed.splitlines() if line.startswith("         update")]) > 5
    assert str(parse(printed)) == printed
    assert [entry.target for entry in parse(printed).outputs] == [f"buffer.{i}" for i in range(40)]


def test_values_without_a_type_print_without_one() -> None:
    program = reads_back("program mesh()\n  x = input\n  y = aten.neg(x)\n  return y")
    assert values(node_of(program, "y")) == ()


def test_what_cannot_be_read_back_still_prints() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.neg.default, (x, object))
    z = graph.call_function(max, (y, y))
    graph.output((z, None))
    program = Program(graph, Mesh(), Plan(), (), ())
    assert "aten.neg(x, <type: <class 'object'>>)" in str(program)
    assert "= python.max(neg_default, neg_default)" in str(program)
    assert "return max_1, None" in str(program)
    with pytest.raises(ProgramFileError, match="line 3, column"):
        parse(str(program))


# ---------------------------------------------------------------- gradients


def test_gradients_are_those_of_the_parameters_unless_marked() -> None:
    program = reads_back(
        "program mesh()\n"
        "  w = param w                   : f32[2]\n"
        "  frozen = param v              : f32[2] nograd\n"
        "  ids = param ids               : i64[2]\n"
        "  x = input                     : f32[2]\n"
        "  soft = input                  : f32[2] grad\n"
        "  a = aten.add.Tensor(x, frozen) : f32[2]\n"
        "  b = aten.mul.Tensor(a, w)     : f32[2]\n"
        "  c = aten.detach(b)            : f32[2] nograd\n"
        "  d = aten.argmax(b)            : i64[]\n"
        "  e = aten.cat([c, soft])       : f32[4]\n"
        "  return b, e"
    )
    requires = {n.name: v.requires_grad for n in program.graph.nodes for v in values(n)}
    assert [name for name, needed in requires.items() if needed] == ["w", "soft", "b", "e"]


def test_a_program_without_gradients_says_so_once() -> None:
    program = reads_back("program mesh(tp=2) nograd\n  w = param w : f32[2]\n  y = aten.neg(w) : f32[2]\n  return y")
    assert not any(v.requires_grad for n in program.graph.nodes for v in values(n))


def test_inputs_alone_need_no_word_about_gradients() -> None:
    assert "nograd" not in str(parse(line("aten.neg(x) : f32[8]")))


# ---------------------------------------------------------------- collectives


@pytest.mark.parametrize(
    ("expression", "name", "arguments"),
    [
        ("comm.enter(x, tp) : f32[8]", "enter", ("tp",)),
        ("comm.all_reduce(x, tp) : f32[8]", "all_reduce", ("tp", "sum")),
        ("comm.all_reduce(x, tp, op=max) : f32[8]", "all_reduce", ("tp", "max")),
        ("comm.all_gather(x, tp, dim=0) : f32[16]", "all_gather", ("tp", 2, 0, 1, [1], 16)),
        ("comm.all_gather(x, tp, dim=0, length=15) : f32[16]", "all_gather", ("tp", 2, 0, 1, [1], 15)),
        ("comm.all_gather(x, tp, dim=0, length=16)", "all_gather", ("tp", 2, 0, 1, [1], 16)),
        ("comm.pad(x, tp, dim=0, outer=2) : f32[16]{sum:tp}", "pad", ("tp", 2, 0, 2, [1], 16)),
        ("comm.split(x, tp, dim=0) : f32[8@tp]", "split", ("tp", 2, 0, 1, [1], 8)),
        ("comm.split(x, tp, dim=0, length=7) : f32[8@tp]", "split", ("tp", 2, 0, 1, [1], 7)),
        ("comm.split(x, tp, dim=0, ratio=[2, 1, 1]) : f32[4+2+2@tp]", "split", ("tp", 2, 0, 1, [2, 1, 1], 8)),
        ("comm.reduce_scatter(x, tp, ways=4, dim=0) : f32[4@tp]", "reduce_scatter", ("tp", 4, 0, 1, [1], 8)),
        ("comm.all_to_all(x, tp, source=0, target=1) : f32[4,2]", "all_to_all", ("tp", 2, [0, 1, 1], [1, 1, 1])),
        ("comm.shift(x, tp, by=-1) : f32[8]", "shift", ("tp", 2, -1)),
        (
            "comm.all_to_all(x, tp, source=[0, 3, 1], target=[1, 1, 2, 1]) : f32[4,2]",
            "all_to_all",
            ("tp", 2, [0, 3, 1], [1, 1, 2, 1]),
        ),
    ],
)
def test_collectives(expression: str, name: str, arguments: tuple[Any, ...]) -> None:
    program = reads_back(line(expression))
    node = node_of(program, "y")
    assert comm.TARGETS[node.target] == name
    assert node.args == (node_of(program, "x"), *arguments)


def test_axis_index_and_the_operation_by_position() -> None:
    program = reads_back("program mesh(tp=2)\n  i = comm.axis_index(tp) : i64[]\n  return i")
    assert node_of(program, "i").args == ("tp",)
    assert node_of(parse(line("comm.all_reduce(x, tp, max) : f32[8]")), "y").args[2] == "max"


def test_a_collective_with_keyword_arguments_prints_like_one_without() -> None:
    program = parse(line("comm.all_gather(x, tp, dim=0) : f32[16]"))
    node = node_of(program, "y")
    before, parameters = str(program), [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    node.kwargs = dict(zip(parameters[1:], node.args[1:]))
    node.args = node.args[:1]
    assert str(program) == before


# ---------------------------------------------------------------- operators and arguments


def test_operators_are_named_by_namespace_and_overload() -> None:
    program = reads_back(line("aten.add.Tensor(x, 1, alpha=2) : f32[8]"))
    assert node_of(program, "y").target is torch.ops.aten.add.Tensor
    assert node_of(program, "y").kwargs == {"alpha": 2}
    assert node_of(reads_back(line("prims.neg(x)")), "y").target is torch.ops.prims.neg.default


def test_operators_of_our_own_are_looked_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def halve(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    monkeypatch.setitem(REGISTRY, "halve", halve)
    assert node_of(reads_back(line("op.halve(x) : f32[8]")), "y").target is halve


def test_operators_of_other_libraries() -> None:
    library = torch.library.Library("autopar_test_text", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    reads_back(line("autopar_test_text.twice(x) : f32[8]"), ["autopar_test_text"])


# ---------------------------------------------------------------- roles


def test_roles_are_sections() -> None:
    program = reads_back(ROLES)
    role = program.required_role
    assert (role.saved, role.differentiable, role.grads) == (1, (0,), ("w",))
    assert role.backward is not None
    assert [node.name for node in role.backward.nodes if node.op == "placeholder"] == ["x", "d_loss"]


def test_a_role_without_a_backward_pass_and_two_roles() -> None:
    one = "\n\n".join(part for part in ROLES.split("\n\n") if not part.startswith("backward"))
    one = one.replace(", saved x", "")
    program = reads_back(one)
    assert program.required_role.backward is None
    assert parse(MLP).role is None
    forward = one.index("forward:")
    with pytest.raises(ProgramFileError, match=r"line \d+: found 'forward:' behind 'inference:', which is the last"):
        parse(f"{one}\n\n{one[forward:]}")


def test_gradients_of_outputs_without_a_name_of_their_own() -> None:
    source = ROLES.replace("loss=loss, logits=linear", "loss, linear").replace("loss=linear, logits=", "linear, ")
    program = reads_back(source.replace("grad loss", "grad at 0"))
    assert program.required_role.differentiable == (0,)


# ---------------------------------------------------------------- origins


def test_lines_can_end_with_their_origin() -> None:
    program = parse(MLP)
    set_origin(node_of(program, "linear"), Origin("layers.0.up", "mlp.py:12 in forward: x = self.up(x)  # ünicode"))
    set_origin(node_of(program, "gelu"), Origin("", "mlp.py:13"))
    set_origin(node_of(program, "linear_1"), Origin("layers.0.down", "mlp.py:14 in forward: f(a,"))
    source = format_program(program, origins=True)
    assert source.isascii()
    assert "32@tp]  # layers.0.up  mlp.py:12 in forward: x = self.up(x)  # \\xfcnicode\n" in source
    assert "# -  mlp.py:13\n" in source
    assert str(parse(source)) == MLP
    again = parse(source, origins=True)
    assert origin(node_of(again, "gelu")) == Origin("", "mlp.py:13")
    assert origin(node_of(again, "linear_1")) == Origin("layers.0.down", "mlp.py:14 in forward: f(a,")
    assert format_program(again, origins=True) == source
    assert origin(node_of(parse(source), "gelu")) == Origin()


# ---------------------------------------------------------------- whole models


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        x = self.norm(self.embed(ids).mean(1))
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_a_traced_and_differentiated_model(golden: Golden) -> None:
    ids = torch.arange(12).reshape(4, 3)
    program = differentiate(trace(Tiny(), (ids,), {"labels": torch.arange(4)}))
    reads_back(str(program))
    assert "also head.weight" in str(program)
    assert "update norm.running_mean=" in str(program)
    assert format_program(parse(format_program(program, origins=True), origins=True), origins=True) == format_program(
        program, origins=True
    )


def test_golden_of_a_program_built_by_hand(golden: Golden) -> None:
    """All that a line may hold, in columns that a few long lines may leave."""
    mesh, graph = Mesh(dp=2, tp=4), fx.Graph()
    weight = graph.placeholder("p_model_layers_0_self_attention_query_projection_weight")
    whole = Layout.whole([12, 8]).place("tp", Split(0, outer=3), mesh)
    set_values(weight, Value(torch.bfloat16, whole, True))
    x = graph.placeholder("x")
    set_values(x, Value(torch.bfloat16, Layout.whole([4, 8]).place("dp", Split(0), mesh)))
    y = graph.call_function(torch.ops.aten.linear.default, (x, weight))
    set_values(y, Value(torch.bfloat16, Layout.whole([4, 12]).place("dp", Split(0), mesh), True))
    long = graph.call_function(torch.ops.aten.cat.default, ([y] * 24, 1))
    set_values(long, Value(torch.bfloat16, Layout.whole([4, 288]), True))
    graph.call_function(torch.ops.aten._assert_async.default, (long,))
    graph.output((long,))
    inputs = (
        Input(weight.name, InputKind.PARAMETER, "model.layers.0.self_attention.query_projection.weight"),
        Input("x", InputKind.INPUT, "x"),
    )
    program = Program(graph, mesh, Plan(), inputs, (Output(OutputKind.USER, "logits"),))
    golden("text_columns", program)
    assert str(parse(str(program))) == str(program)
