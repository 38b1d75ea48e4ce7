"""Programs written by hand, run on all ranks in lock-step, against plain autograd in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autopar.autodiff.differentiate import differentiate
from autopar.errors import InvariantError
from autopar.ir.parse import parse
from autopar.mesh import Mesh
from autopar.simulate import simulate
from autopar.simulator.lockstep import Lockstep
from autopar.simulator.parts import Step

SIZES = (1, 2, 3, 4)

# column then row, the batch split: section 6 of the design
MLP = """
program mesh(dp={dp} tp={tp})
  up     = param up.weight : f64[48@tp,6]
  down   = param down.weight : f64[6,48@tp]
  x      = input : f64[12@dp,5,6]
  up_r   = comm.enter(up, dp) : f64[48@tp,6]
  down_r = comm.enter(down, dp) : f64[6,48@tp]
  x_r    = comm.enter(x, tp) : f64[12@dp,5,6]
  h      = aten.linear(x_r, up_r) : f64[12@dp,5,48@tp]
  a      = aten.gelu(h) : f64[12@dp,5,48@tp]
  p      = aten.linear(a, down_r) : f64[12@dp,5,6]{{sum:tp}}
  y      = comm.all_reduce(p, tp) : f64[12@dp,5,6]
  square = aten.pow.Tensor_Scalar(y, 2) : f64[12@dp,5,6]
  local  = aten.sum(square) : f64[]{{sum:dp}}
  total  = comm.all_reduce(local, dp) : f64[]
  loss   = aten.div.Tensor(total, 360) : f64[]
  return loss=loss, y=y
"""

# a bias behind a row-parallel product is added once: on the first rank, before the reduction
ROW_BIAS = """
program mesh(tp={tp})
  w    = param weight : f64[6,48@tp]
  b    = param bias : f64[6]
  x    = input : f64[4,48@tp]
  b_1  = comm.keep_first(b, tp) : f64[6]{{sum:tp}}
  p    = aten.linear(x, w, b_1) : f64[4,6]{{sum:tp}}
  y    = comm.all_reduce(p, tp) : f64[4,6]
  s    = aten.sin(y) : f64[4,6]
  loss = aten.sum(s) : f64[]
  return loss=loss
"""

# the sequence split between the blocks (Korthikanti et al. 2022): gather, column, row, scatter
SEQUENCE = """
program mesh(tp={tp})
  scale  = param scale : f64[6]
  up     = param up.weight : f64[24@tp,6]
  down   = param down.weight : f64[6,24@tp]
  x      = input : f64[2,{length}@tp,6]
  sc     = comm.enter(scale, tp) : f64[6]
  n      = aten.mul.Tensor(x, sc) : f64[2,{length}@tp,6]
  g      = comm.all_gather(n, tp, dim=1, length={length}) : f64[2,{length},6]
  h      = aten.linear(g, up) : f64[2,{length},24@tp]
  a      = aten.tanh(h) : f64[2,{length},24@tp]
  p      = aten.linear(a, down) : f64[2,{length},6]{{sum:tp}}
  y      = comm.reduce_scatter(p, tp, dim=1, length={length}) : f64[2,{length}@tp,6]
  square = aten.pow.Tensor_Scalar(y, 2) : f64[2,{length}@tp,6]
  part   = aten.sum(square) : f64[]{{sum:tp}}
  loss   = comm.all_reduce(part, tp) : f64[]
  return loss=loss, y=y
"""

# the mean over the tokens that are not masked: a global sum over a global count
MEAN = """
program mesh(dp={dp})
  w     = param weight : f64[6]
  x     = input : f64[12@dp,6]
  keep  = input : f64[12@dp]
  w_r   = comm.enter(w, dp) : f64[6]
  z     = aten.mv(x, w_r) : f64[12@dp]
  e     = aten.exp(z) : f64[12@dp]
  k     = aten.mul.Tensor(e, keep) : f64[12@dp]
  s     = aten.sum(k) : f64[]{{sum:dp}}
  c     = aten.sum(keep) : f64[]{{sum:dp}} nograd
  every = comm.all_reduce(s, dp) : f64[]
  count = comm.all_reduce(c, dp) : f64[] nograd
  loss  = aten.div.Tensor(every, count) : f64[]
  return loss=loss
"""


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _mlp(p: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    y = functional.gelu(x @ p["up.weight"].T) @ p["down.weight"].T
    return (y**2).sum() / 360, y


def _row_bias(p: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor]:
    return (functional.linear(x, p["weight"], p["bias"]).sin().sum(),)


def _sequence(p: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    y = functional.linear(functional.linear(x * p["scale"], p["up.weight"]).tanh(), p["down.weight"])
    return (y**2).sum(), y


def _mean(p: Mapping[str, Tensor], x: Tensor, keep: Tensor) -> tuple[Tensor]:
    return (((x @ p["weight"]).exp() * keep).sum() / keep.sum(),)


Reference = Callable[..., tuple[Tensor, ...]]


def _same(text: str, model: Reference, shapes: Mapping[str, tuple[int, ...]], inputs: tuple[Tensor, ...]) -> Step:
    """Simulate the program and compare outputs and gradients with those of ``model`` on one device."""
    torch.manual_seed(0)
    parameters = {name: _random(*shape).requires_grad_() for name, shape in shapes.items()}
    expected = model(parameters, *inputs)
    expected[0].backward()  # type: ignore[no-untyped-call]
    program = differentiate(parse(text.strip()))
    step = simulate(program, parameters, inputs)
    for found, wanted in zip(step.output, expected, strict=True):
        assert float((found - wanted).detach().abs().max()) <= 1e-12 * max(1.0, float(wanted.detach().abs().max()))
    assert set(step.grads) == set(parameters)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        assert float((step.grads[name] - parameter.grad).abs().max()) <= 1e-12 * scale, name
    other = simulate(program, parameters, inputs, backward=False)
    assert other.grads == {} and step.loss is not None and other.loss is not None
    assert abs(float(other.loss - step.loss)) <= 1e-12 * abs(float(step.loss))
    return step


@pytest.mark.parametrize(("dp", "tp"), itertools.product(SIZES, SIZES))
def test_column_and_row_with_the_batch_split(dp: int, tp: int) -> None:
    shapes = {"up.weight": (48, 6), "down.weight": (6, 48)}
    step = _same(MLP.format(dp=dp, tp=tp), _mlp, shapes, (_random(12, 5, 6),))
    found = {(t.phase, t.axis, t.name): (t.operations, t.bytes) for t in step.traffic}
    expected = {}
    if tp > 1:
        expected["forward", "tp", "all_reduce"] = 1, 2 * (tp - 1) * (12 // dp * 5 * 6 * 8) // tp
    if dp > 1:
        expected["forward", "dp", "all_reduce"] = 1, 2 * (dp - 1) * 8 // dp
        expected["backward", "dp", "all_reduce"] = 2, 2 * (2 * (dp - 1) * (48 // tp * 6 * 8) // dp)
    assert found == expected


@pytest.mark.parametrize("tp", SIZES)
def test_a_bias_behind_a_row_parallel_product_is_added_once(tp: int) -> None:
    _same(ROW_BIAS.format(tp=tp), _row_bias, {"weight": (6, 48), "bias": (6,)}, (_random(4, 48),))


@pytest.mark.parametrize(("tp", "length"), itertools.product(SIZES, (12, 7)))
def test_the_sequence_split_between_blocks(tp: int, length: int) -> None:
    shapes = {"scale": (6,), "up.weight": (24, 6), "down.weight": (6, 24)}
    step = _same(SEQUENCE.format(tp=tp, length=length), _sequence, shapes, (_random(2, length, 6),))
    names = {(t.phase, t.name): t.operations for t in step.traffic}
    if tp > 1:
        assert names["forward", "all_gather"] == names["forward", "reduce_scatter"] == 1
        assert names["backward", "all_gather"] == names["backward", "reduce_scatter"] == 1


@pytest.mark.parametrize("dp", SIZES)
def test_a_mean_over_unequal_numbers_of_tokens(dp: int) -> None:
    keep = torch.ones(12, dtype=torch.float64)
    keep[:4] = 0.0  # at dp=3 the first rank has no token at all
    _same(MEAN.format(dp=dp), _mean, {"weight": (6,)}, (_random(12, 6), keep))


def _simulated(text: str, *inputs: Tensor, **parameters: Tensor) -> Step:
    return simulate(differentiate(parse(text.strip())), parameters, inputs)


def test_ranks_that_drift_are_found() -> None:
    text = """
program mesh(tp=2)
  w    = param w : f64[4]
  x    = input : f64[4@tp]
  s    = aten.sum(x) : f64[] grad
  m    = aten.mul.Tensor(s, w) : f64[4]
  loss = aten.sum(m) : f64[]
  return loss=loss
"""
    with pytest.raises(InvariantError, match="output loss .loss.: ranks 0 and 1 .* should hold the same value"):
        _simulated(text, torch.arange(4.0, dtype=torch.float64), w=_random(4))


def test_a_gradient_that_is_not_reduced_is_found() -> None:
    text = """
program mesh(dp=2)
  w    = param w : f64[3]
  x    = input : f64[4@dp,3]
  z    = aten.mv(x, w) : f64[4@dp]
  s    = aten.sum(z) : f64[]{sum:dp}
  loss = comm.all_reduce(s, dp) : f64[]
  return loss=loss
"""
    with pytest.raises(InvariantError, match="gradient of w: ranks 0 and 1"):
        _simulated(text, _random(4, 3), w=_random(3))


def test_a_failing_rank_is_named() -> None:
    text = """
program mesh(tp=2)
  x = input : f64[4@tp,3]
  y = aten.view(x, [4, 3]) : f64[4,3]
  return y
"""
    with pytest.raises(InvariantError, match=r"rank 0: y = aten.view.default failed on shapes \[\[2, 3\]\]"):
        Lockstep(Mesh(tp=2)).run(parse(text.strip()).graph, [[_random(2, 3), _random(2, 3)]])
    with pytest.raises(InvariantError, match=r"y = aten.view.default .*cannot run on the local shapes \[\[2, 3\]\]"):
        differentiate(parse(text.strip()))


def test_a_tensor_of_another_shape_is_refused() -> None:
    program = differentiate(parse(MLP.format(dp=1, tp=2).strip()))
    with pytest.raises(ValueError, match=r"param 'up.weight' is \[48, 7\], the program was made for \[48, 6\]"):
        simulate(program, {"up.weight": _random(48, 7), "down.weight": _random(6, 48)}, (_random(12, 5, 6),))
    with pytest.raises(KeyError, match="no tensor was given for 'down.weight'"):
        simulate(program, {"up.weight": _random(48, 6)}, (_random(12, 5, 6),))


def test_without_a_loss_all_outputs_have_tangents() -> None:
    text = """
program mesh(tp=2)
  w   = param w : f64[4@tp,3]
  x   = input : f64[2,3]
  x_r = comm.enter(x, tp) : f64[2,3]
  y   = aten.linear(x_r, w) : f64[2,4@tp]
  z   = aten.sin(y) : f64[2,4@tp]
  return y=y, z=z
"""
    w, x, dy, dz = _random(4, 3).requires_grad_(), _random(2, 3), _random(2, 4), _random(2, 4)
    program = differentiate(parse(text.strip()))
    assert program.required_role.differentiable == (0, 1)
    step = simulate(program, {"w": w}, (x,), tangents=(dy, dz))
    y = functional.linear(x, w)
    (expected,) = torch.autograd.grad((y, y.sin()), w, (dy, dz))
    assert step.loss is None
    assert torch.allclose(step.grads["w"], expected, rtol=0, atol=1e-12)


def test_a_gradient_of_an_input() -> None:
    text = """
program mesh(dp=2)
  x    = input : f64[4@dp,3] grad
  y    = aten.sin(x) : f64[4@dp,3]
  s    = aten.sum(y) : f64[]{sum:dp}
  loss = comm.all_reduce(s, dp) : f64[]
  return loss=loss
"""
    x = _random(4, 3)
    assert torch.allclose(_simulated(text, x).grads["x"], x.cos(), rtol=0, atol=1e-14)


def test_memory_falls_with_the_ranks() -> None:
    parameters = {"up.weight": _random(48, 6), "down.weight": _random(6, 48)}
    peaks = []
    for dp, tp in ((1, 1), (2, 1), (2, 2), (4, 4)):
        program = differentiate(parse(MLP.format(dp=dp, tp=tp).strip()))
        step = simulate(program, parameters, (_random(12, 5, 6),))
        assert len(set(step.peak_bytes)) == 1, "all ranks do the same"
        peaks.append(step.peak_bytes[0])
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < peaks[0] / 3
