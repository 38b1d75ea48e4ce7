"""Stacks of recurrent layers taken apart: whole models against eager, dropout that no mesh changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.analysis.footprint import sent
from autopar.check import TOLERANCE, check
from autopar.compiler import compile_program, split_program
from autopar.errors import IndivisibleError
from autopar.ir.parse import parse
from autopar.mesh import Mesh
from autopar.models import lstm
from autopar.plan import Plan
from autopar.simulate import simulate

FORMS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm-both-ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm-projected": (nn.LSTM, {"num_layers": 2, "proj_size": 2, "bias": False, "batch_first": True}),
    "gru-both-ways": (nn.GRU, {"num_layers": 2, "bidirectional": True, "bias": False}),
    "gru-stacked": (nn.GRU, {"num_layers": 3, "batch_first": True}),
    "rnn": (nn.RNN, {"nonlinearity": "relu", "batch_first": True}),
}


class Reads(nn.Module):
    """A recurrent stack, with a loss over its steps and its final states."""

    def __init__(self, form: str) -> None:
        super().__init__()
        kind, options = FORMS[form]
        self.stack = kind(6, 4, **options)

    def forward(self, x: Tensor, start: Tensor | None = None) -> dict[str, Tensor]:
        if not self.stack.batch_first:
            x = x.transpose(0, 1)
        y, final = self.stack(x, None if start is None else start.transpose(0, 1))
        states = final if isinstance(final, tuple) else (final,)
        loss = y.square().mean() + sum((state * state.cos()).mean() for state in states)
        return {"loss": loss, **{f"state{i}": state.transpose(0, 1) for i, state in enumerate(states)}}


@pytest.mark.parametrize("mesh", ["dp=2", "dp=3"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_model(form: str, mesh: str) -> None:
    torch.manual_seed(0)
    report = check(Reads(form), {"x": torch.randn(12, 5, 6)}, Mesh.parse(mesh), Plan(check_numerics=False))
    assert report.worst <= TOLERANCE
    assert {(transfer.axis, transfer.name) for transfer in sent(report.program)} == {("dp", "all_reduce")}
    assert "aten.lstm" not in str(report.program)
    assert str(parse(str(report.program))) == str(report.program)


def test_first_states_may_be_given() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(12, 5, 6), "start": torch.randn(12, 3, 4)}
    assert check(Reads("gru-stacked"), batch, Mesh(dp=2)).worst <= TOLERANCE


def test_dropout_between_layers_is_the_same_on_every_mesh() -> None:
    torch.manual_seed(0)
    model = lstm.build(dropout=0.3, layers=3).double()
    batch = lstm.example_batch(model)
    tensors = dict(model.named_parameters())

    def loss(mesh: Mesh, seed: int = 0) -> float:
        program = compile_program(model, mesh, Plan(check_numerics=False), (), batch)
        step = simulate(program, {k: v.detach() for k, v in tensors.items()}, (), batch, seed=seed)
        assert step.loss is not None
        return float(step.loss)

    assert loss(Mesh(dp=2)) == pytest.approx(loss(Mesh(dp=3)), rel=1e-12)
    assert loss(Mesh(dp=2)) != pytest.approx(loss(Mesh(dp=2), seed=1), rel=1e-6)


def test_tensor_parallelism_is_refused_unless_the_layers_may_stay_whole() -> None:
    model = lstm.build()
    batch = lstm.example_batch(model)
    with pytest.raises(IndivisibleError, match=r"layers\.weight_ih_l0.*whole of it(.|\n)*'layers\.\*': 'replicate'"):
        split_program(model, Mesh(tp=2), Plan(check_numerics=False), (), batch)
    report = check(model, batch, Mesh(dp=2, tp=2), Plan(tensor={"layers.*": "replicate"}, check_numerics=False))
    assert report.worst <= TOLERANCE
