"""``autopar compile --to-length``: a family of programs on disk; ``show`` says what it holds, ``export`` takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import autopar
from autopar.zoo.named import named_model
from tests.commands.test_command_line import Command, autopar_command  # noqa: F401

CONFIG = {"layers": 1, "context": 128}
GPT = ["gpt", *(text for key, value in CONFIG.items() for text in ("--config", f"{key}={value}"))]


@pytest.mark.slow
def test_a_family_by_command_is_the_one_of_its_batches(
    autopar_command: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    mesh = autopar.Mesh(dp=2)
    sizes = ["--batch", "4", "--length", "16", "--to-length", "32", "--to-batch", "8"]
    code, out, err = autopar_command("compile", *GPT, "--mesh", "dp=2", *sizes, "-o", "out", "--json")
    assert code == 0, err
    family = autopar.load_family(tmp_path / "out")
    assert json.loads(out)["family"]["compiled"] == [dict(point) for point in family.points]
    for batch, length in ((4, 16), (8, 32), (4, 32), (6, 16)):
        assert {"b": batch, "s": length} in family
        example = named_model("gpt", CONFIG, batch, length, 0, 2)
        of_this = autopar.compile_program(example.model, mesh, None, (), example.batch)
        assert str(family.member({"b": batch, "s": length})) == str(of_this)

    code, out, err = autopar_command("show", "out")
    assert code == 0, err
    assert f"batches of {family}" in out and "b=4, s=16" in out and "f32[b@dp,s,48]" in out
    code, out, err = autopar_command("show", "out", "--after", "trace")
    assert code == 2 and "the finished program alone" in err

    code, out, err = autopar_command("export", "out", "-o", "exported", "--format", "pt2")
    assert code == 0, err
    manifest = json.loads((tmp_path / "exported" / "manifest.json").read_text())
    assert set(manifest["sizes"]) == {"b", "s"}


def test_a_batch_without_that_size_is_refused(autopar_command: Command) -> None:  # noqa: F811
    code, _, err = autopar_command("compile", "mlp", "--mesh", "dp=2", "--batch", "4", "--to-batch", "4", "-o", "out")
    assert code == 2 and "--to-batch: the batch of mlp is the same for it" in err
