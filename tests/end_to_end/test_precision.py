"""Mixed precision: what a plan says of it, and training in real processes with float32 parameters of another dtype."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan, Precision
from autopar.commands.plan_options import read_plan
from autopar.dtensors.dtensor import local_of
from autopar.models import gpt, llama
from tests.against_one_process import difference
from tests.launch import run_ranks
from tests.selection import slow_but

FAMILIES = {"gpt": gpt, "llama": llama}
CLIP = 0.5
WITHIN = {"gpt": 1, "llama": 0}  # sums over dp in the midst of backward: what embedding positions gives is for all rows


def test_dtypes_by_name_and_by_type() -> None:
    precision = Precision(torch.bfloat16, "fp32", torch.half)
    assert precision == Precision("bf16", torch.float32, "float16") and hash(precision)
    assert precision.to_json() == {"param": "bfloat16", "reduce": "float32", "output": "float16"}
    assert precision.param_dtype is torch.bfloat16 and Precision().param_dtype is None
    plan = Plan(precision=precision)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan == pickle.loads(pickle.dumps(plan))
    assert read_plan(["precision.param=bf16", "precision.reduce=none"]) == Plan(precision=Precision("bfloat16"))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"precision.param": "int8"}, "param='int8'"),
        (
            {"precision.params": "bf16"},
            "did you mean .param..\nWay out: one of param, reduce, output",
        ),
        ({"precision": "int8"}, "param='int8'"),
    ],
)
def test_what_is_no_precision(choices: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_plan([f"{key}={value}" for key, value in choices.items()])


def test_a_dtype_alone_is_that_of_computing() -> None:
    assert read_plan(["precision=bf16"]) == Plan(precision=Precision("bf16")) == Plan.from_json({"precision": "bf16"})


@pytest.mark.parametrize("written", ["bf16", "bfloat16", torch.bfloat16])
def test_a_plan_takes_a_dtype_for_what_is_computed_in_it(written: Any) -> None:
    plan = Plan(precision=written)
    assert plan.precision == Precision(param="bf16") and plan == Plan.from_json({"precision": "bf16"})


def test_a_plan_takes_no_other_word_for_a_precision() -> None:
    with pytest.raises(ValueError, match=r"(?s)Plan\(precision='bf61'\).*autopar.Precision\(param=\"bf16\"\)"):
        Plan(precision="bf61")  # type: ignore[arg-type]


class Plain:
    """The usual loop on one device: float32 masters, of which a copy in another dtype computes loss and gradients."""

    def __init__(self, masters: nn.Module, dtype: torch.dtype) -> None:
        self.masters, self.low = masters, copy.deepcopy(masters).to(dtype)

    def __call__(self, batches: list[dict[str, Tensor]]) -> list[Tensor]:
        """The losses; gradients are added up in the dtype of computing, then put to the masters."""
        pairs = list(zip(self.masters.parameters(), self.low.parameters()))
        with torch.no_grad():
            for master, low in pairs:
                low.copy_(master)
                low.grad = None
        losses = [self.low(**batch)["loss"] for batch in batches]
        for loss in losses:
            loss.backward()
        for master, low in pairs:
            master.grad = None if low.grad is None else low.grad.to(master.dtype)
        return [loss.detach() for loss in losses]


def train(family: str, mesh: Mesh, plan: Plan, optimizer: str) -> dict[str, Any]:
    """Three steps, the second of two batches, of the parallel model and of the plain loop beside it."""
    torch.manual_seed(0)
    model = FAMILIES[family].build()
    plain = Plain(copy.deepcopy(model), plan.precision.param_dtype or torch.float32)
    parallel = autopar.parallelize(model, mesh, plan)
    batches = [FAMILIES[family].example_batch(FAMILIES[family].PRESETS["tiny"], 4, 8, seed) for seed in range(4)]
    kinds = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1), "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3)}
    ours, theirs = (kinds[optimizer](module.parameters()) for module in (parallel, plain.masters))
    losses, waiting = [], 0
    for step in ([batches[0]], batches[1:3], [batches[3]]):
        expected = plain(step)
        with parallel.no_sync():
            for batch in step[:-1]:
                before = parallel.traffic
                found = [parallel.train_step(**batch)]
                waiting = sum(t.operations for t in parallel.traffic if (t.phase, t.axis) == ("backward", "dp"))
                waiting -= sum(t.operations for t in before if (t.phase, t.axis) == ("backward", "dp"))
        found = [*(found if step[:-1] else []), parallel.train_step(**step[-1])]
        losses += [difference(a, b) for a, b in zip(found, expected)]
        norms = [parallel.clip_grad_norm_(CLIP), torch.nn.utils.clip_grad_norm_(plain.masters.parameters(), CLIP)]
        for one in (ours, theirs):
            one.step()
            one.zero_grad()
    parameters = dict(plain.masters.named_parameters())
    state = parallel.full_state_dict()
    moments = [
        local_of(t) for entry in ours.state.values() for t in entry.values() if isinstance(t, Tensor) and t.dim()
    ]
    return {
        "losses": losses,
        "norm": difference(*norms),
        "parameters": max(difference(state[name], tensor) for name, tensor in parameters.items()),
        "dtypes": {tensor.dtype for tensor in (*state.values(), *moments) if tensor.is_floating_point()},
        "operations while waiting": waiting,
    }


EXACT = [
    ("gpt", "dp=2", 0, None),
    ("gpt", "dp=2", 1, "float64"),
    ("llama", "dp=2,tp=2", 2, None),
    ("llama", "dp=2,tp=2", 3, "float64"),
]


@pytest.mark.parametrize(("family", "mesh", "stage", "reduce"), slow_but([1], EXACT))
def test_training_float32_parameters_in_float64(family: str, mesh: str, stage: int, reduce: str | None) -> None:
    """Exact up to the rounding of gradients and parameters to float32."""
    parsed, plan = Mesh.parse(mesh), Plan(zero=stage, precision=Precision("float64", reduce))
    for found in run_ranks(train, parsed.world_size, family, parsed, plan, "sgd"):
        assert max(found["losses"]) < 1e-7, found
        assert found["norm"] < 1e-6 and found["parameters"] < 3e-7, found
        assert found["dtypes"] == {torch.float32}
        assert found["operations while waiting"] <= WITHIN[family] or stage > 1


ROUNDED = [("gpt", "dp=2", 0, "float32"), ("llama", "dp=2", 1, None), ("llama", "dp=2,tp=2", 3, "float32")]


@pytest.mark.parametrize(("family", "mesh", "stage", "reduce"), slow_but([2], ROUNDED))
def test_training_in_bfloat16(family: str, mesh: str, stage: int, reduce: str | None) -> None:
    """The losses to two units of bfloat16; parameters to what AdamW can move in three steps where signs are open."""
    parsed, plan = Mesh.parse(mesh), Plan(zero=stage, precision=Precision("bfloat16", reduce))
    for found in run_ranks(train, parsed.world_size, family, parsed, plan, "adamw"):
        assert max(found["losses"]) <= 2 * 2.0**-7, found
        assert found["norm"] < 2.0**-6, found
        assert found["dtypes"] == {torch.float32}
        assert found["operations while waiting"] <= WITHIN[family] or stage > 1


def whole_parameters_in_bfloat16(stage: int) -> list[Any]:
    """What a rank holds of a weight between two steps: the dtypes and whether its part lies within the whole one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    reference = copy.deepcopy(model)
    plan = Plan(zero=stage, bucket_mb=0, batch_dims={"input": 0}, precision=Precision("bf16", output="f32"))
    parallel = autopar.parallelize(model, Mesh(dp=2), plan)
    x = torch.randn(4, 8)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        parallel(x).square().sum().backward()
        optimizer.step()
    with torch.no_grad():  # another value through the DTensor is seen by the next call
        for mine, other in zip(parallel.parameters(), reference.parameters()):
            mine.zero_()
            other.zero_()
    zeros = parallel(x).abs().max()
    weights = [local_of(parameter) for parameter in parallel.parameters()]
    alone = [weight.untyped_storage().nbytes() == weight.numel() * 4 for weight in weights]
    return [float(zeros), alone, {weight.dtype for weight in weights}]


@pytest.mark.parametrize("stage", [1, 3])
def test_float32_parts_lie_beside_whole_parameters_in_bfloat16(stage: int) -> None:
    assert run_ranks(whole_parameters_in_bfloat16, 2, stage) == [[0.0, [True] * 4, {torch.float32}]] * 2


def in_autocast() -> list[Any]:
    """Errors of a float32 module in autocast, against the unmodified model in autocast; then with both."""
    torch.manual_seed(0)
    model = llama.build()
    batch = llama.example_batch(llama.PRESETS["tiny"], 4, 8, 0)
    reference = copy.deepcopy(model)
    found = []
    for precision in (Precision(), Precision("bf16", "f32")):
        parallel = autopar.parallelize(copy.deepcopy(model), Mesh(dp=2), Plan(precision=precision))
        with torch.autocast("cpu", torch.bfloat16):
            losses = [m(**batch)["loss"] for m in (parallel, reference)]
        for loss in losses:
            loss.backward()
        grads, wanted = parallel.full_grads(), dict(reference.named_parameters())
        found += [difference(*losses), max(difference(grads[name], p.grad) for name, p in wanted.items())]
        reference.zero_grad()
    return found


def test_autocast() -> None:
    for loss, grads, both_loss, both_grads in run_ranks(in_autocast, 2):
        assert loss < 1e-3 and grads < 2.0**-5
        assert both_loss < 2.0**-6 and both_grads < 2.0**-3


class Tied(nn.Module):
    """An embedding that is also the head, as in nanoGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.embedding(tokens)), tokens)


def test_autocast_of_a_tied_embedding() -> None:
    """It is on while the program is made, too: derivatives are not to be cast again."""
    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(4)
    reference = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        step = autopar.parallelize(model, Mesh(dp=2, tp=2), example_inputs=(tokens,)).simulate(tokens)
        loss = reference(tokens)
    loss.backward()
    assert step.loss is not None and abs(float(step.loss) - float(loss)) < 1e-3
    grad = reference.embedding.weight.grad
    assert grad is not None and difference(step.grads["embedding.weight"], grad) < 2e-2


def scaled() -> list[tuple[list[float], float, bool]]:
    """Three steps in float16 with torch's loss scaling, first with a scale that gradients have no room for, then with
    another: losses, the scale in the end, whether parameters have moved."""
    torch.manual_seed(0)
    parallel = autopar.parallelize(llama.build(), Mesh(dp=2), Plan(zero=3, precision=Precision("fp16", "fp32")))
    batch = llama.example_batch(llama.PRESETS["tiny"], 4, 8, 0)
    found = []
    for power in (24, 12):
        before, losses = parallel.full_state_dict(), []
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
        for _ in range(3):
            loss = parallel(**batch)["loss"]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            parallel.clip_grad_norm_(1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        moved = [not torch.equal(before[name], tensor) for name, tensor in parallel.full_state_dict().items()]
        found.append((losses, scaler.get_scale(), any(moved)))
    return found


def test_loss_scaling_in_float16() -> None:
    """GradScaler works on our gradients: all ranks leave out the steps of those that are no numbers."""
    first, second = run_ranks(scaled, 2)
    assert first == second
    losses, scale, moved = first[0]
    assert len(set(losses)) == 1 and scale == 2.0**21 and not moved
    losses, scale, moved = first[1]
    assert losses[2] < losses[0] - 0.3 and scale == 2.0**12 and moved
