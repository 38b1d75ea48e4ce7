"""Adapters of ``peft`` in a parallel module: trained beside frozen weights, and written in their own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar import CheckpointError, Mesh
from autopar.zoo.named import named_model

peft = pytest.importorskip("peft", reason="pip install peft")


def test_adapters_go_to_files_of_their_own(tmp_path: Path) -> None:
    example = named_model("hf:llama", {"num_hidden_layers": 1}, batch=4)
    frozen = {name: value.clone() for name, value in example.model.state_dict().items()}
    adapted: Any = peft.get_peft_model(example.model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model = autopar.parallelize(adapted, Mesh(dp=1), example_inputs=example.batch)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
    for _ in range(2):
        model.train_step(**example.batch)
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(CheckpointError, match=r"(?s)adapters of peft.*autopar.gather\(model\)"):
        autopar.save_pretrained(model, tmp_path / "all")
    plain: Any = autopar.gather(model)
    plain.save_pretrained(tmp_path / "adapter")
    fresh = named_model("hf:llama", {"num_hidden_layers": 1}).model
    fresh.load_state_dict(frozen)
    back = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        expected, found = model.eval()(**example.batch).loss, back.eval()(**example.batch).loss
        assert abs(float(expected) - float(found)) < 1e-6
    learned = [value for name, value in plain.state_dict().items() if "lora_B" in name]
    assert learned and all(bool(value.any()) for value in learned)
