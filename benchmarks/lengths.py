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
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("AUTOPAR_CACHE", "0")

import torch
from torch import Tensor, nn

import autopar
from autopar.cache import compiled as cache_compiled
from autopar.calls.call_sizes import general
from autopar.calls.calls import Call, Signature
from autopar.calls.size_families import SizeFamilies
from autopar.compiler import compile_program
from autopar.frontend.fingerprint import call_facts
from autopar.ir.guards import Guards
from autopar.ir.program import AnyProgram
from autopar.models import llama
from autopar.observation.observation import guards_of_traces
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
MORE: Mapping[str, tuple[tuple[str, Mapping[str, Any]], ...]] = {"mixtral": (("ep=2", {}), ("dp=2,ep=2", {}))}
FIRST = ((4, 28), (4, 40))  # the batches before the random ones
LOOP = llama.Config(vocab=512, context=128, width=96, layers=2, heads=4, kv_heads=2, ff=256)
ROWS, LONGEST, REPEATED = 8, 60, 6
LOOPS: tuple[tuple[str, Mapping[str, Any], int], ...] = (  # mesh, plan, what lengths are multiples of
    ("dp=2", {}, 1),
    ("tp=2", {}, 1),
    ("sp=2", {}, 4),
    ("dp=2", {"zero": 3}, 1),
)


# ---------------------------------------------------------------- members


class Subject:
    """One model on one mesh: its families, made by calls of several lengths as a module makes them."""

    def __init__(self, name: str, mesh: str, choices: Mapping[str, Any]) -> None:
        torch.manual_seed(0)
        self.name, self.mesh = name, autopar.Mesh.parse(mesh)
        self.model = architecture(name).build(architecture(name).config_of({}))
        self.plan = autopar.Plan(check_numerics=False, **choices)
        self.compiles = 0
        self._signature = Signature(self.model.forward)
        self.families = SizeFamilies(
            self.compiled, lambda call: call_facts(self.model, call.args, call.kwargs), self.mesh, self.plan
        )

    def call(self, rows: int, length: int) -> Call:
        batch = architecture(self.name).example_batch(self.model.config, rows, length)
        return self._signature.call((), batch)

    def compiled(self, call: Call, like: AnyProgram | None) -> tuple[AnyProgram, Guards]:
        self.compiles += 1
        with guards_of_traces() as guards:
            program = compile_program(self.model, self.mesh, self.plan, call.args, call.kwargs, like=like)
        return program, guards

    def program(self, rows: int, length: int) -> tuple[AnyProgram, bool, float]:
        """The program of a batch, whether it is of a family, and the milliseconds that this took."""
        call = self.call(rows, length)
        kind, start = general(call), time.process_time()
        member = self.families.member(kind, call)
        milliseconds = 1e3 * (time.process_time() - start)
        if member is None and (member := self.families.grown(kind, call)) is None:
            program, guards = self.compiled(call, self.families.like(kind))
            self.families.learn(kind, call, program, guards)
            return program, False, milliseconds
        return member.program, True, milliseconds

    def alone(self, rows: int, length: int) -> AnyProgram:
        """What the compiler gives for a batch."""
        call = self.call(rows, length)
        return compile_program(
            self.model, self.mesh, self.plan, call.args, call.kwargs, like=self.families.like(general(call))
        )


def members(pairs: int) -> Iterator[str]:
    """A line for each model and mesh: how many of its share of ``pairs`` have the text that the compiler gives."""
    choose = random.Random(0)
    subjects = [(name, *mesh) for name in MODELS for mesh in (*MESHES, *MORE.get(name, ()))]
    each, equal, total, of_family = -(-pairs // len(subjects)), 0, 0, 0
    milliseconds: list[float] = []
    for name, mesh, choices in subjects:
        subject = Subject(name, mesh, choices)
        for rows, length in FIRST:
            subject.program(rows, length)
        right = inside = 0
        for _ in range(each):
            rows, length = 2 * choose.randint(2, 8), 4 * choose.randint(1, 32)
            program, is_member, taken = subject.program(rows, length)
            right += str(program) == str(subject.alone(rows, length))
            inside += is_member
            milliseconds += [taken] if is_member else []
        equal, total, of_family = equal + right, total + each, of_family + inside
        families = " | ".join(map(str, subject.families.families)) or "no family"
        yield (
            f"{name:<8} {mesh:<9} {choices or ''}: {right} of {each} equal, {inside} of a family; "
            f"{subject.compiles} compiles; {families}"
        )
    made = sorted(milliseconds)
    yield (
        f"{equal} of {total} texts equal, {of_family} of a family; a member: "
        f"median {statistics.median(made):.1f} ms of processor time, most {made[-1]:.1f} ms; load {os.getloadavg()[0]}"
    )


# ---------------------------------------------------------------- loop


def random_batches(steps: int, unit: int) -> Iterator[dict[str, Tensor]]:
    """As a collator pads them: to the longest row, in multiples of ``unit``; rows have unequally many labels."""
    choose = random.Random(0)
    for step in range(steps):
        batch = llama.example_batch(LOOP, ROWS, unit * choose.randint(-(-4 // unit), LONGEST // unit), seed=step)
        for row in range(1, ROWS):
            batch["labels"][row, choose.randint(2, batch["labels"].shape[1]) :] = -100
        yield batch


def loop_model() -> nn.Module:
    torch.manual_seed(0)
    return llama.Llama(LOOP).double()


def loss_of_step(module: nn.Module, batch: Mapping[str, Tensor]) -> float:
    loss: Tensor = module(**batch)["loss"]
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def loop(steps: int, mesh: autopar.Mesh, choices: Mapping[str, Any], unit: int) -> dict[str, Any]:
    """On this rank: compiles, the largest error of a loss, and steps against a program for each length."""
    compiles, original = 0, cache_compiled.compile_program

    def counted(*args: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return original(*args)

    cache_compiled.compile_program = counted  # type: ignore[attr-defined]
    plan = autopar.Plan(check_numerics=False, **choices)
    ours, alone = autopar.parallelize(loop_model(), mesh, plan), loop_model()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.02) for module in (ours, alone)]
    worst, lengths, fresh = 0.0, set[int](), list[float]()
    for batch in random_batches(steps, unit):
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
    cache_compiled.compile_program = original  # type: ignore[attr-defined]
    each = autopar.parallelize(loop_model(), mesh, replace(plan, lengths="each"))
    fixed = [llama.example_batch(LOOP, ROWS, 8 * (n + 1), seed=n) for n in range(REPEATED)]
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
        "mesh": f"{mesh} {dict(choices)}",
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
    parser.add_argument("--loops", type=int, nargs="*", default=range(len(LOOPS)), help="some of them, by number")
    parser.add_argument("--worker", type=Path)
    given = parser.parse_args()
    if given.worker is not None:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        found = [
            loop(given.steps, autopar.Mesh.parse(mesh), choices, unit)
            for mesh, choices, unit in (LOOPS[n] for n in given.loops)
        ]
        if torch.distributed.get_rank() == 0:
            given.worker.write_text(json.dumps(found))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    elif given.what == "members":
        for line in members(given.pairs):
            print(line, flush=True)
    else:
        json.dump(
            launched("benchmarks.lengths", 2, ["--steps", given.steps, "--loops", *given.loops]), sys.stdout, indent=2
        )


if __name__ == "__main__":
    main()
