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
    whole, found = torch.load(folder / "inputs.pt"), dict[str, Any]()
    splits = {entry["name"]: entry["split"] for entry in manifest["inputs"]}
    about = manifest["formats"]["pt2"]
    parts = [part for part in about["parts"] if part["rank"] == rank]

    def inputs(part: dict[str, Any], rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = [entry["name"] for entry in part["inputs"] if entry["kind"] == "input"]
        return {name: _own(rows[name], splits[name], part["coordinates"], manifest["mesh"]) for name in names}

    if "schedule" in about:
        return _pipeline_step(folder, parts, about, whole, inputs)
    own: Own = {}
    for part in parts:
        given = inputs(part, whole) | _received(part, own)
        module = torch.export.load(folder / "pt2" / part["file"]).module()
        results = module(*[given[entry["name"]] for entry in part["inputs"]])
        named = {entry["name"]: tensor for entry, tensor in zip(part["outputs"], results)}
        _send(part, part["outputs"], named, own)
        found |= {entry["name"]: named[entry["name"]] for entry in part["outputs"] if entry["kind"] != "send"}
        grads = results[len(part["outputs"]) :]
        found |= {f"grad {name}": tensor for name, tensor in zip(part.get("gradients", ()), grads)}
    return found


Own = dict[tuple[str, int], torch.Tensor]  # between stages of this rank: (name of the value, the stage that takes it)


def _received(part: dict[str, Any], own: Own) -> dict[str, torch.Tensor]:
    """Values of other ranks; both ends go through them in the order of their names in the stage that makes them."""
    found = {}
    for entry in sorted(part["inputs"], key=lambda entry: entry.get("value", "")):
        if entry["kind"] == "recv":
            empty = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            found[entry["name"]] = _take(part, entry, empty, own)
    return found


def _take(part: dict[str, Any], entry: dict[str, Any], empty: torch.Tensor, own: Own) -> torch.Tensor:
    if entry["from_rank"] == part["rank"]:
        return own.pop((entry["value"], part["stage"]))
    dist.recv(empty, entry["from_rank"])
    return empty


def _send(part: dict[str, Any], entries: list[dict[str, Any]], values: dict[str, torch.Tensor], own: Own) -> None:
    for entry in sorted(entries, key=lambda entry: entry.get("value", "")):
        if "to_rank" not in entry:
            continue
        tensor = values[entry.get("name") or entry["of"]].contiguous()
        if entry["to_rank"] == part["rank"]:
            own[entry["value"], entry["to_stage"]] = tensor
        else:
            dist.send(tensor, entry["to_rank"])


def _sums(folder: Path, about: dict[str, Any], batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What weighs the loss of a microbatch: sums over the batch, and the share of its rows."""
    counts, sums = about.get("counts", {}), {"share": torch.tensor(1 / len(batches), dtype=torch.float64)}
    if "file" in counts:
        module = torch.export.load(folder / "pt2" / counts["file"]).module()
        counted = [module(*[rows[name] for name in counts["inputs"]]) for rows in batches]
        sums |= {name: sum(column) for name, column in zip(counts["outputs"], zip(*counted))}
    return sums


def _pipeline_step(
    folder: Path, parts: list[dict[str, Any]], about: dict[str, Any], whole: dict[str, torch.Tensor], inputs: Any
) -> dict[str, Any]:
    """All microbatches forward, then all of them backward (GPipe's order, which every schedule may be replaced by)."""
    kept, found, own = {}, dict[str, Any](), Own()
    count = about["microbatches"]
    batches = [{name: tensor.chunk(count)[number] for name, tensor in whole.items()} for number in range(count)]
    sums = _sums(folder, about, batches)
    share = 1.0 if "counts" in about else 1 / count  # of a loss that is not weighed, every microbatch has an equal one
    for part in parts:
        part["run"] = torch.export.load(folder / "pt2" / part["file"]).module()
        if "backward" in part:
            part["run_backward"] = torch.export.load(folder / "pt2" / part["backward"]["file"]).module()
    for number, rows in enumerate(batches):
        for part in parts:
            given = inputs(part, rows) | _received(part, own) | sums
            results = part["run"](*[given[entry["name"]] for entry in part["inputs"]])
            named = {entry["name"]: tensor for entry, tensor in zip(part["outputs"], results)}
            _send(part, part["outputs"], named, own)
            kept[part["stage"], number] = named, list(results[len(part["outputs"]) :])
            if "loss" in named:
                found["loss"] = found.get("loss", 0.0) + named["loss"] * share
    for number in range(count):
        for part in reversed(parts):
            if "backward" not in part:
                continue
            named, saved = kept.pop((part["stage"], number))
            for entry in sorted(part["backward"]["inputs"], key=lambda entry: entry.get("value", "")):
                if entry["kind"] == "grad" and "from_rank" in entry:
                    named[entry["of"]] = _take(part, entry, torch.empty_like(named[entry["of"]]), own)
                elif entry["kind"] == "grad":  # of the loss
                    named[entry["of"]] = torch.full_like(named[entry["of"]], share)
            taken = part["backward"]["inputs"]
            given = [saved[entry["number"]] if entry["kind"] == "saved" else named[entry["of"]] for entry in taken]
            returned = part["backward"]["outputs"]
            results = dict(zip([entry.get("name") or entry["of"] for entry in returned], part["run_backward"](*given)))
            _send(part, returned, results, own)
            for name in (entry["name"] for entry in returned if entry["kind"] == "gradient"):
                key = f"grad {part['stage']} {name}"
                found[key] = found.get(key, 0.0) + results[name]
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
