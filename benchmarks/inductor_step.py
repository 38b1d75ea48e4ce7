"""``Plan(compile="inductor")`` on one rank: a step in turns with the generated Python, torch.compile and eager torch.

    python -m benchmarks.inductor_step [--subjects gpt,llama,...] [--steps 40] [--without torch.compile]
    python -m benchmarks.inductor_step --compile 1,2,4,8
    python -m benchmarks.inductor_step --lengths 32,64,96,48,80,112,40,72

The first prints thread time, so that other programs on the machine do not matter; a step is forward, backward and
forgetting the gradients. The second prints processor seconds, those of the C++ compiler included, until the first step
of a Llama of so many blocks is done, each in a process with an empty cache, and until it is done once more with that.
The third trains a small Llama on batches of these lengths, one after the other: seconds of each first step, and then
steps in turns with the generated Python.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import autopar
from autopar.inductor.compiled_region import counted
from autopar.models import bert, gpt, llama, mlp
from benchmarks.paired import Ratio
from benchmarks.subjects import our_gpt, our_llama, tokens_with_labels

Made = tuple[nn.Module, Mapping[str, Any]]
WARM_UP = 3


def _tiny(module: Any) -> Callable[[], Made]:
    def build() -> Made:
        model = module.build()
        return model, module.example_batch(model.config, 2)

    return build


def _wide(build: Callable[[int, int], nn.Module], width: int, layers: int) -> Callable[[], Made]:
    return lambda: (build(width, layers), tokens_with_labels(512, 0, 4, 128))


SUBJECTS: dict[str, Callable[[], Made]] = {  # those that are bound by operators, and wide ones
    **{f"{module.__name__.split('.')[-1]} tiny": _tiny(module) for module in (mlp, gpt, llama, bert)},
    "llama 256": _wide(our_llama, 256, 4),
    "gpt 256": _wide(our_gpt, 256, 4),
    "llama 768": _wide(our_llama, 768, 2),
}


def contenders(model: nn.Module, without: list[str]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {"eager": copy.deepcopy(model)}
    for name, choice in (("Python", "python"), ("Inductor", "inductor")):
        plan = autopar.Plan(compile=choice, check_numerics=False)
        found[name] = autopar.parallelize(copy.deepcopy(model), autopar.Mesh(), plan)
    found["torch.compile"] = torch.compile(copy.deepcopy(model))  # type: ignore[assignment]
    return {name: module for name, module in found.items() if name not in without}


def step(module: nn.Module, batch: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> None:
    """``parameters``: those of ``module``, which an optimizer keeps in a list too; walking over modules takes time."""
    module(**batch)["loss"].backward()
    for parameter in parameters:
        parameter.grad = None


def timed(modules: Mapping[str, nn.Module], batch: Mapping[str, Tensor], steps: int) -> dict[str, list[float]]:
    """Milliseconds of each step; who goes first changes with every turn."""
    times: dict[str, list[float]] = {name: [] for name in modules}
    parameters = {name: list(module.parameters()) for name, module in modules.items()}
    for turn in range(WARM_UP + steps):
        names = list(modules) if turn % 2 else list(reversed(modules))
        for name in names:
            start = time.thread_time()
            step(modules[name], batch, parameters[name])
            if turn >= WARM_UP:
                times[name].append(1e3 * (time.thread_time() - start))
    return times


def steps_of(subjects: list[str], steps: int, without: list[str]) -> None:
    print(
        f"{'':12}{'ms: eager':>10}{'Python':>8}{'Inductor':>10}   Inductor / Python      / torch.compile        / eager"
    )
    for name in subjects:
        torch.manual_seed(0)
        model, batch = SUBJECTS[name]()
        times = timed(contenders(model, without), batch, steps)
        middle = {key: statistics.median(column) for key, column in times.items()}
        ratios = [
            str(Ratio.of(times["Inductor"], times[key])) if key in times else "-"
            for key in ("Python", "torch.compile", "eager")
        ]
        shown = "".join(f"{ratio:>22}" for ratio in ratios)
        print(f"{name:12}{middle['eager']:10.2f}{middle['Python']:8.2f}{middle['Inductor']:10.2f}{shown}", flush=True)


def steps_of_lengths(lengths: list[int], steps: int) -> None:
    torch.manual_seed(0)
    model = our_llama(128, 2)
    batches = [tokens_with_labels(512, seed, 4, length) for seed, length in enumerate(lengths)]
    modules = contenders(model, ["eager", "torch.compile"])
    with counted() as count:
        for length, batch in zip(lengths, batches):
            start = time.perf_counter()
            step(modules["Inductor"], batch, list(modules["Inductor"].parameters()))
            seconds, families = time.perf_counter() - start, len(modules["Inductor"].families)
            print(f"length {length:4}: first step {seconds:6.1f} s, programs for many lengths {families}", flush=True)
    each = [timed(modules, batch, steps) for batch in batches]
    times = {name: [time for one in each for time in one[name]] for name in modules}
    print("Inductor / Python", Ratio.of(times["Inductor"], times["Python"]), "left as Python:", len(count.left))


def _seconds() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def first_step(blocks: int) -> None:
    """Print the processor seconds of a first step, less those of the same with the generated Python."""
    model = llama.build(layers=blocks)
    batch = llama.example_batch(model.config, 2)
    spent = []
    for choice in ("python", "inductor"):
        plan = autopar.Plan(compile=choice, check_numerics=False)
        module = autopar.parallelize(copy.deepcopy(model), autopar.Mesh(), plan)
        start = _seconds()
        step(module, batch, list(module.parameters()))
        spent.append(_seconds() - start)
    print(spent[1] - spent[0])


def compiles_of(blocks: list[int]) -> None:
    found = []
    print(f"{'blocks':>6}{'empty cache':>14}{'of the first':>14}{'once more':>12}")
    for number in blocks:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "AUTOPAR_CACHE": "0"}
            command = [sys.executable, "-m", "benchmarks.inductor_step", "--first-step", str(number)]
            cold, warm = (
                float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
                for _ in range(2)
            )
        found.append(cold)
        print(f"{number:6}{cold:12.1f} s{cold / found[0]:14.2f}{warm:10.1f} s", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--without", default="")
    parser.add_argument("--compile", default="")
    parser.add_argument("--lengths", default="")
    parser.add_argument("--first-step", type=int, default=0)
    given = parser.parse_args()
    if given.first_step:
        first_step(given.first_step)
        return
    print(f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    if given.lengths:
        steps_of_lengths([int(length) for length in given.lengths.split(",")], given.steps)
    elif given.compile:
        compiles_of([int(number) for number in given.compile.split(",")])
    else:
        steps_of(given.subjects.split(","), given.steps, given.without.split(","))


if __name__ == "__main__":
    main()
