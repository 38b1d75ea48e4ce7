"""Seconds and memory that compiling a Llama of the shape of 8B for a split sequence takes, at several lengths.

    python -m benchmarks.sequence_compile                                    sp=8, 8k to 128k, a fresh process each
    python -m benchmarks.sequence_compile --model ours --length 131072 --mesh dp=2,sp=8 --form ulysses

32 layers, 4096 wide, 32 heads of which 8 have keys, a vocabulary of 128,256, bfloat16 on the meta device: no weights.
``hf`` is Hugging Face's ``LlamaForCausalLM``, which computes its causal mask; ``ours`` is ``models/llama``, which asks
for it by ``is_causal``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from autopar.mesh import Mesh
from autopar.models import llama
from autopar.plan import Plan
from benchmarks.compile_70b import Compilation, batch_of, compilation

MODULE = "benchmarks.sequence_compile"
LENGTHS = (8192, 32_768, 131_072)
FORMS = ("auto", "ring", "ulysses", "gather", "hybrid")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.worker:
        print(json.dumps(asdict(_compiled(options))))
        return 0
    found = [_apart(length, options) for length in options.length]
    if options.json:
        print(json.dumps([asdict(entry) for entry in found], indent=2))
    else:
        title = (
            f"{options.layers} layers of Llama 8B ({options.model}), {options.mesh}, {options.form}: processor seconds"
        )
        Console(width=None if sys.stdout.isatty() else 120).print(_table(options.length, found, title))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("hf", "ours"), default="hf")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--mesh", default="sp=8")
    parser.add_argument("--form", choices=FORMS, default="auto")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # compile here, print JSON
    return parser


def _apart(length: int, options: argparse.Namespace) -> Compilation:
    """In a process of its own, so that its peak of memory is its own too."""
    command = [sys.executable, "-m", MODULE, "--worker", "--length", str(length), "--model", options.model]
    command += ["--layers", str(options.layers), "--mesh", options.mesh, "--form", options.form]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Compilation(**json.loads(done.stdout.splitlines()[-1]))


def _compiled(options: argparse.Namespace) -> Compilation:
    mesh, plan = Mesh.parse(options.mesh), Plan(attention=options.form)
    model, batch = MODELS[options.model](options.layers), batch_of(mesh.size("dp"), options.length[0])
    return compilation(model, batch, options.layers, mesh, plan)


def _hugging_face(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.train()


def _ours(layers: int) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = llama.build("llama_8b", layers=layers).to(torch.bfloat16)
    return model.train()


MODELS = {"hf": _hugging_face, "ours": _ours}


def _table(lengths: Sequence[int], found: Sequence[Compilation], title: str) -> Table:
    table = Table("step", title=title, title_justify="left")
    for length in lengths:
        table.add_column(f"S = {length}", justify="right")
    for name in found[0].seconds:
        seconds = [entry.seconds[name] for entry in found]
        if max(seconds) >= 0.05:
            table.add_row(name, *(f"{each:.2f}" for each in seconds))
    table.add_section()
    totals: dict[str, list[str]] = {
        "total": [f"{entry.total:.1f}" for entry in found],
        "by the clock": [f"{entry.clock_seconds:.1f}" for entry in found],
        "peak MB": [f"{entry.peak_mb:.0f}" for entry in found],
        "of it before compiling": [f"{entry.baseline_mb:.0f}" for entry in found],
        "forward nodes": [str(entry.forward_nodes) for entry in found],
        "backward nodes": [str(entry.backward_nodes) for entry in found],
        "emitted lines": [str(entry.emitted_lines) for entry in found],
    }
    for name, cells in totals.items():
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
