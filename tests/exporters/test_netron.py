"""The files of ranks open in netron, by its own reader. Needs node, and the package netron, which has that reader."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from autopar import Mesh
from autopar.exporters.export import export

pytest.importorskip("onnx")
FOUND = importlib.util.find_spec("netron")
NODE = shutil.which("node")


def shown(file: Path, room: Path) -> dict[str, Any]:
    """What netron shows of a file. ``room``: where its reader is copied to, as modules."""
    assert FOUND is not None and FOUND.origin is not None and NODE is not None
    shutil.copytree(Path(FOUND.origin).parent, room, dirs_exist_ok=True)
    (room / "package.json").write_text('{"type": "module"}')
    shutil.copy(Path(__file__).with_name("netron.mjs"), room)
    done = subprocess.run([NODE, "netron.mjs", str(file)], cwd=room, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.skipif(FOUND is None or NODE is None, reason="needs node, and pip install netron")
def test_ranks_open_in_netron(tmp_path: Path) -> None:
    from tests.exporters.small_network import network

    program, model = network(Mesh(tp=2), source=True)
    for dialect, operator in (("autopar", "autopar.collective.AllReduce"), ("tensorrt", ".DistCollective")):
        export(program, tmp_path / dialect, "onnx", weights_from=model, onnx_dialect=dialect)
        found = shown(tmp_path / dialect / "onnx" / "rank1.onnx", tmp_path / "netron")
        assert (found["inputs"], found["outputs"]) == (["ids", "labels"], ["loss", "logits"])
        assert any(name.endswith(operator) for name in found["operators"])
    found = shown(tmp_path / "autopar" / "onnx" / "logical.onnx", tmp_path / "netron")
    assert found["format"] == "ONNX v11" and found["outputs"] == ["loss", "logits"]
