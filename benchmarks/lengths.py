"""Batches of many lengths: members of families against compiled programs, and a loop over batches of random lengths.

python -m benchmarks.lengths members [--pairs 100]
python -m benchmarks.lengths loop [--steps 500]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("AUTOPAR_CACHE", "0")

import torch
from torch import Tensor, nn

import autopar
from autopar.cache import compiled as cache_compiled
from autopar.compiler import compile_program
from autopar.families.family import Family, Point, fit
from autopar.families.forms import NoForm
from autopar.models import llama
from autopar.zoo import architecture
from benchmarks.launch import launched
from benchmarks.paired import Ratio

MODELS = ("llama", "gpt2", "bert", "mistral", "t5", "mixtral")
MESHES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("dp=2,tp=2", {}),
    ("dp=2", {"zero": 3}),
    ("tp=2", {"sequence": "megatron"}),
    ("sp=2", {}),
)
POINTS = ((4, 28), (4, 40), (8, 12), (12, 60))
LOOP = llama.Config(vocab=512, context=128, width=96, layers=2, heads=4, kv_heads=2, ff=256)
ROWS, LONGEST, REPEATED = 8, 60, 6


# ---------------------------------------------------------------- members


def batch_of(model: nn.Module, name: str, rows: int, length: int) -> dict[str, Tensor]:
    return architecture(name).example_batch(model.config, rows, length)


def family_of(model: nn.Module, name: str, mesh: str, choices: Mapping[str, Any]) -> Family:
    plan, first, points = autopar.Plan(check_numerics=False, **choices), None, []
    for rows, length in POINTS:
        batch = batch_of(model, name, rows, length)
        program = compile_program(model, autopar.Mesh.parse(mesh), plan, (), batch, like=first)
        first = first or program
        points.append(Point({"b": rows, "s": length}, program))
    return fit(points)


def members(pairs: int) -> Iterator[str]:
    """A line for each model and mesh: how many of its share of ``pairs`` have the text that the compiler gives."""
    choose = random.Random(0)
    each = -(-pairs // (len(MODELS) * len(MESHES)))
    equal = total = 0
    seconds: list[float] = []
    for name in MODELS:
        torch.manual_seed(0)
        model = architecture(name).build(architecture(name).config_of({}))
        for mesh, choices in MESHES:
            try:
                family = family_of(model, name, mesh, choices)
            except (NoForm, autopar.AutoparError) as problem:
                yield f"{name:<8} {mesh:<10} {dict(choices)}  no family: {str(problem).splitlines()[0]}"
                continue
            right = 0
            for _ in range(each):
                rows, length = choose.choice((4, 8, 12)), choose.choice(range(12, 61, 4))
                start = time.process_time()
                text = str(family.member({"b": rows, "s": length}))
                seconds.append(time.process_time() - start)
                plan = autopar.Plan(check_numerics=False, **choices)
                batch = batch_of(model, name, rows, length)
                right += text == str(
                    compile_program(model, autopar.Mesh.parse(mesh), plan, (), batch, like=family.template)
                )
            equal, total = equal + right, total + each
            yield f"{name:<8} {mesh:<10} {dict(choices)}  {right} of {each} equal; {family}"
    made = sorted(seconds)
    middle = 1e3 * made[len(made) // 2]
    yield f"{equal} of {total} texts equal; a member with its text: median {middle:.0f} ms of processor time"


# ---------------------------------------------------------------- loop


def random_batches(steps: int) -> Iterator[dict[str, Tensor]]:
    choose = random.Random(0)
    for step in range(steps):
        yield llama.example_batch(LOOP, ROWS, choose.randint(4, LONGEST), seed=step)


def loop_model() -> nn.Module:
    torch.manual_seed(0)
    return llama.Llama(LOOP).double()


def loss_of_step(module: nn.Module, batch: Mapping[str, Tensor]) -> float:
    loss: Tensor = module(**batch)["loss"]
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def loop(steps: int) -> dict[str, Any]:
    """On this rank of dp=2: compiles, the largest error of a loss, and steps against a program for each length."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    compiles, original = 0, cache_compiled.compile_program

    def counted(*args: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return original(*args)

    cache_compiled.compile_program = counted  # type: ignore[attr-defined]
    plan = autopar.Plan(check_numerics=False)
    ours, alone = autopar.parallelize(loop_model(), autopar.Mesh(dp=2), plan), loop_model()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.02) for module in (ours, alone)]
    worst, lengths, fresh = 0.0, set[int](), list[float]()
    for batch in random_batches(steps):
        is_new = batch["input_ids"].shape[1] not in lengths
        lengths.add(batch["input_ids"].shape[1])
        start = time.perf_counter()
        losses = [loss_of_step(ours, batch)]
        fresh += [time.perf_counter() - start] if is_new else []
        losses.append(loss_of_step(alone, batch))
        worst = max(worst, abs(losses[0] - losses[1]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    family, compiled = "; ".join(map(str, ours.families)), compiles
    each = autopar.parallelize(loop_model(), autopar.Mesh(dp=2), autopar.Plan(check_numerics=False, lengths="each"))
    fixed = [llama.example_batch(LOOP, ROWS, 10 * (n + 1), seed=n) for n in range(REPEATED)]
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(40 + REPEATED):
        for place, module in enumerate((ours, each)):
            torch.distributed.barrier()
            start = time.perf_counter()
            loss_of_step(module, fixed[turn % REPEATED])
            torch.distributed.barrier()
            times[place].append(time.perf_counter() - start)
    ratio = Ratio.of(times[0][REPEATED:], times[1][REPEATED:])
    return {
        "steps": steps,
        "lengths": len(lengths),
        "compiles": compiled,
        "family": family,
        "worst error of a loss": worst,
        "first step of a length, ms": round(1e3 * statistics.median(fresh), 1),
        "step against a program for each length": str(ratio),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("members", "loop"), nargs="?", default="loop")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--worker", type=Path)
    given = parser.parse_args()
    if given.worker is not None:
        found = loop(given.steps)
        if torch.distributed.get_rank() == 0:
            given.worker.write_text(json.dumps(found))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    elif given.what == "members":
        for line in members(given.pairs):
            print(line, flush=True)
    else:
        json.dump(launched("benchmarks.lengths", 2, ["--steps", given.steps]), sys.stdout, indent=2)


if __name__ == "__main__":
    main()
