"""Every check and timing that needs one GPU, as one table in text and JSON: see ``benchmarks/gpu.sh``.

    python -m benchmarks.gpu [--device cuda|cpu] [--small] [--out DIR] [--sections machine,ranks,...]

A section that fails says so in its rows, and the others go on. On a CPU the same sections run, on smaller models with
``--small``; the numbers then only show that the script works.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopar
from autopar.compiler import compile_program
from autopar.cost.device_peaks import peak_flops
from autopar.cost.model_flops import learning_flops
from autopar.ir.program import Program
from autopar.models import gpt, llama, moe
from autopar.operators.attention import attend

BUDGET = 8 * 60.0  # seconds, in which all of it is to be done
SIMULATED = (
    ("llama", "dp=2,tp=2", {"zero": 3}),
    ("llama", "sp=2", {}),
    ("llama", "pp=2,tp=2", {"microbatches": 2}),
    ("gpt", "tp=2", {"sequence": "megatron"}),
    ("mixture", "ep=2", {}),
)
WARM_UP, STEPS = 3, 12


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    what: str
    value: str
    beside: str = ""  # what it is compared with


@dataclass(frozen=True)
class Run:
    """What the sections get. ``is_small``: models that a CPU trains in seconds."""

    device: torch.device
    is_small: bool

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def language_model(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """A Llama and a batch of it, on the device."""
        sizes: dict[str, int] = {"vocab": 32000, "context": 2048, "width": 2048, "layers": 12, "heads": 16}
        sizes |= {"kv_heads": 8, "ff": 5632}
        rows = 4
        if self.is_small:
            sizes = {"vocab": 256, "context": 64, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ff": 128}
            rows = 2
        torch.manual_seed(0)
        config = llama.Config(**sizes)
        model = llama.Llama(config).to(self.device, self.dtype)
        batch = llama.example_batch(config, rows, sizes["context"], seed=0)
        return model, {name: tensor.to(self.device) for name, tensor in batch.items()}


def machine(run: Run) -> Iterator[Row]:
    yield Row("machine", "torch", torch.__version__, f"Python {platform.python_version()}")
    if run.device.type == "cuda":
        kind = torch.cuda.get_device_properties(run.device)
        yield Row("machine", "device", kind.name, f"{kind.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}")
        yield Row("machine", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Row("machine", "device", platform.processor() or platform.machine(), f"{os.cpu_count()} cores")
    yield Row("machine", "load", f"{os.getloadavg()[0]:.1f}")


def marked_tests(run: Run) -> Iterator[Row]:
    """The tests that need a device; without one they are skipped, and counted so."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/operators"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = found.stdout.strip().splitlines() or found.stderr.strip().splitlines()
    yield Row("marked tests", "pytest -m gpu", lines[-1] if lines else "no output", f"exit code {found.returncode}")


def ranks(run: Run) -> Iterator[Row]:
    """All ranks of a mesh in this process, on the device, against the unmodified model: float64."""
    models: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {}
    sizes: dict[str, Any] = {"vocab": 64, "context": 16, "width": 32, "layers": 2, "heads": 4}
    for name, module, config in (
        ("llama", llama.Llama, llama.Config(**sizes, kv_heads=2, ff=64)),
        ("gpt", gpt.GPT, gpt.Config(**sizes)),
        ("mixture", moe.Mixtral, moe.Config(**sizes, kv_heads=2, ff=32, experts=4, top_k=2)),
    ):
        torch.manual_seed(0)
        batch = llama.example_batch(llama.Config(**sizes, kv_heads=2, ff=64), 4, 16, seed=1)
        models[name] = (
            module(config).to(run.device, torch.float64),  # type: ignore[arg-type]
            {key: tensor.to(run.device) for key, tensor in batch.items()},
        )
    for name, mesh, choices in SIMULATED:
        model, batch = models[name]
        module = autopar.parallelize(
            copy.deepcopy(model), autopar.Mesh.parse(mesh), autopar.Plan(check_numerics=False, **choices)
        )
        step = module.simulate(**batch)
        loss = model(**batch)["loss"]
        grads = torch.autograd.grad(loss, list(model.parameters()))
        error = max(
            float((step.grads[key] - grad).abs().max()) for (key, _), grad in zip(model.named_parameters(), grads)
        )
        assert step.loss is not None
        off = abs(float(step.loss) - float(loss.detach()))
        yield Row("ranks", f"{name} {mesh} {choices or ''}".strip(), f"loss {off:.1e}", f"gradients {error:.1e}")


def one_rank(run: Run) -> Iterator[Row]:
    """A training step of one rank against eager torch and torch.compile, in turns; its memory against the table."""
    model, batch = run.language_model()
    ours = autopar.parallelize(copy.deepcopy(model), autopar.Mesh(), autopar.Plan(check_numerics=False))
    contenders: dict[str, nn.Module] = {"eager": model, "autopar": ours}
    if run.device.type == "cuda":  # on a CPU both compile for a minute
        plan = autopar.Plan(compile="inductor", check_numerics=False)
        contenders["autopar, Inductor"] = autopar.parallelize(copy.deepcopy(model), autopar.Mesh(), plan)
        contenders["torch.compile"] = torch.compile(copy.deepcopy(model))  # type: ignore[assignment]
    steps = {name: _step(run, module, batch) for name, module in contenders.items()}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        yield Row("one rank", f"{name}: first step", f"{time.perf_counter() - start:.1f} s")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + STEPS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    program = ours.program
    assert isinstance(program, Program)
    flops, peak = learning_flops(program), peak_flops(run.device, run.dtype)
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        ratio = statistics.median(a / b for a, b in zip(seconds, times["eager"]))
        use = "" if peak is None else f", {flops / middle / peak:.1%} of the device's peak"
        yield Row("one rank", f"{name}: step", f"{1e3 * middle:.1f} ms{use}", f"{ratio:.2f} of eager")
    del contenders, steps
    yield from _memory(run, ours, batch)


def _step(run: Run, module: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)

    def step() -> None:
        module(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        run.synchronise()

    return step


def _memory(run: Run, ours: nn.Module, batch: dict[str, Tensor]) -> Iterator[Row]:
    """The peak of a step: the table's, and the allocator's."""
    program: Any = ours.program
    expected = program.memory("sgd").largest.peak
    if run.device.type != "cuda":
        yield Row("one rank", "peak memory, predicted", f"{expected / 1e6:.1f} MB", "measured on CUDA only")
        return
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(run.device) - sum(p.numel() * p.element_size() for p in ours.parameters())
    torch.cuda.reset_peak_memory_stats(run.device)
    _step(run, ours, batch)()
    measured = torch.cuda.max_memory_allocated(run.device) - held
    yield Row(
        "one rank",
        "peak memory",
        f"{measured / 1e9:.3f} GB",
        f"{expected / 1e9:.3f} GB predicted, {measured / expected:.3f}",
    )


def attention(run: Run) -> Iterator[Row]:
    """Our attention operator against torch's, forward and backward, and what kernels ran."""
    rows, heads, length, width = (1, 4, 64, 16) if run.is_small else (4, 16, 4096, 128)
    shape = (rows, heads, length, width)
    q, k, v = (torch.randn(shape, device=run.device, dtype=run.dtype, requires_grad=True) for _ in range(3))

    def theirs() -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def ours() -> Tensor:
        found: Tensor = attend(q, k, v, None, 0.0, True)
        return found

    times: dict[str, list[float]] = {"torch": [], "autopar": []}
    for turn in range(WARM_UP + STEPS):
        for name, function in (("torch", theirs), ("autopar", ours)):
            run.synchronise()
            start = time.perf_counter()
            torch.autograd.grad(function().sum(), (q, k, v))
            run.synchronise()
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(times["autopar"], times["torch"]))
    middle = 1e3 * statistics.median(times["autopar"])
    yield Row("attention", f"causal {list(shape)}", f"{middle:.2f} ms", f"{ratio:.2f} of torch's")
    if run.device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            torch.autograd.grad(ours().sum(), (q, k, v))
        names = [event.key for event in profiled.key_averages() if "fmha" in event.key or "flash" in event.key]
        yield Row("attention", "kernels", "; ".join(name[:60] for name in names) or "none of flash's")


def collectives(run: Run) -> Iterator[Row]:
    """A process group of one process: the collectives that ranks use, and a step as a launched rank."""
    backend = "nccl" if run.device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    x = torch.arange(1024.0, device=run.device)
    for name, call in (
        ("all_reduce", lambda out: dist.all_reduce(out)),
        ("all_gather_into_tensor", lambda out: dist.all_gather_into_tensor(out, x)),
        ("reduce_scatter_tensor", lambda out: dist.reduce_scatter_tensor(out, x)),
        ("all_to_all_single", lambda out: dist.all_to_all_single(out, x)),
        ("broadcast", lambda out: dist.broadcast(out, 0)),
    ):
        out = x.clone()
        call(out)
        run.synchronise()
        right = torch.equal(out, x)
        yield Row("collectives", f"{dist.get_backend()} {name}", "right" if right else "wrong")
    model, batch = Run(run.device, True).language_model()
    parallel = autopar.parallelize(copy.deepcopy(model), autopar.Mesh(dp=1), autopar.Plan(zero=3, check_numerics=False))
    with torch.no_grad():
        off = abs(float(parallel(**batch)["loss"]) - float(model(**batch)["loss"]))
    yield Row("collectives", f"a rank of dp=1 on {dist.get_backend()}", f"loss off by {off:.1e}")


def compiling(run: Run) -> Iterator[Row]:
    """Seconds of a compile for 64 devices, which needs no device: that of the machine beside the other numbers."""
    sizes: dict[str, Any] = {"width": 64, "layers": 2} if run.is_small else {"width": 1024, "layers": 16}
    config = llama.Config(vocab=1024, context=128, heads=8, kv_heads=8, ff=256, **sizes)
    with torch.device("meta"):
        model, batch = llama.Llama(config), llama.example_batch(config, 64, 128, seed=0)
    start = time.process_time()
    mesh = autopar.Mesh(pp=1, dp=8, tp=8)
    compile_program(model, mesh, autopar.Plan(check_numerics=False), (), batch)
    yield Row("compiling", f"{sizes['layers']} layers on {mesh}", f"{time.process_time() - start:.1f} CPU s")


SECTIONS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "machine": machine,
    "ranks": ranks,
    "collectives": collectives,
    "one_rank": one_rank,
    "attention": attention,
    "compiling": compiling,
    "marked_tests": marked_tests,
}


def rows_of(run: Run, sections: list[str]) -> Iterator[Row]:
    """The rows of each section; in place of those that could not be made, why."""
    start = time.monotonic()
    for name in sections:
        if time.monotonic() - start > BUDGET:
            yield Row(name, "not run", f"{BUDGET:.0f} s were over")
            continue
        begun = time.monotonic()
        try:
            yield from SECTIONS[name](run)
        except Exception as problem:  # of one section; the others still say what they have to say
            yield Row(name, "FAILED", type(problem).__name__, str(problem).partition("\n")[0])
        yield Row(name, "seconds", f"{time.monotonic() - begun:.0f}")


def text(row: Row) -> str:
    return f"{row.section:<13} {row.what:<46} {row.value:<34} {row.beside}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    """0 where every section ran and no collective was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--sections", default=",".join(SECTIONS))
    given = parser.parse_args(arguments)
    sections = given.sections.split(",")
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}: one of {', '.join(SECTIONS)}")
    run, found = Run(torch.device(given.device), given.small), []
    for row in rows_of(run, sections):
        print(text(row), flush=True)
        found.append(row)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu.txt").write_text("".join(f"{text(row)}\n" for row in found))
    (given.out / "gpu.json").write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
    return int(any(row.what == "FAILED" or row.value == "wrong" for row in found))


if __name__ == "__main__":
    sys.exit(main())
