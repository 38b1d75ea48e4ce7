"""Models by name: presets of ours and of Hugging Face, and a user's own factories."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from autopar import zoo
from autopar.zoo.named import OURS, named_model

FACTORIES = """
import torch
from torch import nn

def with_batch():
    return nn.Linear(3, 2), {"input": torch.zeros(4, 3)}

def sized(width=3, batch=4):
    return nn.Linear(width, 2), {"input": torch.zeros(batch, width)}

def without_batch():
    return nn.Linear(3, 2)

def no_model():
    return 3

number = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a user in the directory where the command runs."""
    (tmp_path / "my_models.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    importlib.invalidate_caches()
    return "my_models"


@pytest.mark.parametrize("name", OURS)
def test_ours(name: str) -> None:
    example = named_model(name, ways=5)
    assert example.has_weights
    assert {tensor.shape[0] for tensor in pytree.tree_leaves(example.batch)} == {15}, "the rows divide by 5"
    assert torch.isfinite(example.model(**example.batch)["loss"])


def test_the_seed_is_that_of_weights_and_batch() -> None:
    first, again, other = named_model("llama"), named_model("models.llama"), named_model("llama:tiny", seed=1)
    for found, same in ((again, True), (other, False)):
        assert torch.equal(first.model.tokens.weight, found.model.tokens.weight) is same  # type: ignore[union-attr, arg-type]
        assert torch.equal(first.batch["input_ids"], found.batch["input_ids"]) is same


def test_large_presets_have_no_weights() -> None:
    example = named_model("models.gpt:gpt_175b", {"layers": 3}, batch=2, length=8)
    assert not example.has_weights
    assert example.batch["input_ids"].shape == (2, 8) and not example.batch["input_ids"].is_meta


def test_factories(package: str) -> None:
    assert named_model(f"{package}:with_batch").batch["input"].shape == (4, 3)
    assert named_model(f"{package}:sized", {"width": 5}, batch=6).batch["input"].shape == (6, 5)


@pytest.mark.parametrize("target, said", [
    ("", "say which callable.*makes the model\nWay out: one of .*:sized, .*:with_batch"),
    (":missing", "has no 'missing'.*it is not there"),
    (":number", "has no 'number'.*it is not callable"),
    (":without_batch", "--input input=4x8, or return \\(model, batch\\)"),
    (":no_model", "returned int"),
])  # fmt: skip
def test_factories_that_do_not_do(package: str, target: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        named_model(f"{package}{target}")


def test_arguments_that_a_factory_does_not_take(package: str) -> None:
    with pytest.raises(ValueError, match="takes no argument 'batch'"):
        named_model(f"{package}:with_batch", batch=3)


def test_a_module_that_cannot_be_imported(package: str, tmp_path: Path) -> None:
    (tmp_path / "my_broken.py").write_text("import not_installed_anywhere")
    with pytest.raises(ValueError, match="not_installed_anywhere"):
        named_model("my_broken:model")


def test_transformers_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install 'autopar\\[hf\\]'"):
        named_model("hf:llama")


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_hugging_face(name: str) -> None:
    pytest.importorskip("transformers")
    example = named_model(f"hf:{name}", batch=6)
    output = example.model(**example.batch)
    assert torch.isfinite(output.loss) and "past_key_values" not in output
    labels = example.batch.get("labels")
    if labels is not None and labels.dim() == 2:
        counts = (labels != -100).sum(1).tolist()
        assert len(set(counts)) > 3 and min(counts) > 0, "rows with different numbers of labels"
    with torch.no_grad():
        again = example.model(**example.batch).loss
    assert torch.equal(again, output.loss), "no dropout"


def test_config_fields() -> None:
    pytest.importorskip("transformers")
    assert zoo.architecture("gpt2").config_of({"hidden_size": 48}).n_embd == 48, "by either name of a field"
    assert zoo.architecture("bert").config_of({"hidden_dropout_prob": 0.5}).hidden_dropout_prob == 0.5
    with pytest.raises(ValueError, match="LlamaConfig has no field 'layers'"):
        zoo.architecture("llama").config_of({"layers": 3})
    with pytest.raises(ValueError, match="takes images"):
        named_model("hf:vit", length=5)
