"""Tracing: tables of inputs and outputs, what must survive of gradients, models without weights, refusals."""

from __future__ import annotations

import math
import resource
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.errors import NumericsError, TraceError
from autopar.frontend.numerics import gradient_error, input_tensors, promote_float32, run_graph
from autopar.frontend.trace import trace
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.signature import restore_output
from autopar.ir.tables import InputKind, Output, OutputKind
from autopar.mesh import Mesh
from autopar.plan import Plan

aten = torch.ops.aten
UNCHECKED = Plan(check_numerics=False)


class Base(nn.Module):
    """Two weights; ``forward`` is what a test is about."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.v = nn.Parameter(torch.randn(4, 4))
        self.w = nn.Parameter(torch.randn(4, 4))


def run(program: Program, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return restore_output(program, run_graph(program.graph, input_tensors(program, model, args, kwargs)))


def names(program: Program, kind: InputKind) -> list[str]:
    return [entry.target for entry in program.inputs if entry.kind is kind]


# ---------------------------------------------------------------- inputs and outputs


class Pair(NamedTuple):
    left: Any
    right: Any


def test_structures_come_back_as_they_were() -> None:
    class Structured(Base):
        def forward(self, x: Tensor, scale: float, pairs: list[Pair], flag: bool = True) -> dict[str, Any]:
            y = x @ self.w * scale
            return {"y": y, "nothing": None, "pair": Pair(3, (y.relu(), pairs[0].right)), "word": "ok"}

    model, x, extra = Structured(), torch.randn(2, 4), torch.arange(3)
    args = (x, 2.0, [Pair(torch.ones(2), extra)])
    program = trace(model, args)
    assert names(program, InputKind.INPUT) == ["x", "pairs.0.left", "pairs.0.right"]
    assert program.static_inputs == ((1, 2.0),)
    assert [entry.target for entry in program.outputs] == ["y", "pair.right.0", "pair.right.1"]
    assert program.static_outputs == ((1, None), (2, 3), (5, "ok"))
    found = run(program, model, *args)
    assert found["pair"].left == 3 and found["nothing"] is None and found["word"] == "ok"
    assert torch.equal(found["y"], x @ model.w * 2) and torch.equal(found["pair"].right[1], extra)


def test_calls_of_another_form_are_refused() -> None:
    class Scaled(Base):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x @ self.w * scale

    model, x = Scaled(), torch.randn(2, 4)
    program = trace(model, (x,), {"scale": 2.0})
    with pytest.raises(TraceError, match=r"argument 1 was 2.0 when the model was traced and is 3.0 now"):
        input_tensors(program, model, (x,), {"scale": 3.0})
    with pytest.raises(TraceError, match="other arguments"):
        input_tensors(program, model, (x,), {})


def test_one_tensor_passed_twice_stays_two_inputs() -> None:
    class Two(Base):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ self.w - y

    model, x, y = Two(), torch.randn(4, 4), torch.randn(4, 4)
    program = trace(model, (x,), {"y": x})
    assert names(program, InputKind.INPUT) == ["x", "y"]
    assert torch.equal(run(program, model, x, y=y), x @ model.w - y)


def test_order_of_inputs_and_tied_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("offset", torch.ones(4), persistent=False)
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight
            self.unused = nn.Parameter(torch.randn(3))
            self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.head(self.embed(ids) + self.offset * self.frozen * torch.tensor(3.0))
            return found

    program = trace(Tied(), (torch.randint(0, 10, (2, 3)),))
    kinds = [entry.kind for entry in program.inputs]
    assert kinds == sorted(kinds, key=list(InputKind).index)
    tied = next(entry for entry in program.inputs if entry.target == "embed.weight")
    assert tied.aliases == ("head.weight",)
    assert names(program, InputKind.PARAMETER) == ["unused", "frozen", "embed.weight"]
    assert len(program.constants) == 1
    needs = {entry.target: value(node).requires_grad for node, entry in program.placeholders(*InputKind)}
    assert needs["embed.weight"] and needs["unused"] and not (needs["frozen"] or needs["offset"] or needs["ids"])


def test_buffer_updates_are_outputs_and_tracing_leaves_the_model_alone() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), torch.randn(8, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the same random numbers: nothing is skipped
        program = trace(model, (x,))
    updates = [entry.target for entry in program.outputs if entry.kind is OutputKind.BUFFER_UPDATE]
    assert program.outputs[0] == Output(OutputKind.USER, "0")
    assert updates == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(0)
    outputs = run_graph(program.graph, input_tensors(program, model, (x,), {}))
    torch.manual_seed(0)
    assert torch.equal(outputs[0], model(x))
    torch.testing.assert_close(outputs[1], model[1].running_mean)


# ---------------------------------------------------------------- models without weights


def test_models_without_weights() -> None:
    hugging_face = pytest.importorskip("tests.hugging_face")
    model, batch = hugging_face.build("t5", torch.float32, num_layers=1)
    expected = str(trace(model, (), batch))
    config = model.config
    with torch.device("meta"):
        meta = type(model)(config).train()
    assert str(trace(meta, (), batch)) == expected
    assert str(trace(meta, (), {key: tensor.to("meta") for key, tensor in batch.items()})) == expected
    assert all(parameter.is_meta for parameter in meta.parameters())
    with FakeTensorMode():
        fake = type(model)(config).train()
    assert str(trace(fake, (), batch)) == expected


def test_a_big_model_is_not_allocated() -> None:
    """Four layers of Llama-70B: 14 GB of weights, 16 GB of logits."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(num_hidden_layers=4, vocab_size=128256, use_cache=False, **sizes)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    ids = torch.zeros(8, 2048, dtype=torch.int64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = trace(model, (), {"input_ids": ids, "labels": ids}, Mesh(dp=2, tp=8), Plan())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert value(program.returned[1]).shape == (8, 2048, 128256)
    assert program.mesh == Mesh(dp=2, tp=8)


# ---------------------------------------------------------------- numerics


def test_a_graph_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math, "calls", 0, raising=False)  # a place at which nobody looks

    class Counting(Base):
        def forward(self, x: Tensor) -> Tensor:
            math.__dict__["calls"] += 1
            return x @ self.w * math.__dict__["calls"]  # type: ignore[no-any-return]

    with pytest.raises(NumericsError, match=r"output\[?.* differs by 0.5(?s:.*)Way out"):
        trace(Counting(), (torch.randn(4, 4),))
    trace(Counting(), (torch.randn(4, 4),), plan=UNCHECKED)


def test_gradient_error_has_a_floor() -> None:
    reference = {"w": torch.tensor([10.0, 1.0]), "bias": torch.tensor([1e-12]), "unused": None}
    found = {"w": torch.tensor([10.0, 2.0]), "bias": torch.tensor([2e-12]), "unused": None}
    errors = gradient_error(found, reference)
    assert errors["w"] == pytest.approx(0.1) and errors["bias"] == pytest.approx(1e-7, rel=1e-3)
    assert errors["unused"] == 0 and gradient_error({"unused": torch.ones(1)}, reference)["w"] == 1.0


def test_promoted_casts() -> None:
    class Casting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.float() + x.to(torch.float32) + torch.tensor(3.0) + torch.zeros(4, dtype=torch.float32)
            return y.to(dtype=torch.float32).to(x.dtype)

    x = torch.full((4,), 1 / 3, dtype=torch.float64)
    with promote_float32():
        assert Casting()(x).dtype == torch.float64 and Casting()(x)[0] == 1 / 3 + 1 / 3 + 3
        program = trace(Casting(), (x,))
        assert torch.equal(run(program, Casting(), x), Casting()(x))
    assert torch.get_default_dtype() == torch.float32 and Casting()(x)[0] != 1 / 3 + 1 / 3 + 3


def test_key_value_cache_is_left_out_with_a_note() -> None:
    hugging_face = pytest.importorskip("tests.hugging_face")
    model, batch = hugging_face.build("llama", torch.float32, use_cache=True)
    with pytest.warns(UserWarning, match="DynamicCache"):
        program = trace(model, (), batch)
    found = run(program, model, **batch)
    assert type(found).__name__ == "CausalLMOutputWithPast" and found.past_key_values is None


# ---------------------------------------------------------------- refusals


class Branch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w
        if y.sum() > 0:
            return y
        return -y


class Item(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(self.w.sum().item())]


class BooleanIndex(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x[x * self.w > 0].max()


class ThroughNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy((x @ self.w).detach().numpy() * 2)


class Broken(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + torch.zeros(3)


class WritesInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return x @ self.w


class Cond(Base):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x @ self.w,))
        return found


class Cache(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


REFUSALS: list[tuple[type[Base], Any, str, str]] = [
    (Branch, None, "depends on the values in a tensor", "in forward: if y.sum() > 0:"),
    (Item, None, "depends on the values in a tensor", "self.w.sum().item()"),
    (BooleanIndex, None, "size of a tensor depends on the values", "x[x * self.w > 0]"),
    (ThroughNumpy, None, "numpy", ".numpy() * 2"),
    (Broken, None, "broadcast", "torch.zeros(3)"),
    (WritesInput, None, "in place", "'x'"),
    (Cond, None, "control-flow operator", "torch.cond"),
    (Cache, object(), "Unsupported input type", "lists, tuples and dicts"),
]


@pytest.mark.parametrize(
    ("kind", "argument", "problem", "line"), REFUSALS, ids=lambda part: getattr(part, "__name__", "")
)
def test_refusals_name_the_line_and_the_way_out(
    kind: type[Base], argument: Any, problem: str, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TraceError) as info:
        trace(kind(), (torch.randn(4, 4) if argument is None else argument,))
    message = str(info.value)
    assert problem in message and line in message and "Way out: " in message
    assert message.count("\n") < 15
    assert capfd.readouterr().err == ""  # torch prints the graph so far


def test_a_call_that_does_not_fit_is_refused() -> None:
    with pytest.raises(TraceError, match="TypeError"):
        trace(Cache(), (torch.randn(4, 4), 1, 2, 3))


class Marked(nn.Module):
    """A sparse buffer that forward does not read (Whisper keeps the heads that align so)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("marks", torch.eye(4, dtype=torch.bool).to_sparse(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).square().mean()


def test_a_sparse_buffer_that_nothing_reads_is_no_input() -> None:
    program = trace(Marked(), (torch.randn(2, 4),))
    assert "marks" not in {entry.target for entry in program.inputs}


class NormUnderTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.norm(self.linear(x))).square().mean()  # type: ignore[no-any-return]


def test_a_changing_buffer_under_two_names_is_refused_in_words() -> None:
    with pytest.raises(TraceError, match=r"several names \('again' is a submodule.*torch.export"):
        trace(NormUnderTwoNames(), (torch.randn(8, 4),))
    model = NormUnderTwoNames().eval()
    assert trace(model, (torch.randn(8, 4),))
