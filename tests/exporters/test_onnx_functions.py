"""ONNX functions of autopar's operators compute, on ONNX Runtime, what the kernels compute."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.operators.attention_tile import MERGE
from autopar.operators.experts import EXPERT_LINEAR
from autopar.operators.recurrent import RECURRENT_LAYER
from tests.exporters import examples
from tests.exporters.test_plain_operators import SAMPLES

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
onnx_ir = pytest.importorskip("onnx_ir")

from autopar.exporters import function_texts  # noqa: E402
from autopar.exporters.onnx_dialects import to_tensorrt  # noqa: E402
from autopar.exporters.onnx_functions import DOMAIN, TRACED, Functions, counted, parted, searched  # noqa: E402
from autopar.exporters.onnx_role import OPSET  # noqa: E402
from tests.exporters.small_network import written  # noqa: E402

ELEMENTS = {torch.float32: 1, torch.float64: 11, torch.int64: 7, torch.int32: 6, torch.bool: 9}

# ---------------------------------------------------------------- texts


def ran(text: str, name: str, inputs: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """The results of the function in ``text`` on ONNX Runtime, of the types of ``like``."""

    def info(prefix: str, tensors: list[Tensor]) -> list[Any]:
        make = onnx.helper.make_tensor_value_info
        return [make(f"{prefix}{i}", ELEMENTS[tensor.dtype], list(tensor.shape)) for i, tensor in enumerate(tensors)]

    function = onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{text}')
    given, results = info("in", inputs), info("out", like)
    node = onnx.helper.make_node(name, [x.name for x in given], [x.name for x in results], name="call", domain=DOMAIN)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)]
    graph = onnx.helper.make_graph([node], "g", given, results)
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {f"in{i}": x.numpy() for i, x in enumerate(inputs)})]


@pytest.mark.parametrize("rows, copies, experts", [(6, 2, 5), (6, 1, 3), (1, 3, 1), (0, 1, 3)])
@pytest.mark.parametrize("ids_of", [torch.int64, torch.int32])
def test_experts(rows: int, copies: int, experts: int, ids_of: torch.dtype) -> None:
    """Also of rows that belong to no expert, and without any row."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 3, dtype=torch.float64), torch.randn(experts, 3, 4, dtype=torch.float64)
    ids = torch.randint(experts + 1, (rows * copies,), dtype=ids_of)
    wanted = EXPERT_LINEAR(x, weight, ids)
    (found,) = ran(function_texts.EXPERT_LINEAR, "ExpertLinear", [x, weight, ids], [wanted])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_only_its_rows_meet_the_matrix_of_an_expert() -> None:
    """The product takes what was gathered, whose size is that of the rows that were found."""
    text = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{function_texts.EXPERT_LINEAR}'
    (scan,) = [node for node in onnx.parser.parse_function(text).node if node.op_type == "Scan"]
    (body,) = [attribute.g for attribute in scan.attribute if attribute.name == "body"]
    made = {name: node for node in body.node for name in node.output}
    (product,) = [node for node in body.node if node.op_type == "MatMul"]
    gathered = made[product.input[0]]
    found = made[gathered.input[1]]
    while found.op_type != "NonZero":
        found = made[found.input[0]]
    assert gathered.op_type == "Gather" and made[found.input[0]].op_type == "Equal"


CELLS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    "own, projected", [(True, False), (False, False), (False, True)], ids=["own", "steps", "projected"]
)
def test_recurrent_layers(cell: str, bias: bool, own: bool, projected: bool) -> None:
    """By ONNX's own operators in float32, by steps in float64."""
    if projected and cell != "lstm":
        return
    torch.manual_seed(0)
    dtype, rows, hidden, out = torch.float32 if own else torch.float64, CELLS[cell] * 5, 5, 3 if projected else 5
    states = [torch.randn(2, out, dtype=dtype), torch.randn(2, hidden, dtype=dtype)][: 2 if cell == "lstm" else 1]
    shapes = [(rows, 4), (rows, out), *[(rows,)] * (2 * bias), *[(out, hidden)] * projected]
    weights = [torch.randn(shape, dtype=dtype) / 2 for shape in shapes]
    x = torch.randn(6, 2, 4, dtype=dtype)
    wanted = list(RECURRENT_LAYER(x, states, weights, cell))
    text = function_texts.recurrent_layer("Layer", cell, len(states), len(weights), hidden, own)
    assert any(word in text for word in ("LSTM", "GRU", "RNN")) == own
    allowed = 1e-5 if own else 1e-12
    for one, other in zip(ran(text, "Layer", [x, *states, *weights], wanted), wanted):
        torch.testing.assert_close(one, other, rtol=allowed, atol=allowed)


# ---------------------------------------------------------------- plain forms


class Called(nn.Module):
    """A call of an operator, as the trace of a rank makes it."""

    def __init__(self, functions: Functions, target: Any, given: tuple[Any, ...]) -> None:
        super().__init__()
        self.leaves, self.spec = pytree.tree_flatten(given)
        self.form = functions.forms[target]
        self.wanted = pytree.tree_leaves(target(*given))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def forward(self, *tensors: Tensor) -> Any:
        waiting = iter(tensors)
        leaves = [next(waiting) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        kinds = [(tensor.dtype, tensor.shape) for tensor in self.wanted]
        return self.form(kinds, *pytree.tree_unflatten(leaves, self.spec))


def check_call(target: Any, given: tuple[Any, ...]) -> None:
    functions = Functions()
    call = Called(functions, target, given)
    with torch.no_grad():
        exported = torch.export.export(call, call.tensors, strict=False)
        made = torch.onnx.export(exported, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    assert made is not None
    model = onnx_ir.to_proto(made.model)
    functions.add_to(model, OPSET)
    assert [node.op_type.partition("_")[0] for node in model.graph.node if node.domain == DOMAIN] == [TRACED[target]]
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {entry.name: tensor.numpy() for entry, tensor in zip(model.graph.input, call.tensors)}
    wanted = {entry.name for entry in session.get_inputs()}
    found = session.run(None, {name: x for name, x in feeds.items() if name in wanted})
    for one, other in zip(found, call.wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other.contiguous(), rtol=1e-11, atol=1e-11)


def name_of(target: Any) -> str:
    return TRACED[target]


def test_a_call() -> None:
    torch.manual_seed(0)
    check_call(MERGE, SAMPLES[MERGE]()[0])


@pytest.mark.slow
@pytest.mark.parametrize("target", TRACED, ids=name_of)
def test_all_calls(target: Any) -> None:
    torch.manual_seed(0)
    for given in SAMPLES[target]():
        check_call(target, given)


def test_what_torch_onnx_does_not_know() -> None:
    ordered = torch.tensor([1.0, 2.0, 2.0, 5.0])
    for x in (torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0, 6.0]), torch.rand(2, 3) * 6):
        for right in (False, True):
            found = searched([], ordered, x, right=right)
            assert torch.equal(found, torch.searchsorted(ordered, x, right=right)) and found.dtype is torch.int64
    rows = torch.stack([ordered, ordered.flip(0)])
    order = rows.argsort(1)
    wanted = torch.searchsorted(rows, rows, sorter=order, side="right", out_int32=True)
    assert torch.equal(searched([], rows, rows, sorter=order, side="right", out_int32=True), wanted)
    pieces: list[tuple[Any, Any]] = [
        (torch.ops.aten.split.Tensor, 3),
        (torch.ops.aten.split_with_sizes.default, [1, 4, 2]),
    ]
    for target, sizes in pieces:
        parts = target(rows.repeat(1, 2)[:, :7], sizes, -1)
        made = parted(target, [(x.dtype, x.shape) for x in parts], rows.repeat(1, 2)[:, :7], sizes, -1)
        assert all(torch.equal(one, other) for one, other in zip(made, parts, strict=True))
    numbers = torch.randint(-2, 9, (50,)).float()
    assert torch.equal(counted([], numbers, 7, 0, 6), torch.histc(numbers, 7, 0, 6))


# ---------------------------------------------------------------- in files


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.other, self.bags = nn.GRU(8, 8), nn.LSTM(8, 8, proj_size=4), nn.EmbeddingBag(16, 8)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        rows = self.bags(ids) + self.bags(ids.flip(0))
        found: Tensor = self.other(self.cell(x + rows)[0])[0]
        return found


def test_equal_calls_share_a_function(tmp_path: Path) -> None:
    """Two look-ups are two nodes of one function; written out where a dialect has no functions."""
    torch.manual_seed(0)
    model = Layers()
    program = compile_program(
        model, Mesh(), Plan(check_numerics=False), (torch.randint(16, (4, 3)), torch.randn(5, 4, 8))
    )
    written(program, model, tmp_path)
    found = onnx.load(tmp_path / "rank0.onnx", load_external_data=False)
    calls = Counter(node.op_type for node in found.graph.node if node.domain == DOMAIN)
    assert calls.keys() == {function.name for function in found.functions}
    assert Counter(name.partition("_")[0] for name in calls.elements()) == {"EmbeddingBags": 2, "RecurrentLayer": 2}
    inside = {node.op_type for function in found.functions for node in function.node}
    assert {"GRU", "Scan"} <= inside
    plain = to_tensorrt(found, "rank0.onnx")
    assert not plain.functions and {node.domain for node in plain.graph.node} == {""}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, axes, operator", [("mixtral", {"ep": 2}, "ExpertLinear"), ("llama", {"sp": 2}, "AttentionTile")]
)
def test_layers_of_models_are_one_node(name: str, axes: dict[str, int], operator: str, tmp_path: Path) -> None:
    model, batch = examples.build(name, torch.float32)
    program = compile_program(model, Mesh(**axes), Plan(check_numerics=False), (), batch)
    written(program, model, tmp_path)
    for rank in range(2):
        found = onnx.load(tmp_path / f"rank{rank}.onnx", load_external_data=False)
        names = [node.op_type.partition("_")[0] for node in found.graph.node if node.domain == DOMAIN]
        assert Counter(names)[operator] == (4 if operator == "ExpertLinear" else 2)
