"""``autopar compile``, then ``train --program`` and ``run``: nothing is compiled, no source of the model is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import autopar.compiler
from autopar.zoo.named import named_model
from tests.commands.test_command_line import Command, autopar_command  # noqa: F401

ROOT = Path(__file__).parents[2]
TINY = ["--config", "vocab=288", "--config", "layers=1", "--config", "width=48", "--config", "heads=12"]
# run by every Python that starts with this folder on its path
WITHOUT_TRANSFORMERS = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "models"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refusing())
"""


def traced(*arguments: Any, **more: Any) -> Any:
    raise AssertionError("this call was traced")


@pytest.mark.usefixtures("autopar_command")
def test_train_from_a_program(
    autopar_command: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = ["--batch", "4", "--length", "8"]
    assert autopar_command("compile", "llama", *TINY, *sizes, "--mesh", "1", "-o", "out")[0] == 0
    monkeypatch.setattr(autopar.compiler, "trace", traced)
    code, out, err = autopar_command("train", "llama", *TINY, "--steps", "3", "--program", "out", "--json")
    assert code == 0, err  # the losses of the unmodified model
    document = json.loads(out)
    assert (document["batch"], document["length"]) == (4, 8) or "batch" not in document
    for arguments, said in (
        (["--mesh", "1", "--zero", "1"], "plan: zero=0 in the program, 1 here"),
        (["--config", "layers=2"], "missing in the program"),
        (["--mesh", "tp=1"], "mesh: mesh(dp=1) in the program, mesh(tp=1) here"),
    ):
        code, _, err = autopar_command("train", "llama", *TINY, "--steps", "1", "--program", "out", *arguments)
        assert code == 2 and said in err, err


def test_a_program_runs_where_its_model_is_not_installed(tmp_path: Path) -> None:
    """Compiled from a Hugging Face model in this process, run by ranks that cannot import transformers."""
    example = named_model("hf:llama", {"num_hidden_layers": 1}, 4, 8, seed=3)
    program = autopar.compile_program(example.model, autopar.Mesh(dp=2), None, (), example.batch)
    program.save(tmp_path / "out")
    save_file({name: p.detach().clone() for name, p in example.model.named_parameters()}, tmp_path / "weights")
    save_file(example.batch, tmp_path / "inputs")
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(WITHOUT_TRANSFORMERS)
    environment = {**os.environ, "PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    files = ["--weights", "weights", "--inputs", "inputs", "--output", "found"]
    command = [sys.executable, "-m", "autopar", "run", "out", *files, "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "which is not known here: plain dicts and tuples stand in" in done.stderr
    expected = example.model(**example.batch)
    torch.testing.assert_close(load_file(tmp_path / "found")["loss"], expected.loss.detach())
