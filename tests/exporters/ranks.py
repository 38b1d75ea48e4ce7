"""A rank of an exported program, run with nothing but torch: also a script, ``torchrun ranks.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group


def run_rank(folder: str) -> dict[str, Any]:
    """The outputs of this rank by name, for the whole inputs in FOLDER/inputs.pt."""
    dist.init_process_group("gloo")
    try:
        return _outputs(Path(folder), dist.get_rank())
    finally:
        dist.destroy_process_group()


def _outputs(folder: Path, rank: int) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, groups in manifest["groups"].items():
        for members in groups:
            group = dist.new_group(members)
            if rank in members:
                _register_process_group(name, group)
    whole, found = torch.load(folder / "inputs.pt"), {}
    splits = {entry["name"]: entry["split"] for entry in manifest["inputs"]}
    for part in manifest["formats"]["pt2"]["parts"]:
        if part["rank"] != rank:
            continue
        given = []
        for entry in part["inputs"]:
            if entry["kind"] == "recv":
                tensor = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
                if entry["from_rank"] != rank:
                    dist.recv(tensor, entry["from_rank"])
            else:
                tensor = _own(whole[entry["name"]], splits[entry["name"]], part["coordinates"], manifest["mesh"])
            given.append(tensor)
        results = torch.export.load(folder / "pt2" / part["file"]).module()(*given)
        for entry, tensor in zip(part["outputs"], results):
            if entry["kind"] == "send":
                dist.send(tensor.contiguous(), entry["to_rank"])
            else:
                found[entry["name"]] = tensor
        grads = results[len(part["outputs"]) :]
        found |= {f"grad {name}": tensor for name, tensor in zip(part.get("gradients", ()), grads)}
    return found


def _own(whole: torch.Tensor, split: dict[str, Any], coordinates: dict[str, int], mesh: dict[str, int]) -> torch.Tensor:
    """The part of an input that the manifest gives to a rank."""
    for dim, entry in split.items():
        place = 0
        for axis in entry["axes"]:
            place = place * mesh[axis] + coordinates[axis]
        rows = [row for first, stop in entry["pieces"][place] for row in range(first, stop)]
        whole = whole.index_select(int(dim), torch.tensor(rows))
    return whole


if __name__ == "__main__":
    outputs = run_rank(sys.argv[1])
    unexpected = {"autopar", "transformers", "onnx"} & set(sys.modules)
    assert not unexpected, unexpected
    print({name: float(tensor.double().mean()) for name, tensor in outputs.items()})
