"""Several batches for one step: gradients wait on their rank, and are those of all batches in the end."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import autopar
from autopar import Mesh, Plan
from autopar.autodiff.hoist import without_gathers, without_reductions
from autopar.frontend.numerics import gradient_error
from autopar.ir.loss import loss_of
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.models import llama
from autopar.runtime.accumulate import Accumulation
from tests.against_one_process import Errors, Tiny, compare_gradients, float64, tiny_batch, worst
from tests.launch import run_ranks
from tests.selection import one_each, slow_but
from tests.traffic import sent_since

BATCHES = [llama.example_batch(llama.PRESETS["tiny"], 4, 8, seed) for seed in range(4)]
STEPS = """
program mesh(dp=2 tp=2)
  w = param w              : f32[8@dp,4]
  x = input                : f32[8@dp,4]
  g = comm.all_gather(w, dp, dim=0) : f32[8,4]
  y = aten.linear(x, g)    : f32[8@dp,8]
  return out=y

forward:
  w = param w              : f32[8@dp,4]
  x = input                : f32[8@dp,4]
  g = comm.all_gather(w, dp, dim=0) : f32[8,4]
  y = aten.linear(x, g)    : f32[8@dp,8]
  return out=y, saved x

backward:
  x = saved                : f32[8@dp,4]
  d = grad out               : f32[8@dp,8]
  t = aten.t(d)            : f32[8,4]
  m = aten.mm(t, x)        : f32[8,4]
  a = comm.all_reduce(m, tp) : f32[8,4]
  r = comm.reduce_scatter(a, dp, dim=0) : f32[8@dp,4]
  return w=r

inference:
  w = param w              : f32[8@dp,4]
  x = input                : f32[8@dp,4]
  g = comm.all_gather(w, dp, dim=0) : f32[8,4]
  y = aten.linear(x, g)    : f32[8@dp,8]
  return out=y
"""


BACKWARD_START = """backward:
  x = saved                : f32[8@dp,4]
  d = grad out               : f32[8@dp,8]
  t = aten.t(d)            : f32[8,4]
  m = aten.mm(t, x)        : f32[8,4]
"""
CHAINS = {  # sums, the first one started early -> what each batch computes, and what a step computes once
    "tp, dp": (
        "start_all_reduce(m, tp)",
        "wait(s, tp)",
        "all_reduce(a, dp)",
        ["x", "d", "t", "m", "s", "a"],
        ["a", "r"],
    ),
    "dp, tp": (
        "start_all_reduce(m, dp)",
        "wait(s, dp)",
        "all_reduce(a, tp)",
        ["x", "d", "t", "m"],
        ["m", "s", "a", "r"],
    ),
}


@pytest.fixture(scope="module")
def program() -> Program:
    return parse(STEPS)


def names(graph: torch.fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.op != "output"]


def test_gathers_are_taken_out(program: Program) -> None:
    found = without_gathers(program.required_role.forward, {"w"})
    assert found is not None
    assert names(found.graph) == ["w", "g"] and names(found.rest) == ["w", "x", "g", "y"]
    assert found.parameters == ("w",) and found.owners == (("w", "dp"),)
    assert without_gathers(found.rest, {"w"}) is None


def test_reductions_are_taken_out(program: Program) -> None:
    backward = program.required_role.backward
    assert backward is not None
    data = without_reductions(backward, ["dp"])
    assert names(data.rest) == ["x", "d", "t", "m", "a"] and names(data.graph) == ["a", "r"]
    both = without_reductions(backward, ["dp", "tp"])
    assert names(both.rest) == ["x", "d", "t", "m"] and names(both.graph) == ["m", "a", "r"]
    neither = without_reductions(backward, [])
    assert names(neither.rest) == names(backward) and names(neither.graph) == ["r"]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_wait_stays_with_its_sum_and_what_follows_the_data_axes_waits_too(chain: str) -> None:
    start, wait, then, rest, once = CHAINS[chain]
    lines = "".join(f"  {n} = comm.{call} : f32[8,4]\n" for n, call in zip("sar", (start, wait, then)))
    text = STEPS[: STEPS.index("backward:")] + BACKWARD_START + lines + "  return w=r\n"
    backward = parse(text + STEPS[STEPS.index("\ninference:") :]).required_role.backward
    assert backward is not None
    found = without_reductions(backward, ["dp"])
    assert (names(found.rest), names(found.graph)) == (rest, once)


def accumulate(plan: Plan, mesh: Mesh) -> tuple[Errors, list[float]]:
    """Two steps of four batches: errors of gradients, and bytes that backward sent on dp over those of parameters."""
    model = float64(llama.build)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, mesh, plan)
    size = sum(parameter.numel() * parameter.element_size() for parameter in reference.parameters())
    errors: Errors = {}
    sent = []
    for step in range(2):
        before = parallel.traffic
        for place, batch in enumerate(BATCHES):
            with nullcontext() if place == 3 else parallel.no_sync():
                loss_of(parallel(**batch)).backward()
            loss_of(reference(**batch)).backward()
        new = sent_since(before, parallel.traffic)
        data = [entry.bytes for entry in new if (entry.axis, entry.phase) == ("dp", "backward")]
        sent.append(sum(data) / size)
        errors |= {f"{name} {step}": error for name, error in compare_gradients(parallel, reference).items()}
        for module in (parallel, reference):
            module.zero_grad()
    return errors, sent


@pytest.mark.parametrize(("stage", "times"), slow_but([2], [(0, 2), (1, 1), (2, 4), (3, 8)]))
def test_gradients_are_reduced_once(stage: int, times: int) -> None:
    """Plain: one all-reduce is twice the bytes; sharded stages scatter, 2 and 3 for each batch, 3 gathers again too."""
    for errors, sent in run_ranks(accumulate, 2, Plan(zero=stage, check_numerics=False), Mesh(dp=2)):
        assert worst(errors) < (1e-12, "")
        assert sent == pytest.approx([0.5 * times] * 2, rel=0.03) if stage < 3 else all(s < 0.5 * times for s in sent)


def mixed_calls() -> tuple[Errors, bool]:
    """Batches of two sizes wait for each other: two programs; and nothing has arrived before the last."""
    model = float64(Tiny)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(dp=2), Plan(check_numerics=False))
    with parallel.no_sync():
        for rows in (4, 8, 4):
            loss_of(parallel(**tiny_batch(rows))).backward()
    empty = sum(entry.bytes for entry in parallel.traffic if entry.phase == "backward") < 1000  # those of batch norm
    loss_of(parallel(**tiny_batch(8, seed=1))).backward()
    batches: list[dict[str, Tensor]] = [tiny_batch(4), tiny_batch(8), tiny_batch(4), tiny_batch(8, seed=1)]
    for batch in batches:
        loss_of(reference(**batch)).backward()
    return compare_gradients(parallel, reference), empty


def test_batches_of_several_sizes() -> None:
    for errors, empty in run_ranks(mixed_calls, 2):
        assert worst(errors) < (1e-12, "") and empty


def alone() -> Errors:
    model = float64(Tiny)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(dp=1), Plan(check_numerics=False))
    with parallel.no_sync():
        loss_of(parallel(**tiny_batch())).backward()
    loss_of(reference(**tiny_batch())).backward()
    return compare_gradients(parallel, reference)


def test_with_nothing_to_reduce_nothing_waits() -> None:
    assert worst(run_ranks(alone, 1)[0]) < (1e-12, "")


def in_parts(plan: Plan, name: str) -> tuple[Errors, float, list[int]]:
    """One train step of a batch cut in parts; errors of gradients and of the loss, and reductions on dp by phase."""
    model = float64(llama.build if name == "llama" else Means)
    reference = copy.deepcopy(model)
    batch = llama.example_batch(llama.PRESETS["tiny"], 12, 8, 0) if name == "llama" else {"x": torch.randn(12, 3)}
    parallel = autopar.parallelize(model, Mesh(dp=2), plan)
    loss = parallel.train_step(**batch)
    expected = loss_of(reference(**batch))
    expected.backward()
    data = [entry.operations for entry in parallel.traffic if entry.phase == "backward"]
    return compare_gradients(parallel, reference), float((loss - expected.detach()).abs()), data


class Means(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x).square().mean()


@pytest.mark.parametrize("stage, name", one_each([0, 1, 3], ["llama", "means"], [(0, 1), (1, 1), (2, 0)]))
def test_a_step_in_parts_is_the_step_of_the_whole(name: str, stage: int) -> None:
    """Rows of the batch have unequally many labels, so the mean of the parts' means would be another number."""
    plan = Plan(microbatches=3, zero=stage, check_numerics=False)
    for errors, difference, reductions in run_ranks(in_parts, 2, plan, name):
        assert worst(errors) < (1e-12, "") and difference < 1e-12
        assert stage > 1 or len(reductions) == 1, "one kind of collective"


class Masked(torch.nn.Module):
    """Over a clamped count of what is unmasked; classes weigh ``weight``, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(3, 4), torch.nn.Linear(4, 5)
        self.register_buffer("weight", torch.arange(1.0, 6.0))

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        scores = self.down(torch.tanh(self.up(x)))
        each = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none")
        weighted = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), weight=self.weight)
        loss = (each * mask.flatten()).sum() / mask.sum().clamp(min=1) + 0.1 * weighted
        return {"loss": loss, "hits": (scores.argmax(-1) == labels).sum(), "scores": scores}


def masked_in_parts(mesh: Mesh, inputs: str, steps: int) -> tuple[Errors, list[float]]:
    """Steps of SGD; each rank passes the whole batch, or its rows of it, in parts of unequally many labels."""
    model = float64(Masked)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, mesh, Plan(microbatches=3, inputs=inputs, check_numerics=False))
    ranks = [torch.optim.SGD(module.parameters(), lr=0.02) for module in (parallel, reference)]
    generator, differences = torch.Generator().manual_seed(0), []
    place = mesh.position("dp", mesh.coordinates(torch.distributed.get_rank()))
    errors: Errors = {}
    for _ in range(steps):
        x = torch.randn(12, 2, 3, generator=generator, dtype=torch.float64)
        labels = torch.randint(5, (12, 2), generator=generator)
        mask = torch.rand(12, 2, generator=generator) > torch.linspace(0.0, 1.0, 12)[:, None]
        whole = {"x": x, "labels": labels, "mask": mask}
        given = {name: tensor.chunk(2)[place] for name, tensor in whole.items()} if inputs == "local" else whole
        loss = parallel.train_step(**given)
        wanted = loss_of(reference(**whole))
        wanted.backward()
        differences.append(float((loss - wanted.detach()).abs()))
        grads = {name: parameter.grad for name, parameter in reference.named_parameters()}
        errors = gradient_error(parallel.full_grads(), grads)
        for optimizer in ranks:
            optimizer.step()
            optimizer.zero_grad()
    return errors, differences


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("sizes", "inputs", "steps"),
    [
        ({"pp": 2, "dp": 2}, "local", 12),
        pytest.param({"pp": 2, "dp": 2}, "local", 300, marks=SLOW),
        pytest.param({"dp": 2}, "local", 300, marks=SLOW),
        pytest.param({"pp": 2, "dp": 2}, "global", 300, marks=SLOW),
    ],
    ids=["pp-dp-local", "pp-dp-local-long", "dp-local", "pp-dp"],
)
def test_counts_of_the_whole_batch(sizes: dict[str, int], inputs: str, steps: int) -> None:
    mesh = Mesh(**sizes)
    for errors, differences in run_ranks(masked_in_parts, mesh.world_size, mesh, inputs, steps):
        assert worst(errors) < (1e-11, "") and max(differences) < 1e-12


class NoMean(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x).square().mean() + self.w(x).abs().sum().sqrt()


def refused() -> str:
    model = autopar.parallelize(float64(NoMean), Mesh(dp=1), Plan(microbatches=2))
    with pytest.raises(autopar.AutoparError) as caught:
        model.train_step(x=torch.randn(4, 3))
    return str(caught.value)


def test_a_loss_that_has_no_parts() -> None:
    no_mean = run_ranks(refused, 1)[0]
    assert "aten.sqrt.default at test_accumulate.py" in no_mean and ".abs().sum().sqrt()" in no_mean
    assert 'microbatch_weights="rows"' in no_mean


def by_rows() -> tuple[Errors, float]:
    model = float64(NoMean)
    reference, batch = copy.deepcopy(model), torch.randn(10, 3, dtype=torch.float64)
    plan = Plan(microbatches=2, microbatch_weights="rows", check_numerics=False)
    parallel = autopar.parallelize(model, Mesh(dp=2), plan)
    loss = parallel.train_step(x=batch)
    expected = 0.6 * reference(batch[:6]) + 0.4 * reference(batch[6:])
    expected.backward()
    return compare_gradients(parallel, reference), float((loss - expected.detach()).abs())


def test_parts_that_count_by_their_rows() -> None:
    """As accumulated by hand: each part's own loss, which is no mean over its rows, times its share of the rows."""
    for errors, difference in run_ranks(by_rows, 2):
        assert worst(errors) < (1e-12, "") and difference < 1e-12


class Numbers:
    """Steps whose gradients are the numbers that are saved."""

    def __init__(self, defers: bool) -> None:
        self.defers, self.parameters, self.given = defers, list[Tensor](), list[float]()

    def whole(self, saved: list[float]) -> list[Tensor]:
        return [torch.tensor([number]) for number in saved]

    partial = whole

    def reduced(self, partial: list[Tensor]) -> list[Tensor]:
        return partial

    def give(self, grads: list[Tensor], past_hooks: bool, waiting: list[Any] | None) -> None:
        self.given += [float(grad) for grad in grads]

    def agree(self, what: str) -> None:
        raise AssertionError("nobody looks at what waits")


def test_what_waits_is_given_by_a_pass_that_cannot_wait() -> None:
    """As one that gives an input a gradient; ``autograd.grad`` leaves it where it is."""
    accumulation, waits, whole = Accumulation(), Numbers(True), Numbers(False)
    with accumulation.no_sync():
        assert accumulation.backward(waits, [1.0], [True]) is None
    assert accumulation.backward(waits, [3.0], [False]) == [torch.tensor([3.0])] and not waits.given
    assert accumulation.backward(whole, [4.0], [True]) == [torch.tensor([4.0])] and waits.given == [1.0]
