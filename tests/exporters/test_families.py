"""Files of a family: written once, run by torch alone, or by ONNX Runtime, for batches of several sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _register_process_group

import autopar
from autopar.check import relative_error
from autopar.errors import ExportError
from autopar.exporters.export import export
from autopar.families.family import Family
from autopar.mesh import Mesh
from autopar.models import gpt, llama, moe
from autopar.plan import Plan
from tests.launch import run_ranks
from tests.selection import slow_but

TOLERANCE = 1e-10
BATCHES = ((8, 12), (12, 56))
RUNS = ((8, 16), (10, 52), (12, 24))
LLAMA = llama.Config(vocab=64, context=128, width=16, layers=2, heads=4, kv_heads=2, ff=32)
MIXTURE = moe.Config(vocab=64, context=128, width=16, layers=2, heads=4, kv_heads=2, ff=16, experts=4, top_k=2)
MODELS: dict[str, Any] = {
    "llama": lambda: llama.Llama(LLAMA),
    "gpt": lambda: gpt.GPT(gpt.Config(vocab=64, context=128, width=16, layers=2, heads=4)),
    "mixture": lambda: moe.Mixtral(MIXTURE),
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "dp=2,tp=2", {}),
    ("llama", "sp=2", {}),
    ("gpt", "sp=2", {"attention": "ulysses"}),
    ("llama", "tp=2", {"sequence": "megatron"}),
    ("gpt", "dp=2", {"zero": 3}),
    ("mixture", "ep=2", {}),
    ("mixture", "dp=2", {}),
]


def batch_of(rows: int, length: int) -> dict[str, Tensor]:
    """Rows have unequally many labels."""
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(rows + length))
    labels = ids.clone()
    labels[rows // 2, 1:] = -100
    return {"input_ids": ids, "labels": labels}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = MODELS[name]().double()
    return built


def family_of(model: nn.Module, mesh: str, plan: dict[str, Any]) -> Family:
    batches = [batch_of(*sizes) for sizes in BATCHES]
    return autopar.compile_family(model, Mesh.parse(mesh), Plan(check_numerics=False, **plan), batches)


def run_rank(folder: str, runs: Any) -> list[dict[str, Tensor]]:
    """The outputs of this rank for whole batches, with nothing but torch: sizes by evaluating the manifest's texts."""
    dist.init_process_group("gloo")
    manifest, rank = json.loads((Path(folder) / "manifest.json").read_text()), dist.get_rank()
    for name, groups in manifest["groups"].items():
        for members in groups:
            group = dist.new_group(members)
            if rank in members:
                _register_process_group(name, group)
    (part,) = (part for part in manifest["formats"]["pt2"]["parts"] if part["rank"] == rank)
    module, found = torch.export.load(Path(folder) / "pt2" / part["file"]).module(), []
    splits = {entry["name"]: entry["split"] for entry in manifest["inputs"]}
    for rows, length in runs:
        own = {}
        for name, whole in batch_of(rows, length).items():
            own[name] = whole
            for dim, split in splits[name].items():
                position = 0
                for axis in split["axes"]:
                    position = position * manifest["mesh"][axis] + part["coordinates"][axis]
                ends = [[number(end, rows, length) for end in piece] for piece in split["pieces"][position]]
                pieces = [own[name].narrow(int(dim), start, stop - start) for start, stop in ends]
                own[name] = torch.cat(pieces, int(dim))
        results = module(*[own[entry["name"]] for entry in part["inputs"]])
        for entry, tensor in zip(part["outputs"], results):
            assert list(tensor.shape) == [number(size, rows, length) for size in entry["shape"]]
        named = [entry["name"] for entry in part["outputs"]] + [f"grad {name}" for name in part.get("gradients", ())]
        found.append(dict(zip(named, results, strict=True)))
    dist.destroy_process_group()
    return found


def number(size: Any, rows: int, length: int) -> int:
    found = eval(str(size), {}, {"b": rows, "s": length})
    assert found == int(found)
    return int(found)


@pytest.mark.parametrize(("name", "mesh", "plan"), slow_but((), CASES))
@pytest.mark.parametrize("training", slow_but((0,), [True, False]))
def test_ranks_give_what_the_model_gives(
    name: str, mesh: str, plan: dict[str, Any], training: bool, tmp_path: Path
) -> None:
    model = model_of(name)
    family = family_of(model, mesh, plan)
    export(family, tmp_path / "out", "pt2", weights_from=model, training=training)
    found = run_ranks(run_rank, Mesh.parse(mesh).world_size, str(tmp_path / "out"), RUNS)
    for place, (rows, length) in enumerate(RUNS):
        model.zero_grad()
        loss = model(**batch_of(rows, length))["loss"]
        loss.backward()
        for outputs in (ranks[place] for ranks in found):
            assert relative_error(outputs["loss"], loss.detach()) < TOLERANCE
            check_gradients(outputs, model, family)


def check_gradients(outputs: dict[str, Tensor], model: nn.Module, family: Family) -> None:
    """Of the parameters that every rank has whole; the norms of all: a part has no more than the whole."""
    for name, parameter in model.named_parameters():
        grad = outputs.get(f"grad {name}")
        if grad is not None and grad.shape == parameter.shape:
            assert relative_error(grad, parameter.grad) < TOLERANCE, name


def test_onnx_runs_at_all_sizes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    model = MODELS["gpt"]()
    family = family_of(model, "dp=2", {})
    export(family, tmp_path / "out", "onnx", weights_from=model, verify=True)
    about = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert max(about["formats"]["onnx"]["verified"].values()) < 1e-5
    assert about["sizes"]["s"]["most"] >= 56
    graph = onnx.load(tmp_path / "out" / "onnx" / "rank1.onnx", load_external_data=False).graph
    assert [dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim] == ["b/2", "s"]


def test_what_has_no_dynamic_form_is_told(tmp_path: Path) -> None:
    model = model_of("llama")
    family = family_of(model, "pp=2", {"microbatches": 2})
    with pytest.raises(ExportError, match=r"dims like b\*s"):
        export(family, tmp_path / "out", "pt2", training=True)
    with pytest.raises(ExportError, match="Recv"):
        export(family, tmp_path / "out", "onnx")
    with pytest.raises(ExportError, match=r"family.member"):
        export(family, tmp_path / "out", "trace")
    assert not (tmp_path / "out").exists()
