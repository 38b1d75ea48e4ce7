"""``autopar train`` of a folder with weights: they are trained, as a loop on the plain model trains them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from autopar.commands import training_run
from autopar.data.token_sources import byte_tokens, usual_text
from autopar.data.token_stream import TokenStream
from autopar.zoo.named import named_model
from tests.command_line import Outcome, autopar
from tests.launch import run_ranks
from tests.selection import slow_but

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
STEPS, ROWS, LENGTH = 3, 4, 8
SETTINGS = ["--json", "--steps", str(STEPS), "--batch", str(ROWS), "--length", str(LENGTH), "--config", "dtype=float64"]
CLASSES = """
import torch

def loader(batch_size):
    ids = torch.arange(4 * batch_size * 6).reshape(-1, batch_size, 6) % 40
    return [{"input_ids": rows, "labels": rows[:, 0] % 2} for rows in ids]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaConfig(vocab_size=288, **SIZES)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def train(folder: Path | str, *arguments: str) -> Outcome:
    return autopar("train", str(folder), *SETTINGS, *arguments)


def plain_losses(folder: Path) -> list[float]:
    """Of a loop on what ``transformers`` reads."""
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, losses = TokenStream(byte_tokens(usual_text()), ROWS, LENGTH), []
    tokens.limit = model.config.vocab_size
    for step in range(STEPS):
        loss = model(**tokens(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


MESHES = [
    (1, ["1"]),
    (4, ["dp=2,tp=2", "--zero", "3"]),
    (2, ["pp=2", "--microbatches", "1"]),  # the losses of several are float32, as llama computes it, and are added
]


@pytest.mark.parametrize("ranks, words", slow_but([0], MESHES))
def test_weights_are_trained(ranks: int, words: list[str], folder: Path) -> None:
    found = run_ranks(train, ranks, str(folder), "--mesh", *words) if ranks > 1 else [train(folder, "--mesh", *words)]
    assert [code for code, *_ in found] == [0] * ranks, found[0]
    document = json.loads(found[0][1])
    assert document["losses"] == pytest.approx(plain_losses(folder), rel=0, abs=1e-10)
    assert document["reference_losses"] == pytest.approx(document["losses"], rel=0, abs=1e-10)


def test_which_weights_is_said(folder: Path) -> None:
    name = str(folder)
    example = named_model(name, start="files")
    assert example.words.endswith(f"parameters; weights of {name}") and not example.has_weights
    assert named_model(name, start="random").words.endswith("parameters; random weights")
    (folder / "model.safetensors").unlink()
    code, out, err = autopar("train", name, "--mesh", "1", "--steps", "1", "--batch", "2", "--length", "4")
    assert code == 0 and out.splitlines()[0].endswith(f"; random weights: {name} has only a config"), err


def test_a_new_head(folder: Path) -> None:
    (folder.parent / "classes.py").write_text(CLASSES)
    data = ["--data", f"{folder.parent}/classes.py:loader", "--config", "pad_token_id=0"]
    once = ["train", str(folder), *data, "--mesh", "1", "--steps", "2", "--batch", "4", "--json"]
    code, out, err = autopar(*once, "--task", "seq-classification")
    assert code == 0 and json.loads(out)["largest_difference"] < 1e-6, err
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert json.loads(out)["parameters"] == sum(parameter.numel() for parameter in plain.parameters())


def test_files_without_a_tensor(folder: Path) -> None:
    code, err, _ = train(folder, "--mesh", "1", "--config", "num_hidden_layers=3")
    assert code == 2 and "model.layers.2" in err


def no_ranks(*_: Any, **__: Any) -> None:
    raise AssertionError("ranks are started")


def test_refused_before_ranks_are_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "relaunch", no_ranks)
    code, err, _ = train(folder, "--mesh", "dp=2", "--random", "--config", "intermediate_size=20000000")
    assert code == 2 and "too large to be trained from random weights" in err and "--config num_hidden_layers=2" in err
    code, err, _ = train(folder, "--mesh", "dp=2", "--config", "vocab_size=100")
    assert code == 2 and "--config vocab_size=288" in err
    code, err, _ = train("no/such/folder", "--mesh", "dp=2")
    assert code == 2 and "no/such/folder" in err
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    code, err, _ = train(folder, "--mesh", "dp=2")
    assert code == 2 and "is a pickle" in err


def test_weights_that_the_code_makes(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from torch import nn\n\ndef net():\n    return nn.Linear(2, 2)\n")
    code, _, err = autopar("train", f"{tmp_path}/own.py:net", "--mesh", "1", "--random")
    assert code == 2 and "makes its own weights" in err
