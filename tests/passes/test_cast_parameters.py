"""Mixed precision: what is cast, in what dtype things are gathered and reduced, on whole meshes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.analysis.footprint import sent
from autopar.compiler import compile_program, finish_program, place
from autopar.frontend.trace import trace
from autopar.ir.node import value
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.ir.tables import InputKind, Pins
from autopar.ir.traffic import Transfer
from autopar.mesh import Mesh
from autopar.models import gpt, llama
from autopar.passes.cast_parameters import cast_parameters
from autopar.plan import Plan
from autopar.precision import Precision
from autopar.simulate import simulate
from autopar.simulator.parts import Step
from autopar.zoo.named import named_model
from tests.conftest import Golden
from tests.selection import slow_but

FORWARD = """
program mesh(dp=2)
  w = param w                  : bf16[8@dp,4]
  b = param b                  : f32[8]
  x = input                    : bf16[8@dp,4] nograd
  g = comm.all_gather(w, dp, dim=0) : bf16[8,4]
  y = aten.linear(x, g)        : bf16[8@dp,8]
  return y
"""
MESHES = {
    "odd": ("dp=1", "dp=3", "tp=2", "dp=2,tp=2"),
    "gpt": ("dp=1", "dp=3", "dp_replicate=2,dp_shard=2"),
    "llama": ("dp=2", "tp=2", "dp=2,tp=2"),
}
RECOMPUTED: dict[str, Any] = {"zero": 2, "recompute": "full"}
MEGATRON: dict[str, Any] = {"zero": 3, "sequence": "megatron"}
HALF_A_ULP = 2.0**-24


def test_parameters_and_inputs(golden: Golden) -> None:
    plan = Plan(precision=Precision(param="bf16", output="f32"))
    program = replace(parse(FORWARD, plan), pins=Pins(dtypes={"w": torch.float32, "x": torch.float32}))
    after = cast_parameters(program)
    assert not after.pins.dtypes
    golden("cast_parameters", after)


class Odd(nn.Module):
    """A floating input with a gradient, a scalar, a tied weight, one frozen and one unused parameter, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.again = nn.Linear(7, 13), nn.Linear(13, 7), nn.Linear(7, 13, bias=False)
        self.again.weight = self.up.weight
        self.scale, self.unused = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(11))
        self.frozen = nn.Parameter(torch.randn(13), requires_grad=False)
        self.register_buffer("shift", torch.randn(13).double())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.down((self.up(x) * self.scale + self.frozen + self.shift.to(x.dtype)).tanh())
        return {"loss": self.again(h).square().mean(), "h": h}


@cache
def _case(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    if name == "odd":
        return Odd(), {"x": torch.randn(12, 7, requires_grad=True)}
    family = {"gpt": gpt, "llama": llama}[name]
    return family.build(), family.example_batch(family.PRESETS["tiny"], 12, 8, 0)


@cache
def _traced(name: str, param: str | None) -> Program:
    model, batch = _case(name)
    return trace(model, (), batch, plan=Plan(precision=Precision(param)))


def _program(name: str, mesh: str, plan: Plan) -> Program:
    return finish_program(place(_traced(name, plan.precision.param), Mesh.parse(mesh), plan))


def _step(name: str, mesh: str, plan: Plan) -> Step:
    model, batch = _case(name)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return simulate(_program(name, mesh, plan), {key: tensor.detach() for key, tensor in state.items()}, (), batch)


def _plain(model: nn.Module, batch: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a copy of the model in ``dtype``; those of floating inputs too."""
    model = copy.deepcopy(model).to(dtype)
    inputs = {k: t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for k, t in batch.items()}
    loss = model(**inputs)["loss"]
    loss.backward()
    tensors = dict(model.named_parameters()) | inputs
    return loss.detach(), {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


@pytest.mark.parametrize("name", slow_but([0, 1], ["odd", "gpt", "llama"]))
def test_computing_in_float64_is_exact(name: str) -> None:
    """On the same float32 weights: loss to 1e-12, gradients up to their one rounding to float32."""
    loss, grads = _plain(*_case(name), torch.float64)
    for mesh in MESHES[name]:
        for reduce, choices in (("f64", {}), (None, RECOMPUTED), ("f64", MEGATRON)):
            plan = Plan(precision=Precision("f64", reduce), on_indivisible="replicate", **choices)
            step = _step(name, mesh, plan)
            assert step.loss is not None and step.loss.dtype == torch.float64
            assert abs(float(step.loss / loss) - 1) < 1e-12, (mesh, plan)
            assert step.grads.keys() == grads.keys()
            for key, grad in step.grads.items():
                assert grad.dtype == torch.float32
                error = ((grad - grads[key]).abs() / grads[key].abs().clamp(min=1e-9)).max()
                assert error <= 1.01 * HALF_A_ULP, (mesh, plan, key, float(error))


def test_float32_reductions_of_float64_gradients_round_once_more() -> None:
    _, grads = _plain(*_case("llama"), torch.float64)
    found = _step("llama", "dp=3", Plan(precision=Precision("f64", "f32"))).grads
    worst = max(float(((found[k] - g).abs() / g.abs().max()).max()) for k, g in grads.items())
    assert HALF_A_ULP < worst < 2.0**-21


def _error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest of all parameters, of the 2-norm of the difference over that of the gradient."""
    return max(float((found[k].double() - g.double()).norm() / g.double().norm()) for k, g in wanted.items())


@pytest.mark.parametrize("name", slow_but([0], ["gpt", "llama"]))
def test_bfloat16_is_as_exact_as_a_model_in_bfloat16(name: str) -> None:
    """As near to float64 as a bf16 copy: the loss, or half a unit of bf16; gradients up to a factor of 1.5. Against
    that copy: gradients bit for bit on one device (gpt), else to 2^-5 of their norm, which is eight roundings."""
    exact, truth = _plain(*_case(name), torch.float64)
    loss, plain = _plain(*_case(name), torch.bfloat16)
    for mesh in MESHES[name]:
        for stage, reduce in ((0, None), (3, "f32")):
            step = _step(name, mesh, Plan(zero=stage, precision=Precision("bf16", reduce)))
            assert step.loss is not None
            assert abs(float(step.loss - exact)) <= max(abs(float(loss - exact)), 2.0**-8 * float(exact)), (
                mesh,
                reduce,
            )
            assert _error(step.grads, plain) <= (0.0 if (name, mesh) == ("gpt", "dp=1") else 2.0**-5), (mesh, reduce)
            assert _error(step.grads, truth) <= 1.5 * _error(plain, truth), (mesh, reduce)


def _bytes(traffic: Sequence[Transfer], phase: str, name: str) -> int:
    return sum(t.bytes for t in traffic if (t.phase, t.axis, t.name) == (phase, "dp", name))


@pytest.mark.parametrize("stage", slow_but([3], range(4)))
def test_bytes(stage: int) -> None:
    """In bf16 everything is half; what is reduced in float32 is not."""
    full, half, mixed = (
        sent(_program("llama", "dp=2", Plan(zero=stage, precision=precision)))
        for precision in (Precision(), Precision("bf16"), Precision("bf16", "f32"))
    )
    sums = "reduce_scatter" if stage else "all_reduce"
    for phase in ("forward", "backward"):
        gathered = _bytes(full, phase, "all_gather")
        assert bool(gathered) == (stage == 3 or (stage > 0 and phase == "forward"))
        assert _bytes(half, phase, "all_gather") == _bytes(mixed, phase, "all_gather") == gathered / 2
    reduced = _bytes(full, "backward", sums)
    assert _bytes(half, "backward", sums) == reduced / 2 and _bytes(mixed, "backward", sums) == reduced > 0


def test_the_own_dtype_changes_nothing() -> None:
    own, none = (_program("gpt", "dp=2,tp=2", Plan(precision=p)) for p in (Precision("f32", "f32", "f32"), Precision()))
    assert str(own) == str(none)


def test_a_tied_parameter_is_cast_once() -> None:
    program = _program("gpt", "dp=2,tp=2", Plan(precision=Precision("bf16")))
    for node, entry in program.placeholders(InputKind.PARAMETER):
        assert value(node).dtype == torch.float32 and len(node.users) == 1, entry
    assert all(parameter.dtype == torch.float32 for parameter in _case("gpt")[0].parameters())
    assert any(entry.aliases for _, entry in program.placeholders(InputKind.PARAMETER))


def test_outputs_have_the_dtype_that_is_asked_for() -> None:
    step = _step("odd", "dp=2", Plan(precision=Precision("bf16", output="f32")))
    assert step.output["loss"].dtype == step.output["h"].dtype == torch.float32
    assert _step("odd", "dp=2", Plan(precision=Precision("bf16"))).output["h"].dtype == torch.bfloat16


def test_batch_norm_stays_beside_its_statistics() -> None:
    example = named_model("cnn")
    program = compile_program(example.model, Mesh(dp=2), Plan(precision=Precision("bf16")), (), example.batch)
    text = str(program)
    assert "f32[" in text and "bf16[" in text
    step = simulate(program, example.model.state_dict(), (), example.batch)
    loss = example.model(**example.batch)["loss"].detach()
    assert step.loss is not None and float((step.loss - loss).abs()) < 0.05
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in step.buffers.values())


def test_many_losses_in_float16() -> None:
    """Their sum is no float16; torch's own mean of them is infinite on a CPU."""
    logits = nn.Embedding(4, 8)

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.logits(ids), labels)

    batch = {"ids": torch.randint(0, 4, (60_000,)), "labels": torch.randint(0, 8, (60_000,))}
    model = Losses()
    program = compile_program(model, Mesh(dp=2), Plan(precision=Precision("fp16"), check_numerics=False), (), batch)
    step = simulate(program, model.state_dict(), (), batch)
    assert step.loss is not None and step.loss.dtype == torch.float16
    assert float(step.loss) == pytest.approx(float(model(**batch).detach()), rel=2e-3)


def test_a_model_without_weights_is_not_made() -> None:
    with torch.device("meta"):
        model = llama.build()
    batch = llama.example_batch(llama.PRESETS["tiny"], 4, 8, 0)
    program = compile_program(model, Mesh(dp=2), Plan(zero=3, precision=Precision("bf16")), (), batch)
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert {value(node).dtype for node, _ in program.placeholders(InputKind.PARAMETER)} == {torch.float32}


def test_a_trace_of_another_precision() -> None:
    with pytest.raises(ValueError, match="trace again"):
        place(_traced("gpt", None), Mesh(dp=2), Plan(precision=Precision("bf16")))
