"""From a training checkpoint on disk to files: in one process, under the Hub's names, whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import autopar
from autopar import CheckpointError, Checkpoints, Mesh, Plan
from autopar.__main__ import main
from autopar.zoo.named import named_model
from tests.launch import run_ranks
from tests.selection import slow_but

transformers = pytest.importorskip("transformers")
RUNS = [("dp=2", 3), ("dp=2,ep=2", 3), ("pp=2,tp=2", 0), ("dp=1", 0)]
TINY: dict[str, Any] = {"num_hidden_layers": 2}


def trained(mesh: str, zero: int, directory: Path) -> dict[str, Tensor]:
    """Save checkpoints of two steps; the whole tensors at the second."""
    example = named_model("hf:mixtral", {**TINY, "tie_word_embeddings": True}, batch=4)
    plan = Plan(zero=zero, microbatches=2 if "pp" in mesh else 1, check_numerics=False)
    model = autopar.parallelize(example.model, Mesh.parse(mesh), plan, example_inputs=example.batch)
    optimizer, checkpoints = torch.optim.SGD(model.parameters(), lr=0.1), Checkpoints(directory)
    for step in (1, 2):
        model.train_step(**example.batch)
        optimizer.step()
        optimizer.zero_grad()
        checkpoints.save(step, model, optimizer)
    return model.full_state_dict()


@pytest.mark.parametrize(("mesh", "zero"), slow_but([3], RUNS))
def test_files_are_those_of_the_model_that_was_trained(mesh: str, zero: int, tmp_path: Path, monkeypatch: Any) -> None:
    ranks, how = Mesh.parse(mesh).world_size, (mesh, zero, tmp_path / "run")
    states = run_ranks(trained, ranks, *how) if ranks > 1 else [trained(*how)]
    line = [
        "autopar",
        "export-weights",
        str(tmp_path / "run"),
        "-o",
        str(tmp_path / "files"),
        "--max-shard-size",
        "2MB",
    ]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    found, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "files", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.state_dict().keys() == states[0].keys()
    assert all(torch.equal(value, states[0][name]) for name, value in found.state_dict().items())
    first = autopar.export_weights(tmp_path / "run", tmp_path / "first", step=1, dtype=torch.bfloat16)
    assert first.step == 1 and first.has_config and first.files == ("config.json", "generation_config.json",
                                                                    "model.safetensors")  # fmt: skip
    entries = load_file(tmp_path / "first" / "model.safetensors")
    assert {value.dtype for value in entries.values()} == {torch.bfloat16} and len(entries) == first.tensors
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in entries and "lm_head.weight" not in entries
    assert json.loads((tmp_path / "first" / "config.json").read_text())["dtype"] == "bfloat16"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("numbers", torch.arange(3))


def test_any_model_and_what_is_refused(tmp_path: Path) -> None:
    model = Tied()
    Checkpoints(tmp_path / "run").save(7, model)
    found = autopar.export_weights(tmp_path / "run", tmp_path / "files")
    assert not found.has_config and found.files == ("model.safetensors",)
    entries = load_file(tmp_path / "files" / "model.safetensors")
    assert len(entries) == 2 and torch.equal(entries["numbers"], model.numbers)
    other = Tied()
    assert not autopar.load_safetensors(other, tmp_path / "files", strict=True).initialised
    assert torch.equal(other.head.weight, model.head.weight)
    with pytest.raises(CheckpointError, match="has weights already"):
        autopar.export_weights(tmp_path / "run", tmp_path / "files")
    with pytest.raises(CheckpointError, match="no checkpoint of step 8; there are: of steps 7"):
        autopar.export_weights(tmp_path / "run", tmp_path / "more", step=8)
    with pytest.raises(CheckpointError, match="no checkpoint with finite parameters; there are: none"):
        autopar.export_weights(tmp_path / "files", tmp_path / "more")
    config = tmp_path / "config"
    named_model("hf:llama", {"num_hidden_layers": 1}).model.config.save_pretrained(config)
    changed = json.loads((config / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (config / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="(?s)is no checkpoint of LlamaForCausalLM with this config.*Way out"):
        autopar.export_weights(tmp_path / "run", tmp_path / "more", config_from=config)
    data = next((tmp_path / "run" / "step-00000007").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(CheckpointError, match="is damaged"):
        autopar.export_weights(tmp_path / "run", tmp_path / "more")
    assert not (tmp_path / "more").exists() and {p.name for p in tmp_path.iterdir()} == {"run", "files", "config"}
