"""The table of other systems: what stands in it where one cannot be measured, and a short run of it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from torch import nn

from benchmarks import deepspeed_parallel, peers


def test_a_peer_that_is_not_installed_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_parallel.importlib.util, "find_spec", lambda name: None)
    setting = peers.Setting(peers.SUBJECTS["hf-llama-128"], "sgd", 2)
    with pytest.raises(RuntimeError, match="DeepSpeed is not installed .pip install") as caught:
        peers.FORMS["zero2"].peers["DeepSpeed ZeRO-2"](setting, nn.Linear(1, 1))
    row = peers.Row("0.5M", 2, "zero2", "DeepSpeed ZeRO-2", why=str(caught.value))
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(peers._table([row], "sgd"))
    assert "DeepSpeed is not installed" in console.export_text()


def test_sizes_are_what_they_are_called() -> None:
    for name, millions in (("0.5M", 0.5), ("14M", 14)):
        model = peers.SUBJECTS[peers.SIZES[name]].build()
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.1), name


@pytest.mark.slow
def test_a_short_run(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    forms = ["zero0", "zero2", "zero3", "tp", "pp"]
    given = ["--size", "0.5M", "--ranks", "2", "--form", *forms, "--steps", "2", "--warm-up", "1", "--json"]
    assert peers.main(given) == 0
    out = capfd.readouterr().out
    rows = [peers.Row(**row) for row in json.loads(out[out.index("[\n") :])]
    assert [row.peer for row in rows] == [peer for form in forms for peer in peers.FORMS[form].peers]
    for row in rows:
        assert row.wall or (row.peer.startswith("DeepSpeed") and "DeepSpeed is not installed" in row.why), row
        assert row.loss_difference <= 1e-4, row
