"""Options of Megatron-LM on this command line: each is told what it is here, and the page of flags has them too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autopar.__main__ import main
from autopar.commands.deferred import COMMANDS, Deferred
from autopar.commands.other_systems import MEGATRON, refuse_options_of_others

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
PAGE = Path(__file__).parents[2] / "docs/coming_from.md"
NO_OPTIONS = {  # of Megatron-LM: in the page only, where it says that there is none, or a line of a script
    "--num-distributed-optimizer-instances", "--untie-embeddings-and-output-weights", "--loss-scale", "--eval-iters",
    "--cpu-offloading", "--fp8-format", "--nnodes",
}  # fmt: skip


def options_of(command: str) -> set[str]:
    return {option for parameter in Deferred(command).loaded().params for option in parameter.opts}


def test_no_option_of_ours_is_refused() -> None:
    ours = set().union(*map(options_of, COMMANDS))
    assert len(ours) > 80 and not ours & set(MEGATRON)


def test_what_it_is_here_is_there() -> None:
    named = {option for way in MEGATRON.values() for option in OPTION.findall(way)}
    assert len(named) > 25 and named <= options_of("train")


def test_the_page_and_the_table_have_the_same() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("| Megatron-LM | here |")[2].partition("\n\n")[0]
    theirs = {option for row in table.splitlines() for option in OPTION.findall(row.partition(" | ")[0])}
    assert theirs - NO_OPTIONS <= set(MEGATRON) and theirs >= NO_OPTIONS


def test_the_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["autopar", "train", "tiny:llama", "--tensor-model-parallel-size=2"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "autopar: --tensor-model-parallel-size is an option of Megatron-LM\n"
        "Way out: --mesh tp=N (docs/coming_from.md).\n"
    )


def test_what_is_no_option_passes() -> None:
    refuse_options_of_others(["train", "bf16", "--mesh", "tp=2", "--", "--bf16"])
