"""Files of Hugging Face models, three steps on a mesh, files again: what plain ``transformers`` says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import autopar
from autopar import Mesh, Plan
from autopar.dtensors.dtensor import local_of
from autopar.frontend.numerics import promote_float32
from autopar.pretrained import loading
from autopar.zoo.named import named_model
from tests.launch import run_ranks
from tests.selection import slow_but

transformers = pytest.importorskip("transformers")

Batch = dict[str, Tensor]
STEPS, RATE = 3, 0.1
TINY: dict[str, Any] = {"num_hidden_layers": 2}
JOURNEYS = [
    ("llama", {}, "dp=2,tp=2", 3),
    ("llama", {}, "dp=1", 0),
    ("llama", {"tie_word_embeddings": True}, "pp=2,tp=2", 0),
    ("llama", {"tie_word_embeddings": True}, "pp=1,dp=2,tp=1", 3),
    ("mixtral", {}, "dp=2,ep=2", 3),
    ("mixtral", {}, "pp=2,ep=2", 0),
    ("qwen3_moe", {}, "ep=2,tp=2", 0),
    ("qwen3_moe", {}, "dp=2", 2),
    ("gpt_oss", {}, "dp=2,tp=2", 3),
    ("gpt_oss", {}, "ep=2,sp=1", 0),
]


@contextmanager
def doubles() -> Iterator[None]:
    """Everything that models compute is in float64, also what they cast to float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with promote_float32():
            yield
    finally:
        torch.set_default_dtype(before)


def written(name: str, changes: dict[str, Any], directory: Path) -> Batch:
    """The files of a model with random weights in float64, as ``transformers`` writes them, and a batch."""
    example = named_model(f"hf:{name}", {**TINY, **changes}, batch=4)
    example.model.double().save_pretrained(directory, max_shard_size="200KB")
    return example.batch


def journey(mesh: str, zero: int, source: Path, target: Path, batch: Batch) -> dict[str, Any]:
    found: list[Any] = []
    real = loading.load_safetensors
    loading.load_safetensors = lambda *args, **kwargs: found.append(real(*args, **kwargs)) or found[0]  # type: ignore
    plan = Plan(zero=zero, microbatches=2 if "pp=2" in mesh else 1, check_numerics=False)
    with doubles():
        model = autopar.from_pretrained(source, Mesh.parse(mesh), plan, dtype=torch.float64, example_inputs=batch)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for _ in range(STEPS):
            model.train_step(**batch)
            optimizer.step()
            optimizer.zero_grad()
        autopar.save_pretrained(model, target, max_shard_size="200KB")
        plain = autopar.gather(model, rank=None)
        assert plain is not None
        losses = float(plain(**batch).loss.detach()), float(model.train_step(**batch))
    held = sum(local_of(parameter).nbytes for parameter in model.parameters())
    return {"read": found[0].bytes_read, "held": held, "losses": losses, "training": model.training}


def on_one_device(source: Path, batch: Batch) -> Any:
    with doubles():
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
        model.set_experts_implementation("eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for _ in range(STEPS):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize(("name", "changes", "mesh", "zero"), slow_but([7], JOURNEYS))
def test_there_train_and_back(name: str, changes: dict[str, Any], mesh: str, zero: int, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    batch = written(name, changes, source)
    results = run_ranks(journey, Mesh.parse(mesh).world_size, mesh, zero, source, target, batch)
    expected = on_one_device(source, batch)
    before = type(expected).from_pretrained(source).state_dict()
    found, info = type(expected).from_pretrained(target, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(tensor.dtype == torch.float64 for tensor in ours.values())
    worst = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
    print(f"{name} {changes} on {mesh}: largest difference of a weight {worst:.1e}")
    assert worst < 1e-12
    assert max(float((ours[key] - start).abs().max()) for key, start in before.items()) > 1e-6, "nothing was learned"
    whole = sum(tensor.nbytes for path in source.glob("*.safetensors") for tensor in load_file(path).values())
    for result in results:
        assert result["read"] == result["held"] <= whole
        assert abs(result["losses"][0] - result["losses"][1]) < 1e-12 and not result["training"]
    names = [{path.name for path in folder.iterdir()} for folder in (source, target)]
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= names[1]
    assert stored(source) == stored(target)


def stored(folder: Path) -> tuple[set[str], Any]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return set(index["weight_map"]), json.loads((folder / "config.json").read_text())
