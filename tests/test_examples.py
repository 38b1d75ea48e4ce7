"""The scripts of examples/ run as they are, and on any mesh they compute what they compute on one device."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.commands.deferred import Deferred
from tests.launch import run_ranks
from tests.test_readme import ROOT, blocks

EXAMPLES = ROOT / "examples"
MOST_LINES = 120

pytest.importorskip("transformers")


def run(name: str, *arguments: str) -> Any:
    """What ``main`` of an example returns."""
    return importlib.import_module(f"examples.{name}").main(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small model as transformers writes it, in ``model``, and ``data.jsonl``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    here = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(here / "model")
    rows = [json.dumps({"text": "to be or not to be, " * (1 + number % 4)}) for number in range(10)]
    (here / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    yield here
    shutil.rmtree(here)


def close(found: Any, wanted: Any) -> bool:
    """In float32, after some steps of AdamW."""
    return torch.allclose(torch.tensor(found), torch.tensor(wanted), rtol=2e-4)


def test_they_are_short_and_on_their_page() -> None:
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".sh"):
            assert len(path.read_text(encoding="utf-8").splitlines()) < MOST_LINES, path.name
            assert f"`examples/{path.name}`" in page, path.name


def test_pretraining_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = run("pretrain_text", str(ROOT / "LICENSE"), "--steps", "4", "--width", "16", "--layers", "1")
    words = ("--width", "16", "--layers", "1", "--checkpoint", str(tmp_path))
    first = run("pretrain_text", str(ROOT / "LICENSE"), "--steps", "2", *words)
    assert first + run("pretrain_text", str(ROOT / "LICENSE"), "--steps", "4", *words) == whole


RUNS = [
    ("pretrain_text", 2, ["{root}/LICENSE", "--steps", "3"], ["--mesh", "dp=2", "--zero", "3"]),
    ("pretrain_text", 4, ["{root}/LICENSE", "--steps", "3"], ["--mesh", "dp=2,tp=2", "--zero", "1"]),
    ("long_context", 2, [], ["--mesh", "sp=2"]),
    ("long_context", 2, [], ["--mesh", "sp=2", "--attention", "ulysses"]),
    ("mixture_of_experts", 2, [], ["--mesh", "ep=2"]),
    ("mixture_of_experts", 4, [], ["--mesh", "dp=2,ep=2"]),
    ("evaluate", 2, ["{folder}/model", "{root}/CONTRIBUTING.md"], ["--mesh", "dp=2"]),
    ("image_classifier", 2, [], ["--mesh", "dp=2", "--zero", "3"]),
    ("image_classifier", 4, [], ["--mesh", "dp=2,tp=2"]),
    ("generate", 2, ["{folder}/model", "hello"], ["--mesh", "tp=2"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks, words, mesh", RUNS, ids=[f"{name} {' '.join(mesh)}" for name, *_, mesh in RUNS])
def test_on_a_mesh_as_on_one_device(folder: Path, name: str, ranks: int, words: list[str], mesh: list[str]) -> None:
    given = [word.format(root=ROOT, folder=folder) for word in words]
    alone = run_ranks(run, 1, name, *given)[0]
    for found in run_ranks(run, ranks, name, *given, *mesh):
        assert close(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", (["--mesh", "dp=2", "--zero", "3"], ["--mesh", "tp=2"]), ids=lambda mesh: mesh[1])
def test_lora(mesh: list[str], tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="pip install 'autopar[peft]'")
    file = tmp_path / "adapters.pt"
    alone = run_ranks(run, 1, "lora")[0]
    assert close(run_ranks(run, 2, "lora", *mesh, "--output", str(file))[1], alone)
    adapters = torch.load(file, weights_only=True)
    assert adapters and all("lora_" in name for name in adapters)


@pytest.mark.slow
def test_what_is_fine_tuned_is_read_by_transformers(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    words = (str(folder / "model"), str(folder / "data.jsonl"), "-o")
    alone = run_ranks(run, 1, "finetune", *words, str(tmp_path / "one"))[0]
    assert alone[-1] < alone[0]
    assert close(run_ranks(run, 2, "finetune", *words, str(tmp_path / "two"), "--mesh", "tp=2")[0], alone)
    with pytest.raises(SystemExit):  # at the start, and not after the training
        importlib.import_module("examples.finetune").parsed([*words, str(tmp_path / "one")])
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    # AdamW divides by the size of a gradient: where one is nothing but rounding, steps of the learning rate differ
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


@pytest.mark.slow
def test_64_ranks() -> None:
    run("three_axes")


def counted(zero: str) -> str:
    """The lines that ``what_a_rank_holds`` prints, of rank 0."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run("what_a_rank_holds", *zero.split())
    return printed.getvalue()


def pages_that_count() -> list[tuple[str, str]]:
    """Choices and output of what_a_rank_holds in the pages."""
    found = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        for block, _ in blocks(page, "console"):
            command, _, output = block.text.partition("\n")
            if "what_a_rank_holds" in command and output:
                found.append((command.partition("what_a_rank_holds.py ")[2], output))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("words, output", pages_that_count(), ids=[words for words, _ in pages_that_count()])
def test_what_a_rank_holds_is_what_the_pages_say(words: str, output: str) -> None:
    assert run_ranks(counted, 4, words)[0] == output


@pytest.mark.slow
def test_the_batch_file_is_a_script() -> None:
    file = EXAMPLES / "slurm.sh"
    subprocess.run(["bash", "-n", str(file)], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(file)], check=True)


def test_the_batch_file_has_options_that_there_are() -> None:
    """Those of ``autopar train`` in the torchrun line."""
    text = (EXAMPLES / "slurm.sh").read_text(encoding="utf-8").partition("-m autopar train")[2].partition("\n'")[0]
    found = Deferred("train").loaded().params
    known = {word for parameter in found for word in (*parameter.opts, *parameter.secondary_opts)}
    options = {word for word in text.split() if word.startswith("--")}
    assert len(options) > 8 and options <= known, options - known


def test_a_prompt_is_no_label_when_fine_tuning() -> None:
    row = importlib.import_module("examples.finetune").row
    tokens, mask, labels = row(None, {"prompt": "ab", "completion": "c"}, 5)
    assert tokens.tolist() == [97, 98, 99, 0, 0] and mask.tolist() == [1, 1, 1, 0, 0]
    assert labels.tolist() == [-100, -100, 99, -100, -100]
    assert row(None, {"text": "abc"}, 2)[2].tolist() == [97, 98]


@pytest.mark.slow
def test_fine_tuning_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    words = [str(folder / "model"), str(folder / "data.jsonl"), "--checkpoint", str(tmp_path / "run"), "--every", "1"]
    whole = run_ranks(run, 1, "finetune", *words[:2], "--epochs", "2", "-o", str(tmp_path / "whole"))[0]
    first = run_ranks(run, 1, "finetune", *words, "-o", str(tmp_path / "half"))[0]
    rest = run_ranks(run, 1, "finetune", *words, "--epochs", "2", "-o", str(tmp_path / "rest"))[0]
    assert rest and close(first + rest, whole)
