"""What goes into a model and out of it, on one rank: names that do not fit, heads, dtypes, folders, whole files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import autopar
from autopar import CheckpointError, Mesh, Plan
from autopar.checkpoint import written_weights
from autopar.zoo.named import named_model
from tests.selection import slow_but

transformers = pytest.importorskip("transformers")
ONE, FILE = Mesh(dp=1), "model.safetensors"
TINY: dict[str, Any] = {"num_hidden_layers": 1}


def written(directory: Path, name: str = "llama", **changes: Any) -> Any:
    model = named_model(f"hf:{name}", {**TINY, **changes}).model
    model.save_pretrained(directory)
    return model


def with_entries(directory: Path, change: Any) -> None:
    entries = load_file(directory / FILE)
    save_file(change(entries), directory / FILE)


def test_what_fits_on_neither_side_is_named_with_near_names(tmp_path: Path) -> None:
    written(tmp_path)
    with_entries(tmp_path, lambda entries: {name.replace("down_proj", "down_prj"): t for name, t in entries.items()})
    with pytest.raises(CheckpointError) as refusal:
        autopar.from_pretrained(tmp_path, ONE)
    text = str(refusal.value)
    lost, there = ("'model.layers.0.mlp.down_proj.weight'", "'model.layers.0.mlp.down_prj.weight'")
    assert f"1 tensors of the model have no entry in the files: {lost} (near: {there})" in text
    assert f"1 entries of the files are no tensors of the model: {there} (near: {lost})" in text
    assert "Way out" in text and len(text.splitlines()) < 15
    model = autopar.from_pretrained(tmp_path, ONE, strict=False, seed=1)
    assert 0 < float(model.full_state_dict()[lost.strip("'")].std()) < 0.1


def test_a_new_head(tmp_path: Path) -> None:
    written(tmp_path)
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "labels": torch.tensor([0, 2])}
    how: dict[str, Any] = {"task": "seq-classification", "config": {"num_labels": 3, "pad_token_id": 0}}
    with pytest.raises(CheckpointError, match=r"'score.weight' \(near: .*|'score.weight'.*") as refusal:
        autopar.from_pretrained(tmp_path, ONE, example_inputs=batch, **how)
    assert "a new head?" in str(refusal.value) and "lm_head.weight" in str(refusal.value)
    model = autopar.from_pretrained(tmp_path, ONE, example_inputs=batch, strict=False, **how)
    assert model.config.problem_type == "single_label_classification"
    assert bool(model.train_step(**batch).isfinite())
    with pytest.raises(ValueError, match="has no field 'num_label': did you mean 'num_labels'"):
        autopar.from_pretrained(tmp_path, ONE, config={"num_label": 3})
    with pytest.raises(ValueError, match="task classify: there is none"):
        autopar.from_pretrained(tmp_path, ONE, task="classify")


@pytest.mark.parametrize("name", slow_but([0], ["bert", "gpt2", "t5", "deepseek_v3", "vit", "whisper", "clip"]))
def test_every_tensor_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """Buffers that no file has, too, and after a way back through files, which are those of transformers."""
    example = named_model(f"hf:{name}")
    example.model.save_pretrained(tmp_path / "theirs")
    wanted = type(example.model).from_pretrained(tmp_path / "theirs")
    model = autopar.from_pretrained(tmp_path / "theirs", ONE, example_inputs=example.batch)
    plain = autopar.gather(model)
    assert plain is not None and not plain.training and type(plain) is type(wanted)
    ours, theirs = (dict(m.named_buffers()) | dict(m.named_parameters()) for m in (plain, wanted))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    autopar.save_pretrained(model, tmp_path / "ours")
    files = [load_file(tmp_path / where / FILE) for where in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[1][key], files[0][key]) for key in files[0])


def test_old_names_and_fused_ones(tmp_path: Path) -> None:
    """Names that transformers knows of earlier, and rows of three tensors as one in the files."""
    config = transformers.NomicBertConfig(vocab_size=48, n_embd=24, n_head=2, n_layer=1, n_inner=32)
    model = transformers.NomicBertModel(config)
    model.save_pretrained(tmp_path / "theirs")
    entries = load_file(tmp_path / "theirs" / FILE)
    fused = [name for name in entries if "Wqkv" in name]
    assert fused and not any("q_proj" in name for name in entries)
    other = transformers.NomicBertModel(config)
    found = autopar.load_safetensors(other, tmp_path / "theirs", strict=True)
    assert not found.initialised and not found.unused
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    autopar.save_pretrained(other, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / FILE)
    assert ours.keys() == entries.keys() and all(torch.equal(ours[name], entries[name]) for name in ours)

    bert = transformers.BertModel(transformers.BertConfig(vocab_size=48, hidden_size=24, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32))  # fmt: skip
    bert.save_pretrained(tmp_path / "old")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
           for name, value in load_file(tmp_path / "old" / FILE).items()}  # fmt: skip
    assert any(name.endswith("gamma") for name in old)
    save_file(old, tmp_path / "old" / FILE)
    assert not autopar.load_safetensors(transformers.BertModel(bert.config), tmp_path / "old", strict=True).initialised


def test_dtypes(tmp_path: Path) -> None:
    written(tmp_path / "float32")  # in which the default batch is used too
    model = autopar.from_pretrained(tmp_path / "float32", ONE, dtype=torch.bfloat16)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    plain = autopar.gather(model)
    assert plain is not None
    ours, theirs = (dict(m.named_buffers()) | dict(m.named_parameters()) for m in (plain, wanted))
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in theirs.items()}
    autopar.save_pretrained(model, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    halves = load_file(tmp_path / "half" / FILE)
    assert {value.dtype for value in halves.values()} == {torch.bfloat16}
    autopar.save_pretrained(model, tmp_path / "whole", dtype=torch.float32)
    assert {value.dtype for value in load_file(tmp_path / "whole" / FILE).values()} == {torch.float32}
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"


def changed_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "model")
    refusals = {}
    with pytest.raises(CheckpointError, match=r"'no/such-model' is no folder, and no repository") as refusals["id"]:
        autopar.from_pretrained("no/such-model", ONE)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json") as refusals["empty"]:
        autopar.from_pretrained(tmp_path / "adapter", ONE)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has an adapter of peft") as refusals["adapter"]:
        autopar.from_pretrained(tmp_path / "adapter", ONE)
    changed_config(tmp_path / "model", architectures=None)
    with pytest.raises(CheckpointError, match="has no 'architectures'") as refusals["class"]:
        autopar.from_pretrained(tmp_path / "model", ONE)
    assert autopar.from_pretrained(tmp_path / "model", ONE, task="causal-lm").config.model_type == "llama"
    changed_config(tmp_path / "model", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match=r"quantised \(mxfp4\)") as refusals["quantised"]:
        autopar.from_pretrained(tmp_path / "model", ONE, task="causal-lm")
    for refusal in refusals.values():
        assert "Way out" in str(refusal.value) and len(str(refusal.value).splitlines()) < 15
    with pytest.raises(ValueError, match="needs a mesh"):
        autopar.from_pretrained(tmp_path / "model")


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(tmp_path / "source")

    def fails(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(written_weights, "_write", fails)
        with pytest.raises(CheckpointError, match="no space left"):
            autopar.save_pretrained(model, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(CheckpointError, match="no config .*\nWay out: autopar.save_safetensors"):
        autopar.save_pretrained(nn.Linear(2, 2), tmp_path / "target")

    class Tokenizer:
        def save_pretrained(self, directory: Path) -> None:
            (Path(directory) / "tokenizer.json").write_text("{}")

    (tmp_path / "target").mkdir()
    autopar.save_pretrained(model, tmp_path / "target", tokenizer=Tokenizer())
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert names == {"config.json", "generation_config.json", FILE, "tokenizer.json"}
    with pytest.raises(CheckpointError, match="has weights already"):
        autopar.save_pretrained(model, tmp_path / "target")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("kept")
    autopar.save_pretrained(model, tmp_path / "notes")
    assert {path.name for path in (tmp_path / "notes").iterdir()} == names - {"tokenizer.json"} | {"notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target", "notes"}


def test_other_methods_name_the_line_that_does_it(tmp_path: Path) -> None:
    written(tmp_path)
    model = autopar.from_pretrained(tmp_path, ONE)
    ways = {"generate": "autopar.gather(model)", "save_pretrained": "autopar.save_pretrained(model, directory)",
            "push_to_hub": "hf upload", "resize_token_embeddings": "plain model, before autopar.parallelize",
            "gradient_checkpointing_enable": 'autopar.Plan(recompute="full")'}  # fmt: skip
    for name, way in ways.items():
        with pytest.raises(AttributeError, match="(?s)is a method of LlamaForCausalLM.*Way out") as refusal:
            getattr(model, name)
        assert way in str(refusal.value)
    plain: Any = autopar.gather(model)
    ids = torch.ones(1, 3, dtype=torch.int64)
    tokens = plain.generate(ids, max_new_tokens=4, do_sample=False)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generate(
        ids, max_new_tokens=4, do_sample=False
    )
    assert torch.equal(tokens, wanted)
    with torch.no_grad():
        plain.lm_head.weight.zero_()
    assert bool(model.full_state_dict()["lm_head.weight"].any())
    with pytest.raises(CheckpointError, match=r"gather\(rank=1\): there are ranks 0 to 0"):
        autopar.gather(model, 1)
    assert Plan(recompute="full").recompute == "full"
