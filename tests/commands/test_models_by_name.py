"""Every command that takes a MODEL takes every form of it, and says first what it is."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import autopar
from tests.selection import slow_but
from tests.zoo.test_forms import LLAMA, NET

FORMS = {  # a form -> the words with which it is given, and what the first line says
    "preset": ("mlp", ""),
    "tiny": ("tiny:gpt2 --config n_layer=1", "small and random"),
    "its older name": ("hf:gpt2 --config n_layer=1", "small and random"),
    "folder": ("folder --batch 12 --length 8", "LlamaForCausalLM of folder, task causal-lm"),
    "file": ("user_net.py:make --input x=Bx8", "the mean square of its outputs is put on"),
    "module": ("user_net:make --input x=Bx8", "the mean square of its outputs is put on"),
    "class": ("user_net.py:Tokens --input ids=12x6:int64", "with the next token is put on"),
    "class without a loss": ("user_net.py:Net --input x=12x8 --loss none", "280 parameters"),
}
COMMANDS = {  # a command -> what it takes beside the model
    "show": "--mesh dp=2,tp=2 --summary",
    "check": "--mesh dp=2,tp=2",
    "compile": "--mesh tp=2 -o written",
    "export": "--mesh tp=2 -o exported --weights none",
    "diff": "--mesh dp=2 --to-mesh tp=2",
}
ROWS = [(command, form) for command in COMMANDS for form in FORMS]
FAST = [ROWS.index(row) for row in (("show", "folder"), ("check", "class"), ("diff", "file"), ("compile", "module"))]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "user_net.py").write_text(NET)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **LLAMA}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("user_net", None)
    importlib.invalidate_caches()
    yield tmp_path
    shutil.rmtree(tmp_path / "exported", ignore_errors=True)


@pytest.mark.parametrize("command, form", slow_but(FAST, ROWS))
def test_every_command_takes_every_form(command: str, form: str, here: Path) -> None:
    pytest.importorskip("transformers") if form in ("tiny", "its older name", "folder") else None
    words, said = FORMS[form]
    code, out, err = autopar(command, *words.split(), *COMMANDS[command].split())
    assert code == 0, err
    first = out.splitlines()[0]
    said = "" if command == "export" and "put on" in said else said  # what is exported returns what the model returns
    assert said in first and (not said or first.startswith(f"{words.split()[0]}: ")), first
    document = autopar(command, *words.split(), *COMMANDS[command].split(), "--json")[1]
    assert isinstance(json.loads(document), dict), "and nothing is printed before the document"


def test_a_users_file_that_does_not_import_is_no_fault_of_autopar(here: Path) -> None:
    (here / "broken_net.py").write_text("import torch\n\nmodel = torch.nn.Linaer(3, 2)\n")
    for command, more in COMMANDS.items():
        code, out, err = autopar(command, "broken_net.py:model", *more.split())
        assert code == 2 and "line 3: model = torch.nn.Linaer(3, 2)" in err and "Traceback" not in err, err
        assert len(err.splitlines()) < 15 and not out
    assert {path.name for path in here.iterdir()} <= {"user_net.py", "broken_net.py", "folder", "__pycache__"}


def test_coverage_takes_a_model_of_any_form(here: Path) -> None:
    given = ["user_net.py:Net", "--input", "x=Bx8", "--mesh", "dp=2"]
    code, out, err = autopar("coverage", *given, "--json")
    assert code == 0, err
    (row,) = json.loads(out)["architectures"]
    assert row["name"] == "user_net.py:Net" and row["family"] == "of the user" and row["outcomes"][0]["passed"]
    code, _, err = autopar("coverage", "user_net.py:Nett")
    assert code == 2 and "did you mean 'Net'" in err
