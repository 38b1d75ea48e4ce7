"""Host memory and bytes read when 4 processes load a Llama 2 7B, built on the meta device, from safetensors files.

    python -m benchmarks.load_7b                            all 32 layers: 13.5 GB of files, 13.5 GB of memory in all
    python -m benchmarks.load_7b --layers 8 --mesh dp=2,tp=2 --zero 3

The files are fabricated, in shards of 2 GB, by a rule that says each number by name and place, so every rank can check
what it got. Memory is resident memory from before loading on: a rank has to gain its own slices, and little more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from autopar.mesh import Mesh
from benchmarks.process_memory import forget_most_resident, most_resident, resident

SHARD = 2 * 10**9  # bytes
LENGTH = 128
PERIOD = 251  # numbers below 256 are exact in bfloat16


@dataclass
class Loading:
    """Of one rank, bytes: of its slices; read, as counted by autopar and by the kernel; resident memory before, the
    most while loading, and of that beyond ``before`` and the slices."""

    rank: int
    seconds: float
    own: int
    read: int
    kernel_read: int
    before: int
    peak: int
    beyond: int
    wrong: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--mesh", default="dp=2,tp=2")
    parser.add_argument("--zero", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="for the files, which stay; else a temporary one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one rank, under torchrun
    options = parser.parse_args(arguments)
    if options.worker:
        _measure(options)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        total = fabricate(llama_7b(options.layers), directory)
        found = _launched(options, directory)
    if options.json:
        print(json.dumps({"total": total, "ranks": [asdict(entry) for entry in found]}, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(_table(found, total, options))
    return int(any(entry.wrong for entry in found))


def llama_7b(layers: int) -> nn.Module:
    """Llama 2 7B with ``layers`` of its 32 layers, in bfloat16 on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers)
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def expected(name: str, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
    """What the rectangle at ``offsets`` of tensor ``name`` holds, in bfloat16."""
    found = torch.tensor(zlib.crc32(name.encode()) % PERIOD, dtype=torch.int16)
    for dim, (start, size) in enumerate(zip(offsets, shape)):
        places = (torch.arange(start, start + size) * (2 * dim + 3) % PERIOD).to(torch.int16)
        found = found[..., None] + places
    return (found % PERIOD).to(torch.bfloat16)


def fabricate(model: nn.Module, directory: Path) -> int:
    """Sharded files with an index for all parameters of ``model``; gives their bytes."""
    from autopar.checkpoint.safetensors_file import SafetensorsFile, create

    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in model.named_parameters():
        if sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards):
        create(directory / file, {name: (tensor.dtype, tensor.shape) for name, tensor in shard.items()})
        writer = SafetensorsFile(directory / file, writable=True)
        for name, tensor in shard.items():
            writer.write(name, [0] * tensor.dim(), expected(name, [0] * tensor.dim(), tensor.shape))
        writer.close()
    where = {name: file for file, shard in zip(names, shards) for name in shard}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sum(tensor.nbytes for shard in shards for tensor in shard.values())


def _launched(options: argparse.Namespace, directory: Path) -> list[Loading]:
    ranks = Mesh.parse(options.mesh).world_size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "benchmarks.load_7b", "--worker", "--layers", str(options.layers), "--mesh", options.mesh]
    command += ["--zero", str(options.zero), "--directory", str(directory)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted((Loading(**line) for line in lines), key=lambda entry: entry.rank)


def _measure(options: argparse.Namespace) -> None:
    import autopar
    from autopar.checkpoint.named_tensors import named_tensors

    warnings.filterwarnings("ignore")
    mesh = Mesh.parse(options.mesh)
    ids = torch.zeros(mesh.world_size, LENGTH, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids.clone()}
    plan = autopar.Plan(zero=options.zero)
    model = autopar.parallelize(llama_7b(options.layers), mesh, plan, example_inputs=batch)
    forget_most_resident()
    before, read_before, start = resident(), _kernel_read(), time.perf_counter()
    found = autopar.load_safetensors(model, options.directory)
    seconds, peak, read = time.perf_counter() - start, most_resident(), _kernel_read() - read_before
    wrong, own = 0, 0
    for entry in named_tensors(model):
        if entry.name in found.loaded:
            for offsets, view in entry.slices.pieces():
                wrong += int((view != expected(entry.name, offsets, view.shape)).sum())
                own += view.nbytes
    rank = int(os.environ["RANK"])
    loading = Loading(rank, seconds, own, found.bytes_read, read, before, peak, peak - before - own, wrong)
    print(json.dumps(asdict(loading)), flush=True)


def _kernel_read() -> int:
    """Bytes that this process has got from read calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _table(found: Sequence[Loading], total: int, options: Any) -> Table:
    table = Table(
        title=f"Llama 2 7B, {options.layers} layers, {total / 1e9:.2f} GB, on {options.mesh}, zero={options.zero}",
        box=None,
    )
    for heading in ("rank", "own slices", "bytes read", "by the kernel", "before", "peak", "beyond", "s", "wrong"):
        table.add_column(heading, justify="right")
    for entry in found:
        sizes = (entry.own, entry.read, entry.kernel_read, entry.before, entry.peak, entry.beyond)
        cells = [f"{size / 1e6:,.1f} MB" for size in sizes]
        table.add_row(str(entry.rank), *cells, f"{entry.seconds:.1f}", str(entry.wrong))
    own, read = sum(entry.own for entry in found), sum(entry.read for entry in found)
    table.add_row("all", f"{own / 1e6:,.1f} MB", f"{read / 1e6:,.1f} MB")
    return table


if __name__ == "__main__":
    sys.exit(main())
