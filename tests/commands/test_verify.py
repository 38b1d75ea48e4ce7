"""``autopar verify``: exit codes, JSON, layers, several meshes, and a program on disk that was edited as text."""

from __future__ import annotations

import json
import re
from pathlib import Path

from autopar.program_files import directory
from tests.command_line import autopar

SMALL = ["mlp", "--batch", "8"]
QUICK = ["--layer", "structure", "--layer", "relations"]


def test_several_meshes_as_json() -> None:
    code, out, _ = autopar("verify", *SMALL, "--mesh", "dp=2", "--mesh", "tp=2", *QUICK, "--json")
    shown = json.loads(out)
    assert code == 0 and shown["model"] == "mlp"
    assert [proof["mesh"] for proof in shown["proofs"]] == [{"dp": 2}, {"tp": 2}]
    assert [row["layer"] for row in shown["proofs"][0]["layers"]] == ["structure", "relations"]


def test_wrong_choices() -> None:
    code, _, err = autopar("verify", *SMALL, "--layer", "types")
    assert code not in (0, 1) and "layer 'types' is unknown" in err


def count_labels_of_the_busiest_rank(folder: Path) -> None:
    """Change the text of the forward pass, and the checksums that say that nobody has."""
    file, manifest = folder / "program.txt", folder / "manifest.json"
    before, mark, forward = file.read_text().partition("\nforward:\n")
    changed = re.sub(r"comm\.all_reduce\((\w+), dp\)", r"comm.all_reduce(\1, dp, op=max)", forward, count=1)
    assert changed != forward
    file.write_text(before + mark + changed)
    found = json.loads(manifest.read_text())
    found["files"][file.name] = directory.entry(file.read_bytes())
    found["sha256"] = directory.checksum(found)
    manifest.write_text(json.dumps(found))


def test_a_program_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert autopar("compile", *SMALL, "--mesh", "dp=2", "-o", str(folder))[0] == 0
    stored = ["verify", *SMALL, "--program", str(folder), *QUICK]
    code, out, _ = autopar(*stored)
    assert code == 0 and "mesh(dp=2): proved in" in out
    assert "has its own mesh" in autopar(*stored, "--mesh", "dp=2")[2]
    count_labels_of_the_busiest_rank(folder)
    code, out, _ = autopar(*stored)
    assert code == 0, out  # the same on all ranks: only the layers that compute see another count of labels
    code, out, _ = autopar(*stored[:-4], "--layer", "field", "--json")
    (proof,) = json.loads(out)["proofs"]
    assert code == 1 and not proof["proved"] and proof["layers"][0]["refusals"]


def test_what_is_no_program_of_this_model(tmp_path: Path) -> None:
    """One or two lines and exit code 2 for what cannot be tried, 1 for a program of another model or batch."""
    folder, file = tmp_path / "out", tmp_path / "file"
    file.write_text("no program")
    assert autopar("compile", *SMALL, "--mesh", "dp=2", "-o", str(folder))[0] == 0
    for arguments, words in (
        (["--program", str(file)], "it is a file"),
        (["--program", str(tmp_path / "none")], "it is not there"),
        (["--program", str(folder), "--zero", "3"], "has its own plan"),
        (["--program", str(folder), "--reduced"], "at its own sizes"),
        (["--mesh", "xp=2"], "mesh axis 'xp' is unknown"),
        (["--mesh", "dp=0"], "a whole number, at least 1"),
    ):
        code, out, err = autopar("verify", *SMALL, *QUICK, *arguments)
        assert code == 2 and words in err and "Way out: " in err and err.count("\n") <= 2 and not out, err
    code, out, _ = autopar("verify", "mlp", "--batch", "8", "--mesh", "xp=2", "--json")
    assert code == 2 and json.loads(out)["error"]["exit_code"] == 2
    program = ["--program", str(folder), *QUICK]
    code, out, _ = autopar("verify", "mlp", "--batch", "16", *program)
    assert code == 1 and "the call has [16, 48]" in out
    code, out, _ = autopar("verify", "tiny:gpt2", *program, "--json")
    (refusal,) = json.loads(out)["proofs"][0]["layers"][0]["refusals"]
    assert code == 1 and "the model has none of that name" in refusal["problem"]
