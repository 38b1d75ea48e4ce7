"""``autopar mesh``: the groups of each axis, in nodes and across."""

from __future__ import annotations

import json

import pytest

from autopar.commands.split_axes import refuse_split_axes
from tests.command_line import autopar
from tests.commands.test_command_line import Command, autopar_command

__all__ = ["autopar_command"]  # the fixture


def test_the_groups_of_a_mesh(autopar_command: Command) -> None:
    code, printed, _ = autopar_command("mesh", "pp=2,tp=4", "--node-size", "4", "--all")
    assert code == 0 and "8 ranks on 2 nodes of 4" in printed and "\ntp\n  0 1 2 3\n  4 5 6 7\n" in printed
    code, printed, said = autopar_command("mesh", "pp=2,tp=4", "--node-size", "2", "--rank", "5", "--json")
    assert code == 0 and "tp=4 goes from node to node" in said
    assert json.loads(printed)["groups"] == {"pp": [[1, 5]], "tp": [[4, 5, 6, 7]]}
    code, _, said = autopar_command("mesh", "pp=2,tp=3", "--node-size", "4")
    assert code == 2 and "nodes of 4 do not divide" in said


@pytest.mark.parametrize("words, said", [
    ("mesh dp=2 tp=2", "Way out: dp=2,tp=2"),
    ("mesh pp=2, dp=2 tp=2", "Way out: pp=2,dp=2,tp=2"),
    ("show mlp --mesh dp=2 tp=2 --zero 1", "Way out: dp=2,tp=2"),
    ("show mlp --mesh=dp=2,sp=1 tp=2", "Way out: --mesh=dp=2,sp=1,tp=2"),
])  # fmt: skip
def test_axes_that_are_several_words(words: str, said: str) -> None:
    code, _, err = autopar(*words.split())
    assert code == 2 and "one word" in err and said in err


def test_axes_of_several_options() -> None:
    refuse_split_axes(["diff", "mlp", "--mesh", "dp=2", "--to-mesh", "tp=2", "--", "dp=2", "tp=2"])
