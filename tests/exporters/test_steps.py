"""Steps as formats of ``autopar.export``: the files of the room of traces, listed in the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import autopar
from autopar.program_files.program_file import load, save
from autopar.traces.chakra import write_chakra
from tests.traces.programs import compiled


def test_chakra_and_trace_of_a_program_on_disk(tmp_path: Path) -> None:
    """What is written of a loaded program is what is written of the program itself."""
    program = compiled("pipeline with ZeRO-1")
    save(program, tmp_path / "program")
    autopar.export(load(tmp_path / "program"), tmp_path / "out", "chakra,trace")
    formats = json.loads((tmp_path / "out/manifest.json").read_text())["formats"]
    assert [entry["rank"] for entry in formats["chakra"]["ranks"]] == [0, 1, 2, 3]
    (tmp_path / "direct").mkdir()
    write_chakra(program, tmp_path / "direct")
    for name in (formats["chakra"]["groups"], *(entry["file"] for entry in formats["chakra"]["ranks"])):
        assert (tmp_path / "out/chakra" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    whole = json.loads((tmp_path / "out/trace" / formats["trace"]["all"]).read_text())
    assert {event["pid"] for event in whole["traceEvents"]} == {0, 1, 2, 3}
    assert all((tmp_path / "out/trace" / name).is_file() for name in formats["trace"]["ranks"])


def test_of_one_rank(tmp_path: Path) -> None:
    autopar.export(compiled("three stages"), tmp_path / "out", ["trace", "chakra"], rank=5)
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    traces = {"trace/step.json", "trace/ranks/rank5.json"}
    assert files == {"manifest.json", "chakra/comm_groups.json", "chakra/step.5.et", *traces}
