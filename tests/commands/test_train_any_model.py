"""``autopar train`` of any model on the batches of a user's loader."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Outcome, autopar
from tests.commands.test_train import losses, records
from tests.launch import run_ranks
from tests.selection import slow_but

OWN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autopar


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.double()

    def forward(self, x):
        return self.down(self.norm(self.up(x)).relu())


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)])
        self.double()

    def forward(self, x, y):
        return nn.functional.mse_loss(self.layers(x), y), {"other": 1}


def rows(count, wide=False):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 6, generator=generator).double()
    return TensorDataset(x, x.flip(1) if wide else torch.randint(4, (count,), generator=generator))


def loader(batch_size, split="train"):
    return DataLoader(rows(30 if split == "train" else 10), batch_size, shuffle=split == "train")


def numbers(batch_size):
    return [{"x": x, "y": y} for x, y in DataLoader(rows(24, wide=True), batch_size)]


def parts(batch_size, mesh, seed):
    return DataLoader(rows(24), batch_sampler=autopar.BatchesOfRank(range(24), batch_size, mesh, shuffle=seed))


def broken(batch_size):
    for x, y in loader(batch_size):
        yield x, y
        raise RuntimeError("the disk is gone")


def data_set():
    return rows(30)


def needs(batch_size, folder):
    return []


number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_batches.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def train(folder: Path | str, model: str, loader: str, *arguments: str) -> Outcome:
    file = f"{folder}/own_batches.py"
    return autopar("train", f"{file}:{model}", "--data", f"{file}:{loader}", "--batch", "8", *arguments)


def test_one_device(here: Path) -> None:
    run = ["--mesh", "1", "--steps", "6", "--log", "log", "--json", "--eval-every", "4"]
    code, out, err = train(here, "Net", "loader", *run, "--eval-data", "own_batches:loader", "--accumulate", "2")
    document = json.loads(out)
    assert code == 0 and document["largest_difference"] == 0.0, err
    assert document["unit"] == "rows" and document["length"] is None and document["rows_per_second"] > 0
    assert document["batch"] == 90 / 12, "three passes of batches of 8, 8, 8 and 6 rows"
    assert {record["step"] for record in records(here / "log") if "evaluation_loss" in record} == {3, 5}
    assert list(document["evaluation_losses"]) == ["4", "6"] and "evaluation_loss" in err
    assert all("rows_per_second" in record and "tokens_per_second" not in record for record in records(here / "log"))
    code, out, err = train(here, "Net", "loader", "--mesh", "1", "--steps", "2")
    assert code == 0 and out.startswith(f"{here}/own_batches.py:Net: 212 parameters; it returns no loss: the cross")
    assert "rows/s" in out and "rows/s" in err and "batches of 8 rows" in out


MESHES = [
    ("Net", "loader", 2, ["dp=2", "--zero", "3"]),
    ("Deep", "numbers", 2, ["pp=2", "--microbatches", "2"]),
    ("Net", "loader", 2, ["tp=2"]),
    ("Net", "loader", 4, ["dp=2,tp=2", "--zero", "1"]),
    ("Deep", "numbers", 2, ["dp=2", "--microbatches", "2"]),
    ("Deep", "numbers", 4, ["dp=2,pp=2"]),
]


@pytest.mark.parametrize("model, loader, ranks, words", slow_but([0], MESHES))
def test_every_mesh(model: str, loader: str, ranks: int, words: list[str], here: Path) -> None:
    """In float64 the losses are those of one device; another mesh goes on from the checkpoint."""
    data = [model, loader, "--eval-data", f"{here}/own_batches.py:{loader}", "--json"]
    run = [*data, "--checkpoint", str(here / "saved"), "--log", str(here / "log"), "--resume", "--compare"]
    found = run_ranks(train, ranks, str(here), *run, "--steps", "5", "--mesh", *words)
    assert [code for code, *_ in found] == [0] * ranks, found[0]
    assert json.loads(found[0][1])["losses"] == losses(here / "log")
    code, out, err = train(here, *run, "--steps", "7", "--mesh", "1")
    assert code == 0 and json.loads(out)["first_step"] == 5, err
    whole = json.loads(train(here, *data, "--steps", "7", "--mesh", "1")[1])
    assert losses(here / "log") == pytest.approx(whole["losses"], rel=0, abs=1e-12)
    shutil.rmtree(here / "saved")


@pytest.mark.slow
def test_local_rows(here: Path) -> None:
    """Each rank's loader gives its own rows; rank 0 cannot train the unmodified model beside, and says so."""
    run = ["Net", "parts", "--steps", "7", "--json"]
    (code, out, err), _ = run_ranks(train, 2, str(here), *run, "--mesh", "dp=2", "--inputs", "local")
    whole = json.loads(train(here, *run, "--mesh", "1")[1])
    assert code == 0 and json.loads(out)["losses"] == pytest.approx(whole["losses"], rel=0, abs=1e-12)
    assert json.loads(out)["batch"] == whole["batch"] == 8 and "each rank has its own rows" in err


WRONG: list[tuple[list[str], str]] = [
    (["Net", "loder"], "has no 'loder': did you mean 'loader'"),
    (["Net", "number"], "it is int, neither a function nor a loader"),
    (["Net", "data_set"], "TensorDataset, a data set of rows, and batches are wanted"),
    (["Net", "needs"], "it needs folder; a loader may take seed, mesh, plan, batch_size"),
    (["Net", "broken", "--steps", "3"], 'RuntimeError: the disk is gone\nin .*line .*raise RuntimeError'),
    (["Deep", "loader", "--loss", "cross-entropy"], "the forward of .*Deep needs y, and a batch has 2 entries"),
    (["Net", "loader", "--tokenizer", "bytes"], "is a loader, and --tokenizer, .* are for texts"),
    (["Net", "loader", "--eval-every", "3"], "what is the model to be evaluated on"),
    (["Net", "loader", "--eval-data", "own_batches.py"], "--eval-data own_batches.py: that is Python"),
]  # fmt: skip


@pytest.mark.parametrize("words, said", WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_what_cannot_be_trained_on(words: list[str], said: str, here: Path) -> None:
    code, _, err = train(here, *words, "--mesh", "1", "--no-compare")
    assert code == 2 and re.search(said, err) and "Way out: " in err and "Traceback" not in err, err
    assert len(err.splitlines()) < 15


def test_a_model_without_a_vocabulary_and_text() -> None:
    code, _, err = autopar("train", "mlp", "--mesh", "1")
    assert code == 2 and "--data FILE.py:LOADER, a function that returns batches for any model" in err


def test_the_example(here: Path) -> None:
    """The classifier of ``examples/`` learns, and rows/s are counted."""
    file = str(Path(__file__).parents[2] / "examples/image_classifier.py")
    run: list[Any] = ["--mesh", "1", "--steps", "12", "--batch", "24", "--lr", "1e-2", "--json", "--no-compare"]
    code, out, err = autopar(
        "train", f"{file}:Classifier", "--data", f"{file}:loader", "--eval-data", f"{file}:loader", *run
    )
    document = json.loads(out)
    assert code == 0 and document["losses"][-1] < 0.5 * document["losses"][0], err
    assert document["evaluation_losses"]["12"] < document["losses"][0]
