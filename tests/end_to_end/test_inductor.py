"""Programs whose regions Inductor compiled: all ranks in one process against the unmodified model, in float64.

A simulated step runs the graphs and the compiled regions, and compares them. The numbers that it gives, which are
compared with the model, are those of the regions (:func:`autopar.simulate.simulate`).
"""

from __future__ import annotations

import copy
import importlib
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.check import check
from autopar.dtensors.dtensor import local_of
from autopar.inductor import compiled_region
from autopar.mesh import Mesh
from autopar.models import gpt, llama
from autopar.plan import Plan
from tests.launch import run_ranks
from tests.selection import slow_but

MODELS = ("llama", "gpt", "bert", "t5", "vit", "moe")
MESHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dp=2", {"zero": 3}),
    ("tp=2", {"recompute": "selective"}),
    ("pp=2", {"microbatches": 2}),
    ("dp=2,tp=2", {"zero": 1}),
)
ALSO: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama", "sp=2", {"attention": "ring"}),
    ("llama", "tp=2", {"sequence": "megatron"}),
    ("llama", "dp=2", {"zero": 2, "microbatches": 2}),
    ("llama", "sp=2", {"attention": "ulysses"}),
    ("llama", "pp=2", {"schedule": "1f1b", "microbatches": 4}),
    ("llama", "pp=2", {"schedule": "interleaved", "microbatches": 4}),
    ("llama", "dp=2", {"recompute": "full"}),
    ("moe", "ep=2", {}),
    ("moe", "dp=2,ep=2", {"zero": 3}),
    ("mlp", "dp=1", {}),
    ("cnn", "dp=2", {}),
)
ROWS = [*((name, mesh, plan) for name in MODELS for mesh, plan in MESHES), *ALSO]


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    module = importlib.import_module(f"autopar.models.{name}")
    torch.manual_seed(0)
    model = module.build()
    return model, module.example_batch(model.config, 4)


@pytest.mark.parametrize("name, mesh, plan", slow_but([], ROWS))
def test_compiled_ranks_do_what_the_model_does(name: str, mesh: str, plan: dict[str, Any]) -> None:
    model, batch = built(name)
    with compiled_region.counted() as count:
        report = check(model, batch, Mesh.parse(mesh), Plan(compile="inductor", **plan))
    assert report.passed, report.worst
    assert count.compiled and not count.left, count


def train(cache: str, steps: int) -> tuple[list[float], Counter[str]]:
    """On a rank: the losses of some steps, and how often regions were found in the cache on disk, or not."""
    from torch._dynamo.utils import counters

    config = llama.Config(vocab=32, context=8, width=16, layers=3, heads=2, kv_heads=2, ff=32)
    torch.manual_seed(0)
    model: nn.Module = llama.Llama(config).double()
    if "RANK" in os.environ:  # a process of its own
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        model = autopar.parallelize(model, Mesh(dp=2), Plan(compile="inductor", zero=2, check_numerics=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        loss = model(**llama.example_batch(config, 4, 8, seed=step % 5))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, Counter({name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")})


@pytest.mark.slow
def test_launched_ranks_train_as_one_device_and_compile_each_region_once(tmp_path: Path) -> None:
    wanted, _ = train("", 200)
    ranks = run_ranks(train, 2, str(tmp_path), 200, timeout=600.0)
    for losses, _ in ranks:
        assert max(abs(one - other) for one, other in zip(losses, wanted, strict=True)) <= 1e-10
    found = ranks[0][1] + ranks[1][1]
    assert found["miss"] == found["hit"] > 0  # what one rank has compiled, the other finds
    again = run_ranks(train, 2, str(tmp_path), 2, timeout=600.0)
    assert sum((count for _, count in again), Counter())["miss"] == 0


STEPS, SETTLED = 300, 100
MOST_GROWTH = 4 << 20  # bytes in 200 steps; one activation that is kept in each step is more


def train_beside_python(mesh: str, plan: dict[str, Any], folder: str) -> tuple[list[float], list[int], list[str]]:
    """On a rank: how far loss and gradients of each step are from those of the generated Python, with the same weights.

    Also bytes in memory after each, and what Inductor left to Python.
    """
    config = llama.Config(vocab=32, context=12, width=32, layers=3, heads=4, kv_heads=2, ff=64)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    modules = []
    for choice in ("inductor", "python"):
        torch.manual_seed(0)
        chosen = Plan(compile=choice, check_numerics=False, **plan)
        modules.append(autopar.parallelize(llama.Llama(config).double(), Mesh.parse(mesh), chosen))
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
    errors, held, losses = [], [], []
    with compiled_region.counted() as count:
        for step in range(STEPS):
            batch = llama.example_batch(config, 4, 12, seed=step % 5)
            batch["labels"][step % 4, 3:] = -100
            losses = [float(module.train_step(**batch).detach()) for module in modules]
            pairs = list(zip(*(module.parameters() for module in modules), strict=True))
            grads = [(local_of(one.grad), local_of(other.grad)) for one, other in pairs]
            errors.append(max([abs(losses[0] - losses[1]), *(float((a - b).abs().max()) for a, b in grads)]))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                for one, other in pairs:
                    one.copy_(other)
            held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert count.compiled and losses[0] < 0.9 * math.log(config.vocab), "it learns"
    return errors, held, count.left


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, plan", [("dp=2", {}), ("tp=2", {}), ("dp=2", {"zero": 3}), ("pp=2", {"microbatches": 2})]
)
def test_hundreds_of_steps_are_those_of_the_generated_python(mesh: str, plan: dict[str, Any], tmp_path: Path) -> None:
    for errors, held, left in run_ranks(train_beside_python, 2, mesh, plan, str(tmp_path), timeout=560.0):
        assert max(errors) <= 1e-12 and not left, (max(errors), left)
        assert held[-1] - held[SETTLED] <= MOST_GROWTH, held[::20]
        print(f"{mesh} {plan}: {max(errors):.1e}, {(held[-1] - held[SETTLED]) >> 10} KiB")


@pytest.mark.slow
def test_dropout_is_that_of_the_generated_python() -> None:
    torch.manual_seed(0)
    model = gpt.build(dropout=0.2).double()
    batch = gpt.example_batch(model.config, 4)
    steps = [
        autopar.parallelize(copy.deepcopy(model), Mesh(dp=2), Plan(compile=choice)).simulate(**batch)
        for choice in ("python", "inductor")
    ]
    assert steps[0].loss is not None and steps[1].loss is not None
    assert abs(steps[0].loss - steps[1].loss) <= 1e-13
    for name, grad in steps[0].grads.items():
        assert (grad - steps[1].grads[name]).abs().max() <= 1e-13, name


@pytest.mark.slow
@pytest.mark.parametrize("mesh, plan", [("dp=1", {}), ("dp=2,tp=2", {"zero": 1})])
def test_one_compile_serves_batches_of_many_lengths(mesh: str, plan: dict[str, Any]) -> None:
    """Of a family each region is compiled once, and the numbers are the model's at lengths that were not compiled."""
    if mesh == "dp=1":
        train_lengths(mesh, plan)
    else:
        run_ranks(train_lengths, 4, mesh, plan, timeout=900.0)


LENGTHS = (
    16,
    24,
    19,
    37,
    9,
    28,
    90,
    40,
)  # with the third a family holds for all; the greatest is beyond the first four


def train_lengths(mesh: str, plan: dict[str, Any]) -> None:
    from torch._dynamo.utils import counters

    from autopar.inductor.sized_region import _REGIONS

    torch.manual_seed(0)
    model = llama.build(vocab=32, width=16, heads=2, kv_heads=2, ff=32, layers=2, context=128).double()
    whole = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh.parse(mesh), Plan(compile="inductor", check_numerics=False, **plan))
    made = []
    with compiled_region.counted() as count:
        for length in LENGTHS:
            batch = llama.example_batch(whole.config, 4, length)
            losses = [module(**batch)["loss"] for module in (parallel, whole)]
            for loss in losses:
                loss.backward()
            assert abs(losses[0] - losses[1]) <= 1e-13
            made.append(sum(counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")))
        assert not count.left and count.compiled
    assert made[0] < made[1] == made[-1], f"a length outside of a family takes its regions too: {made}"
    assert len(parallel.families) == 1
    for name, grad in parallel.full_grads().items():
        wanted = whole.get_parameter(name).grad
        assert wanted is not None and (grad - wanted).abs().max() <= 1e-13, name
    assert {len(region._all._made) for region in _REGIONS.values()} <= {0, 1}
