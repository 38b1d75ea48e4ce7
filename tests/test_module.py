"""The parallel module on real gloo processes against the unmodified model in one process, in float64."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar import Mesh, ParallelModule, Plan
from autopar.errors import InvariantError, LaunchError
from autopar.module import loss_of
from models import gpt, llama
from tests.launch import run_ranks

TOLERANCE = 1e-12
Errors = dict[str, float]


class Tiny(nn.Module):
    """Fused thirds, a tied weight, a buffer that changes, an output beside the loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.fused = nn.Linear(8, 24)
        self.norm = nn.BatchNorm1d(8)
        self.down = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.tokens.weight
        self.dropout = dropout

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.tokens(ids)
        a, b, c = self.fused(x).chunk(3, dim=-1)
        x = x + self.down(F.dropout(a * torch.tanh(b) + c, self.dropout, self.training))
        x = self.norm(x.flatten(0, 1)).view(x.shape)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def tiny_batch(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (rows, 5), generator=generator)
    labels = ids.roll(-1, 1)
    labels[0, :3] = -100
    return {"ids": ids, "labels": labels}


def float64(build: Callable[[], nn.Module]) -> nn.Module:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    return build()


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def difference(found: Any, expected: Any) -> float:
    found, expected = whole(found), whole(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def compare_gradients(model: ParallelModule, reference: nn.Module) -> Errors:
    expected = dict(reference.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in expected.values() if p.grad is not None)
    found = dict(model.named_parameters())
    assert list(found) == list(expected)
    return {
        f"grad {name}": float((whole(p.grad) - expected[name].grad).abs().max()) / largest for name, p in found.items()
    }


def worst(errors: Errors) -> tuple[float, str]:
    return max((error, name) for name, error in errors.items())


# ---------------------------------------------------------------- training


def train(build: Callable[[], nn.Module], batches: list[dict[str, Tensor]], mesh: Mesh, plan: Plan) -> Errors:
    """Three steps of AdamW with clipping, the first with two accumulated batches."""
    model = float64(build)
    reference = copy.deepcopy(model)
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
    parallel = autopar.parallelize(model, mesh, plan)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (parallel, reference)]
    errors: Errors = {}
    for step, batch in enumerate(batches[1:]):
        for part in [batches[0], batch] if step == 0 else [batch]:
            losses = [loss_of(m(**part)) for m in (parallel, reference)]
            for loss in losses:
                loss.backward()
            errors[f"loss {step}"] = difference(*losses)
        errors |= {f"{name} {step}": e for name, e in compare_gradients(parallel, reference).items()}
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5) for m in (parallel, reference)]
        errors[f"norm {step}"] = difference(*norms)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, found), expected in zip(parallel.full_state_dict().items(), reference.state_dict().values()):
        errors[name] = difference(found, expected)
    return errors


TRAINED = {
    "tiny": (Tiny, [tiny_batch(seed=seed) for seed in range(4)]),
    "gpt": (gpt.build, [gpt.example_batch(gpt.PRESETS["tiny"], 4, 8, seed) for seed in range(4)]),
    "llama": (llama.build, [llama.example_batch(llama.PRESETS["tiny"], 4, 8, seed) for seed in range(4)]),
}


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "tp=3"])
@pytest.mark.parametrize("model", TRAINED)
def test_training_equals_one_process(model: str, mesh: str) -> None:
    parsed = Mesh.parse(mesh)
    for errors in run_ranks(train, parsed.world_size, *TRAINED[model], parsed, Plan(check_numerics=False)):
        # the second moments of AdamW magnify rounding where a gradient is almost zero
        assert worst(errors) < (1e-9, ""), sorted(errors.items(), key=lambda item: -item[1])[:5]
        assert worst({k: e for k, e in errors.items() if k.endswith(" 0")}) < (TOLERANCE, "")


def train_alone() -> Errors:
    """A mesh of one rank needs no torchrun."""
    import os

    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    return train(*TRAINED["tiny"], Mesh(), Plan())


def test_a_mesh_of_one_rank_needs_no_launcher() -> None:
    assert worst(run_ranks(train_alone, 1)[0]) < (1e-9, "")


# ---------------------------------------------------------------- checkpoints


def keep_state() -> dict[str, Any]:
    from torch.distributed.tensor import DTensor

    model = float64(gpt.build)
    reference = copy.deepcopy(model)
    batch = gpt.example_batch(model, 4, 8)
    parallel = autopar.parallelize(model, Mesh(dp=2, tp=2), example_inputs=batch)
    saved = parallel.state_dict()
    full = parallel.full_state_dict()
    results: dict[str, Any] = {
        "names": list(saved) == list(reference.state_dict()) == list(full),
        "order": all(torch.equal(whole(saved[name]), value) for name, value in reference.state_dict().items()),
        "full": all(torch.equal(full[name], value) for name, value in reference.state_dict().items()),
        "sharded": any(value.to_local().numel() < value.numel() for value in saved.values()),
        "tied": parallel.head.weight is parallel.tokens.weight,
        "kinds": {type(parameter) is DTensor for parameter in parallel.parameters()},
        "children": torch.equal(whole(parallel.blocks[0].state_dict()["attn.qkv.weight"]), full["blocks.0.attn.qkv.weight"]),
    }
    before = [whole(parameter) for parameter in parallel.parameters()]
    other = {name: value + 1 for name, value in saved.items()}
    with torch.no_grad():
        for parameter in parallel.parameters():
            parameter.zero_()
    parallel.load_state_dict(saved if saved["norm.bias"].to_local().any() else other)
    results["loads DTensors"] = all(torch.equal(whole(p), b + 1) for p, b in zip(parallel.parameters(), before))
    parallel.load_state_dict(reference.state_dict())
    results["loads whole tensors"] = all(torch.equal(whole(p), b) for p, b in zip(parallel.parameters(), before))
    results["keeps its objects"] = parallel(**batch)["loss"].item() == pytest.approx(reference(**batch)["loss"].item())
    try:
        parallel.load_state_dict({})
    except RuntimeError as problem:
        results["strict"] = "Missing key" in str(problem)
    return results


def test_state_dicts_have_the_models_own_order() -> None:
    for results in run_ranks(keep_state, 4):
        assert results.pop("kinds") == {True}
        assert all(results.values()), results


# ---------------------------------------------------------------- other kinds of call


def look_around() -> dict[str, Any]:
    model = float64(Tiny)
    reference = copy.deepcopy(model)
    batch = tiny_batch()
    parallel = autopar.parallelize(model, Mesh(dp=2, tp=2), Plan(check_numerics=False))
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
    parallel.eval(), reference.eval()
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
    parallel.zero_grad(), reference.zero_grad()
    (logits.full_tensor() ** 2).sum().backward()
    (expected**2).sum().backward()
    results["outer gradient"] = worst(compare_gradients(parallel, reference))[0]
    results["more programs"] = len(parallel._programs)
    results["traffic"] = sum(transfer.bytes for transfer in parallel.traffic)
    with pytest.raises(AttributeError, match="is a method of Tiny"):
        _ = TinyWithMethod
        parallel.__dict__["_model"].__class__.generate = lambda self: None
        _ = parallel.generate
    results["attribute"] = parallel.dropout == 0.0
    return results


TinyWithMethod = Tiny


def test_kinds_of_call() -> None:
    for results in run_ranks(look_around, 4):
        assert results["programs"] == 1 and results["more programs"] == 4, results
        for name in ("same parameters", "placements", "no graph", "attribute"):
            assert results[name], name
        assert results["kinds"] == ("Tensor", "DTensor")
        for name in ("gradient", "eval", "smaller", "logits", "outer gradient"):
            assert results[name] < TOLERANCE, (name, results[name])
        assert results["traffic"] > 0


def call_many_shapes() -> tuple[int, int, list[str]]:
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logging.getLogger("autopar").addHandler(Listener())
    model = autopar.parallelize(float64(nn.Identity).append if False else float64(Scale), Mesh(dp=1))
    for size in range(1, 12):
        assert torch.equal(model(torch.ones(size)), torch.tensor(2.0 * size))
    return len(model._programs), len(model._executables), messages


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.factor).sum()


def test_the_cache_of_programs_is_bounded_and_says_so() -> None:
    programs, executables, messages = run_ranks(call_many_shapes, 1)[0]
    assert programs == executables == 8
    assert len(messages) == 10 and "inputs [2]" in messages[0] and "\n" not in messages[0]


def hand_in_parts() -> tuple[float, float, str]:
    model = float64(gpt.build)
    reference = copy.deepcopy(model)
    batch = gpt.example_batch(model, 4, 8)
    mesh = Mesh(dp=2, tp=2)
    parallel = autopar.parallelize(model, mesh, Plan(inputs="local", check_numerics=False))
    part = parallel._connection.comm.coordinates["dp"]
    loss = parallel(**{key: value.chunk(2)[part] for key, value in batch.items()})["loss"]
    loss.backward()
    expected = reference(**batch)["loss"]
    expected.backward()
    return difference(loss, expected), worst(compare_gradients(parallel, reference))[0], str(list(parallel.program.plan.inputs))


def test_local_inputs() -> None:
    for loss, gradient, _ in run_ranks(hand_in_parts, 4):
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
    again = copy.deepcopy(model._steps)
    model._steps = 0
    second = [float(model(**batch)["loss"].detach()) for _ in range(3)]
    assert again == 3
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
    except RuntimeError as problem:
        second_order = str(problem)
    assert not loss.requires_grad
    return twice, spent, second_order


def test_backward_twice() -> None:
    for twice, spent, second_order in run_ranks(step_and_retain, 2):
        assert twice < TOLERANCE
        assert "second time" in spent
        assert "once_differentiable" in second_order


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
    assert "def backward" in parallel.program.rank(3).code
    assert [name for name, _ in parallel.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(type(parameter) is nn.Parameter for parameter in parallel.parameters()), "the model is left as it was"


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
