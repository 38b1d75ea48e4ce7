"""Every form of a MODEL: folders with a config, files, modules, classes; inputs that are described; losses put on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopar.zoo import example_inputs
from autopar.zoo.example_inputs import Described, described
from autopar.zoo.named import named_model
from autopar.zoo.put_on_loss import has_loss
from autopar.zoo.rehearsal import rehearse
from tests.selection import slow_but

TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 20, **TINY}
CONFIGS: dict[str, dict[str, Any]] = {  # what the config names -> its fields
    "LlamaForCausalLM": LLAMA,
    "BertForMaskedLM": {"model_type": "bert", "vocab_size": 64, **TINY},
    "BertForTokenClassification": {"model_type": "bert", "vocab_size": 64, **TINY},
    "BertForQuestionAnswering": {"model_type": "bert", "vocab_size": 64, **TINY},
    "BertForMultipleChoice": {"model_type": "bert", "vocab_size": 64, **TINY},
    "LlamaForSequenceClassification": LLAMA,
    "T5ForConditionalGeneration": {
        "model_type": "t5", "vocab_size": 64, "d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8,
        "decoder_start_token_id": 0,
    },
    "ViTForImageClassification": {"model_type": "vit", "image_size": 16, "patch_size": 8, **TINY},
    "LlamaModel": LLAMA,
    "ViTModel": {"model_type": "vit", "image_size": 16, "patch_size": 8, **TINY},
}  # fmt: skip
NET = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Sizes:
    width: int = 16


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Tokens(nn.Module):
    def __init__(self, vocab=50):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, 16), nn.Embedding(9, 16)
        self.head = nn.Linear(16, vocab)

    def forward(self, ids, steps=None):
        steps = torch.arange(ids.shape[1]) if steps is None else steps
        return self.head(self.tokens(ids.reshape(ids.shape)) + self.places(steps))


def make():
    return Net()


def wrong():
    return Net(undefined)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file of models, of which nothing has been imported."""
    (tmp_path / "net_of_a_user.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("net_of_a_user", "json_of_a_user"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    return tmp_path


def folder(here: Path, fields: dict[str, Any], name: str = "folder") -> str:
    (here / name).mkdir(exist_ok=True)
    (here / name / "config.json").write_text(json.dumps(fields))
    return name


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name", slow_but((0, 1, 8), list(CONFIGS)))
def test_a_folder_with_a_config(name: str, here: Path) -> None:
    """The class that the config names, with a batch for its task; one without a loss gets one."""
    pytest.importorskip("transformers")
    example = named_model(folder(here, {"architectures": [name], **CONFIGS[name]}), batch=2, loss="auto")
    assert type(example.model).__name__ == name and name in example.words
    output = example.model(**example.batch)
    assert has_loss(output) and torch.isfinite(output["loss"])
    assert ("it returns no loss" in example.words) == name.endswith("Model")
    assert not list(here.glob("folder/*.safetensors"))


def test_a_config_that_does_not_say_its_task(here: Path) -> None:
    pytest.importorskip("transformers")
    name = folder(here, LLAMA)
    with pytest.raises(ValueError, match=r"names no architecture\nWay out: --task causal-lm \| seq-classification"):
        named_model(name)
    example = named_model(name, {"num_hidden_layers": 2}, batch=3, length=5, task="causal-lm")
    assert example.batch["input_ids"].shape == (3, 5) and example.model.config.num_hidden_layers == 2  # type: ignore[union-attr]
    assert named_model(name, task="causal-lm").batch["input_ids"].shape == (12, 20), "as many as it has positions"
    for task, said in (("masked-lm", "no such llama"), ("causal", "did you mean 'causal-lm'")):
        with pytest.raises(ValueError, match=said):
            named_model(name, task=task)
    with pytest.raises(ValueError, match="no field 'num_layer'.*did you mean 'num_"):
        named_model(name, {"num_layer": 2}, task="causal-lm")


def test_a_large_config_allocates_no_weights(here: Path) -> None:
    pytest.importorskip("transformers")
    large = {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 3, "vocab_size": 128256}
    example = named_model(folder(here, {"architectures": ["LlamaForCausalLM"], **large}), batch=1, loss="auto")
    assert not example.has_weights and "billion parameters; no weights are read" in example.words


@pytest.mark.parametrize("content, said", [
    ("{", "cannot be read"),
    ("[]", "holds no table"),
    ('{"model_type": "nothing_known"}', "cannot be read"),
    ('{"auto_map": {"AutoConfig": "mine.Config"}}', "its own code"),
])  # fmt: skip
def test_a_config_that_is_none(content: str, said: str, here: Path) -> None:
    pytest.importorskip("transformers")
    (here / "folder").mkdir()
    (here / "folder" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        named_model("folder")
    assert "Way out: " in str(caught.value)


def test_a_folder_without_a_config_and_an_id_that_is_not_cached(here: Path) -> None:
    pytest.importorskip("transformers")
    (here / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder empty has no config.json"):
        named_model("empty")
    with pytest.raises(ValueError, match="hf download no-one/no-model config.json"):
        named_model("no-one/no-model")


# ---------------------------------------------------------------- files and classes


@pytest.mark.parametrize("name", ["net_of_a_user.py:Net", "net_of_a_user:Net", "./net_of_a_user.py:make"])
def test_files_modules_classes(name: str, here: Path) -> None:
    example = named_model(name, {"width": 24} if name.endswith("Net") else {}, inputs=("x=Bx8",), ways=5, loss="auto")
    assert example.batch["x"].shape == (15, 8)
    assert set(example.model(**example.batch)) == {"loss", "output"} and "mean square of its outputs" in example.words
    assert [name for name, _ in example.model.named_parameters()][0] == "up.weight", "names are the model's own"


def test_a_file_with_the_name_of_a_module_of_python(here: Path) -> None:
    (here / "json.py").write_text(NET)
    assert named_model("json.py:Net", inputs=("x=4x8",)).batch["x"].shape == (4, 8)
    assert json.dumps(1) == "1" and sys.modules["json"] is json


def test_a_file_finds_its_neighbours(here: Path) -> None:
    (here / "inner").mkdir()
    (here / "inner" / "beside_the_net.py").write_text("WIDTH = 24")
    (here / "inner" / "model_beside.py").write_text(NET + "\nfrom beside_the_net import WIDTH\n")
    assert named_model("inner/model_beside.py:Net", inputs=("x=4x8",)).model is not None


@pytest.mark.parametrize("code, target, said", [
    ("def f(:", "f", "SyntaxError"),
    ("import not_installed_anywhere", "f", "not_installed_anywhere"),
    ("raise SystemExit(3)", "f", "SystemExit"),
    ("f = 1 / 0", "f", "ZeroDivisionError.*\n.*line 1: f = 1 / 0"),
    (NET, "wrong", "calling .*NameError.*\n.*return Net\\(undefined\\)"),
    (NET, "Nett", "did you mean 'Net'"),
    (NET, "torch", "it is not callable"),
    (NET, "Net", "--input x=4x8"),
    ("def f(layers): pass", "f", "needs layers.*\nWay out: --config layers=..."),
    ("def f(): return 3", "f", "returned int"),
])  # fmt: skip
def test_what_is_wrong_in_a_users_file_is_told(code: str, target: str, said: str, here: Path) -> None:
    (here / "file_of_a_user.py").write_text(code)
    sys.modules.pop("file_of_a_user", None)
    with pytest.raises(ValueError, match=f"(?s){said}") as caught:
        named_model(f"file_of_a_user.py:{target}")
    assert "Way out: " in str(caught.value) and len(str(caught.value).splitlines()) < 8


# ---------------------------------------------------------------- inputs


def test_inputs_are_legal_indices_of_the_tables_that_they_index(here: Path) -> None:
    """Of two tables each input gets the size of its own, through views; a range and --vocab go before."""
    batch = named_model("net_of_a_user.py:Tokens", inputs=("ids=60x7:int64", "steps=7:int64"), seed=3).batch
    assert 40 < int(batch["ids"].max()) < 50 and 4 < int(batch["steps"].max()) < 9
    ranged = named_model("net_of_a_user.py:Tokens", inputs=("ids=60x7:int64:3..5",)).batch["ids"]
    assert set(ranged.unique().tolist()) == {3, 4, 5}
    assert int(named_model("net_of_a_user.py:Tokens", inputs=("ids=60x7:int64",), vocab=4).batch["ids"].max()) == 3


def test_a_loss_of_next_tokens_is_that_of_torch(here: Path) -> None:
    example = named_model("net_of_a_user.py:Tokens", inputs=("ids=BxT:int64",), batch=3, length=6, loss="auto")
    ids, output = example.batch["ids"], example.model(**example.batch)
    expected = nn.CrossEntropyLoss()(output["output"][:, :-1].reshape(15, 50), ids[:, 1:].reshape(15))
    assert torch.equal(output["loss"], expected) and "cross entropy" in example.words
    square = named_model("net_of_a_user.py:Tokens", inputs=("ids=BxT:int64",), loss="mean-square").model
    assert "loss" in square(ids)
    with pytest.raises(ValueError, match="no loss 'next-tokens': did you mean 'next-token'"):
        named_model("net_of_a_user.py:Tokens", inputs=("ids=BxT:int64",), loss="next-tokens")


class Looks(nn.Module):
    """Its Python reads values, so that it cannot be rehearsed on the meta device, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm, self.head = nn.Embedding(30, 4), nn.BatchNorm1d(4), nn.Linear(4, 7)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.tokens(ids).sum(1))
        hidden = hidden * 2 if bool((ids > 3).any()) else hidden
        return nn.functional.cross_entropy(self.head(hidden), labels)


def test_a_rehearsal_leaves_the_model_as_it_is() -> None:
    model = Looks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    zeros = {"ids": torch.zeros(4, 5, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)}
    found = rehearse(model, zeros)
    assert found.bounds == {"ids": 30, "labels": 7} and has_loss(found.output)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_as_they_are_written() -> None:
    found = described(["x=4x8", "h=Bx8:bf16", "ids=BxT:i64", "t=4:int64:0..999", "s=scalar", "flag=True", "n=none"])
    assert found["x"] == Described("x", (4, 8), torch.float32)
    assert found["h"] == Described("h", ("B", 8), torch.bfloat16) and found["s"] == Described("s", (), torch.float32)
    assert found["t"] == Described("t", (4,), torch.int64, 0, 999) and (found["flag"], found["n"]) == (True, None)
    mask = described(["m=50:bool"])["m"]
    assert isinstance(mask, Described) and not mask.has_open_range
    drawn = mask.tensor(1, 1, torch.Generator().manual_seed(0), 1)
    assert drawn.dtype == torch.bool and 0 < int(drawn.sum()) < 50


@pytest.mark.parametrize("text, said", [
    ("x", "NAME=SHAPE"),
    ("x=", "no list of sizes"),
    ("x=4,8", "no list of sizes"),
    ("x=0x8", "no list of sizes"),
    ("x=4x8:int46", "did you mean 'int64'"),
    ("x=4:int64:9..2", "LOW..HIGH"),
    ("x=4:float32:0..2", "a range is for integers"),
    ("1x=4", "NAME=SHAPE"),
])  # fmt: skip
def test_inputs_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        described([text])
    assert "Way out: " in str(caught.value)


def test_inputs_that_forward_does_not_take(here: Path) -> None:
    for inputs, said in (
        (("y=4x8",), "has no such argument"),
        (("ids=4x8:int64", "step=8:int64"), "did you mean 'steps'"),
        (("steps=8:int64",), "needs ids"),
        (("ids=4x8:int64", "ids=4x8:int64"), "given twice"),
    ):
        with pytest.raises(ValueError, match=said):
            named_model("net_of_a_user.py:Tokens", inputs=inputs)
    assert example_inputs.forward_of(Looks()) == "--input ids=4x8 --input labels=4x8"


def test_a_language_model_needs_no_inputs(here: Path) -> None:
    (here / "net_of_a_user.py").write_text(
        NET.replace("ids, steps=None", "input_ids, steps=None").replace("ids.", "input_ids.")
    )
    example = named_model("net_of_a_user.py:Tokens", {"vocab": 20}, batch=30, length=9, loss="auto")
    assert example.batch["input_ids"].shape == (30, 9) and 15 < int(example.batch["input_ids"].max()) < 20
    assert "cross entropy of its logits with the next token" in example.words


def test_a_task_is_for_configs(here: Path) -> None:
    with pytest.raises(ValueError, match="--task causal-lm: net_of_a_user.py:Net says itself"):
        named_model("net_of_a_user.py:Net", inputs=("x=4x8",), task="causal-lm")
