"""``autopar export-weights``: the weights of a training checkpoint as Hugging Face's files, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopar.commands.tables import print_json, stderr

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}  # of torch


def export_weights_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="a checkpoint, or the folder of a run's")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="a directory without weights")],
    step: Annotated[int | None, typer.Option(min=0, help="of a run's checkpoints; by default the latest")] = None,
    config_from: Annotated[
        str | None, typer.Option(metavar="FOLDER|ID", help="the model's config, where the checkpoint has none")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{' | '.join(DTYPES)}; by default that of training")] = None,
    max_shard_size: Annotated[str, typer.Option(help="of one file")] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Write the weights of a training checkpoint as safetensors files, with the config: for from_pretrained.

    It runs in one process, on a machine that holds the largest tensor. Names and layouts are those of the Hub.
    """
    import torch

    from autopar.ir.traffic import size_text
    from autopar.pretrained.exported_weights import export_weights

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    with stderr().status(f"writing {output}"):
        found = export_weights(
            checkpoint, output, step=step, config_from=config_from,
            dtype=getattr(torch, DTYPES[dtype]) if dtype else None, max_shard_size=max_shard_size,
        )  # fmt: skip
    if as_json:
        print_json({"checkpoint": str(found.path), "step": found.step, "directory": str(output),
                    "files": found.files, "tensors": found.tensors, "bytes": found.bytes,
                    "config": found.has_config})  # fmt: skip
        return
    print(f"{output}: {found.tensors} tensors, {size_text(found.bytes)}, of step {found.step} in {found.path}")
    for name in found.files:
        print(f"  {name}")
    if not found.has_config:
        print("The checkpoint says nothing of a config: names are the model's own. --config-from FOLDER gives one.")
