"""The parallel module as a drop-in: kinds of call, inputs, outputs and gradients, on gloo processes and without."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.calls import program_cache
from autopar.errors import InvariantError, LaunchError
from autopar.ir.layout import Layout
from autopar.ir.loss import loss_of
from autopar.models import gpt
from autopar.module import held_by
from tests.against_one_process import Tiny, compare_gradients, difference, float64, tiny_batch, whole, worst
from tests.launch import run_ranks

TOLERANCE = 1e-12


def look_around() -> dict[str, Any]:
    model = float64(Tiny)
    reference = copy.deepcopy(model)
    batch = tiny_batch()
    parallel = autopar.parallelize(model, Mesh(dp=2, tp=2), Plan(check_numerics=False, outputs="sharded"))
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)  # made before the first call
    parameters = list(parallel.parameters())
    results: dict[str, Any] = {}
    # training, positional or by name, is one program
    loss = parallel(batch["ids"], batch["labels"])["loss"]
    loss.backward()
    reference(**batch)["loss"].backward()
    parallel(labels=batch["labels"], ids=batch["ids"])
    reference(**batch)
    results["programs"] = len(parallel._programs)
    results["same parameters"] = all(a is b for a, b in zip(parameters, parallel.parameters()))
    results["gradient"] = worst(compare_gradients(parallel, reference))[0]
    results["placements"] = all(p.grad.placements == p.placements for p in parameters)
    optimizer.step()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    # evaluation
    parallel.eval()
    reference.eval()
    with torch.no_grad():
        found, expected = parallel(**batch), reference(**batch)
    results["eval"] = max(difference(found[key], expected[key]) for key in expected)
    results["no graph"] = not found["loss"].requires_grad
    results["kinds"] = (type(found["loss"]).__name__, type(found["logits"]).__name__)
    # other shapes and other arguments
    smaller = {key: value[:2] for key, value in batch.items()}
    results["smaller"] = difference(parallel(**smaller)["loss"], reference(**smaller)["loss"])
    logits = parallel(batch["ids"])["logits"]
    expected = reference(batch["ids"])["logits"]
    results["logits"] = difference(logits, expected)
    # a gradient that comes from outside
    parallel.zero_grad()
    reference.zero_grad()
    (logits.full_tensor() ** 2).sum().backward()
    (expected**2).sum().backward()
    results["outer gradient"] = worst(compare_gradients(parallel, reference))[0]
    results["more programs"] = len(parallel._programs)
    results["traffic"] = sum(transfer.bytes for transfer in parallel.traffic)
    with pytest.raises(AttributeError, match="is a method of Tiny"):
        _ = parallel.generate
    results["attribute"] = parallel.dropout == 0.0
    return results


def test_kinds_of_call() -> None:
    for results in run_ranks(look_around, 4):
        assert results["programs"] == 1 and results["more programs"] == 4, results
        for name in ("same parameters", "placements", "no graph", "attribute"):
            assert results[name], name
        assert results["kinds"] == ("Tensor", "DTensor")
        for name in ("gradient", "eval", "smaller", "logits", "outer gradient"):
            assert results[name] < TOLERANCE, (name, results[name])
        assert results["traffic"] > 0


def call_many_shapes() -> tuple[int, list[str]]:
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logging.getLogger("autopar").addHandler(Listener())
    program_cache.PROGRAMS_KEPT = 8  # of this process
    model = autopar.parallelize(float64(Scale), Mesh(dp=1), Plan(lengths="each"))
    for size in range(1, 12):
        assert torch.equal(model(torch.ones(size)), torch.tensor(2.0 * size))
    return len(model._programs), messages


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.factor).sum()


def test_the_cache_of_programs_is_bounded_and_says_so() -> None:
    programs, messages = run_ranks(call_many_shapes, 1)[0]
    assert programs == 8
    many = [said for said in messages if said.startswith("8 programs so far, whose sizes make no family")]
    assert len(many) == 1 and 's each; 8 are kept\nWhy: Plan(lengths="each")\nWay out: pad to few' in many[0]
    each = [said for said in messages if said not in many]
    assert len(each) == 10 and "inputs [2]" in each[0] and "\n" not in each[0]


def hand_in_parts() -> tuple[float, float]:
    model = float64(gpt.build)
    reference = copy.deepcopy(model)
    batch = gpt.example_batch(model, 4, 8)
    mesh = Mesh(dp=2, tp=2)
    parallel = autopar.parallelize(model, mesh, Plan(inputs="local", check_numerics=False))
    connection = held_by(parallel).weights.connection
    assert connection is not None
    part = connection.comm.coordinates["dp"]
    loss = parallel(**{key: value.chunk(2)[part] for key, value in batch.items()})["loss"]
    loss.backward()
    expected = reference(**batch)["loss"]
    expected.backward()
    return difference(loss, expected), worst(compare_gradients(parallel, reference))[0]


def test_local_inputs() -> None:
    for loss, gradient in run_ranks(hand_in_parts, 4):
        assert loss < TOLERANCE and gradient < TOLERANCE


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(torch.tanh(self.up(x))) * scale
        return y.sum(), x


def differentiate_inputs() -> tuple[float, float, bool, bool]:
    model = float64(TwoInputs)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(dp=2, tp=2), Plan(check_numerics=False))
    inputs = [torch.randn(4, 4, requires_grad=True), torch.randn(4, requires_grad=True)]
    others = [x.detach().clone().requires_grad_() for x in inputs]
    loss, same = parallel(*inputs)
    loss.backward()
    reference(*others)[0].backward()
    frozen = parallel.up.weight
    frozen.requires_grad_(False)
    parallel.zero_grad()
    parallel(*inputs)[0].backward()
    return (
        difference(inputs[0].grad / 2, others[0].grad),
        difference(inputs[1].grad / 2, others[1].grad),
        frozen.grad is None and parallel.up.bias.grad is not None,
        torch.equal(whole(same), whole(inputs[0])),
    )


def test_gradients_of_inputs_and_frozen_parameters() -> None:
    for first, second, frozen, same in run_ranks(differentiate_inputs, 4):
        assert first < TOLERANCE and second < TOLERANCE and frozen and same


def draw_masks() -> tuple[list[float], list[float], list[float]]:
    torch.manual_seed(0)
    model = autopar.parallelize(Tiny(dropout=0.5), Mesh(dp=2, tp=2), Plan(seed=3, check_numerics=False))
    batch = tiny_batch()
    first = [float(model(**batch)["loss"].detach()) for _ in range(3)]
    assert held_by(model).calls == 3
    held_by(model).calls = 0
    second = [float(model(**batch)["loss"].detach()) for _ in range(3)]
    model.eval()
    return first, second, [float(model(**batch)["loss"].detach()) for _ in range(2)]


def test_dropout_is_reproducible_and_new_in_each_step() -> None:
    results = run_ranks(draw_masks, 4)
    first, second, evaluated = results[0]
    assert first == second and len(set(first)) == 3 and len(set(evaluated)) == 1
    assert all(result == results[0] for result in results), "the loss is the same on all ranks"


def step_and_retain() -> tuple[float, str, str]:
    model = float64(gpt.build)
    parallel = autopar.parallelize(model, Mesh(tp=2), Plan(check_numerics=False))
    batch = gpt.example_batch(model, 2, 8)
    loss = parallel.train_step(**batch)
    once = [whole(p.grad).clone() for p in parallel.parameters()]
    parallel.zero_grad()
    again = parallel(**batch)["loss"]
    again.backward(retain_graph=True)
    again.backward()
    twice = max(difference(whole(p.grad), 2 * o) for p, o in zip(parallel.parameters(), once))
    try:
        again.backward()
    except RuntimeError as problem:
        spent = str(problem)
    again = parallel(**batch)["loss"]
    try:
        torch.autograd.grad(again, list(parallel.parameters()), create_graph=True)[0].full_tensor().sum().backward()
    except InvariantError as problem:
        second_order = str(problem)
    assert not loss.requires_grad
    return twice, spent, second_order


def test_backward_twice() -> None:
    for twice, spent, second_order in run_ranks(step_and_retain, 2):
        assert twice < TOLERANCE
        assert "second time" in spent
        assert "second derivatives" in second_order


# ---------------------------------------------------------------- without processes


def test_without_processes_there_are_programs_and_simulation() -> None:
    torch.manual_seed(0)
    model = gpt.build()
    batch = gpt.example_batch(model, 4, 8)
    parallel = autopar.parallelize(model, Mesh(dp=2, tp=2))
    with pytest.raises(InvariantError, match="example_inputs"):
        _ = parallel.program
    with pytest.raises(LaunchError, match="torchrun --nproc-per-node 4"):
        parallel(**batch)
    step = parallel.simulate(**batch)
    expected = model(**batch)["loss"]
    assert step.loss is not None and torch.allclose(step.loss, expected)
    shown = repr(step)  # what a notebook or an interpreter prints
    assert f"loss    {float(step.loss):.6g}" in shown and "[4, 8, " in shown and "forward  tp" in shown
    assert "tensor(" not in shown and len(shown.splitlines()) < 15
    assert "def backward" in parallel.program.rank(3).code
    assert [name for name, _ in parallel.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(type(parameter) is nn.Parameter for parameter in parallel.parameters()), "the model is left as it was"


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shifted: Tensor = self.linear(x) + self.shift
        return shifted.square().mean()


def simulate_connected(mesh: Mesh) -> bool:
    torch.manual_seed(0)
    model, x = Shifted(), torch.randn(2, 4)
    expected = model(x)
    parallel = autopar.parallelize(model, mesh, example_inputs=(x,))
    step = parallel.simulate(x)
    return step.loss is not None and torch.allclose(step.loss, expected)


def test_simulation_of_a_connected_module_has_its_buffers() -> None:
    assert run_ranks(simulate_connected, 2, Mesh(dp=2)) == [True, True]


def test_example_inputs_compile_at_once() -> None:
    model = gpt.build()
    parallel = autopar.parallelize(model, Mesh(tp=2), example_inputs=gpt.example_batch(model, 2, 8))
    assert parallel.program.mesh == Mesh(tp=2)


def test_what_is_a_loss() -> None:
    loss = torch.tensor(1.0)
    for output in (loss, {"loss": loss}, (loss, torch.ones(2))):
        assert loss_of(output) is loss
    with pytest.raises(InvariantError, match="pass labels"):
        loss_of(torch.ones(2))


def test_wrong_arguments_fail_as_in_python() -> None:
    parallel = autopar.parallelize(Tiny(), Mesh(tp=2))
    with pytest.raises(TypeError, match="missing a required argument: 'ids'"):
        parallel.simulate()


def parallelize_twice() -> str:
    model = Scale()
    autopar.parallelize(model, Mesh())
    try:
        autopar.parallelize(model, Mesh())
    except ValueError as problem:
        return str(problem)
    return "no error"


def test_a_model_is_parallelized_once() -> None:
    assert "and that once" in run_ranks(parallelize_twice, 1)[0]


class OurNames(nn.Module):
    """A model whose parts are called as things of ours are."""

    def __init__(self) -> None:
        super().__init__()
        self.plan, self.mesh, self.program = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self._held, self._programs, self.weights = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self._signature = nn.Parameter(torch.ones(4))
        self.register_buffer("_connection", torch.arange(4.0))
        self.register_buffer("calls", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self._held(torch.tanh(self.program(self.mesh(torch.tanh(self.plan(x))))))
        y = self._programs(self.weights(y)) * self._signature
        return (y * self._connection + self.calls).square().mean()  # type: ignore[operator]


def clash(directory: Path) -> dict[str, bool]:
    model = float64(OurNames)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(dp=2), Plan(zero=3, check_numerics=False))
    x = torch.randn(2, 4)
    names = [name for name, _ in reference.named_parameters()]
    loss, expected = parallel(x), reference(x)
    loss.backward()
    expected.backward()
    grads, state = parallel.full_grads(), parallel.full_state_dict()
    checkpoints = autopar.Checkpoints(directory)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    checkpoints.save(1, parallel, optimizer)
    optimizer.step()
    checkpoints.load(parallel, optimizer)
    return {
        "names": [name for name, _ in parallel.named_parameters()] == names,
        "loss": difference(loss, expected) < TOLERANCE,
        "gradients": all(difference(grads[name], p.grad) < TOLERANCE for name, p in reference.named_parameters()),
        "state": list(state) == list(reference.state_dict()),
        "loaded": all(torch.equal(parallel.full_state_dict()[name], state[name]) for name in state),
        "ours": held_by(parallel).calls == 1 and parallel.mesh == Mesh(dp=2) and parallel.program is not None,
    }


def test_parts_of_the_model_may_have_our_names(tmp_path: Path) -> None:
    for results in run_ranks(clash, 2, tmp_path):
        assert all(results.values()), results


def ask_for_another_layout() -> list[str]:
    parallel = autopar.parallelize(float64(Tiny), Mesh(tp=2), Plan(check_numerics=False))
    batch = tiny_batch()
    parallel(**batch)
    weights, said = held_by(parallel).weights, []
    assert weights.layouts is not None
    name = next(name for name, layout in weights.layouts.items() if layout.axes)
    weights.layouts[name] = Layout.whole(weights.layouts[name].shape)
    parallel.eval()
    for _ in range(2):  # the second time too: a program that was refused is not kept
        with pytest.raises(InvariantError, match="since the first call") as refused:
            parallel(**batch)
        said.append(str(refused.value))
    return said


def test_a_program_that_wants_parameters_otherwise_never_runs() -> None:
    for first, second in run_ranks(ask_for_another_layout, 2):
        assert first == second
