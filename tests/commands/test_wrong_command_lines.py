"""Wrong command lines: exit code 2, a few lines with a way out, no traceback, nothing left in the working directory."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from autopar.__main__ import main
from tests.selection import slow_but
from tests.zoo.test_forms import NET

MOST_LINES = 15
WAYS_OUT = ("Way out: ", "it is one of ", "--help", "requires an argument")

LINES = """\
shw mlp
show
show mlp --mesh
show mlp --mesh dp
show mlp --mesh dp=0
show mlp --mesh dp=two
show mlp --mesh dpp=2
show mlp --mesh dp=2,dp=2
show mlp --mesh cp=2,sp=2
show mlp --mesh dp=2,dp_shard=2
show mlp --mesh sp=2
show mlp --mesh ep=2
show mlp --mesh pp=99 --microbatches 2
show mlp --after nope
show mlp --after
show mlp --rank 9
show mlp --rank -1
show mlp --rank x
show mlp --rank 1 --after trace
show mlp --explain nope
show mlp --module nope.nope
show mlp --grep [
show mlp --grep nothing_like_it
show mlp --timeline
show mlp --timeline-svg no/x.svg --mesh pp=2 --microbatches 2
show mlp --schedule
show mlp --schedule 1f2b --mesh pp=2
show mlp --zero 3 --mesh tp=2
show mlp --zero 9
show mlp --sequence megatron --mesh dp=2
show mlp --precision int8
show mlp --tensor up=row
show mlp --tensor up
show mlp --cuts nope --mesh pp=2 --microbatches 2
show mlp --virtual-stages 0 --mesh pp=2
show mlp --microbatches 0
show mlp --recompute all
show mlp --plan
show mlp --plan nothing.toml
show mlp --plan zeros=1
show mlp --plan zero
show mlp --config layer=2
show mlp --config layers
show mlp --config layers=many
show mlp --batch 0
show mlp --batch x
show mlp --length 0
show llama --length 0
show mlp --length 9
show mlp --seed x
show mlp --task causal-lm
show mlp --input nothing=4x8
show mlp --loss nope
show mlp --expert-load nothing.jsonl
show mlp --expert-placement nothing.jsonl
show mlp --nope
show mlp extra
show llama:llama_7000b
show tiny:
show hf:
show :
show a:b:c
show /
show ..
show ""
show net.py
show net.py:
show net.py:Net
show net.py:nothing
show nothing.py:Net
show broken.py:Net
show net.Net
show torch:nn
show torch.nn:Linear
show meta-llama/Llama-3-70B
show empty
show cfgbad
check mlp --mesh dp=2 --mesh
check llama:llama_8b
compile mlp
compile mlp -o
compile mlp -o net.py
compile mlp -o /proc/x
compile mlp -o full
export mlp -o out --format onix
export mlp
export nothing -o out
export mlp -o out --rank 9
export mlp -o out --weights some
export mlp -o out --weights-from nothing
diff mlp
diff mlp --to-mesh xx=2
diff nothing nothing2
diff mlp --to-plan zeros=1
schedule
schedule 2f2b
schedule 1f1b
schedule 1f1b --stages 0
schedule zb-v --stages 2 --virtual 3
schedule nothing.txt
schedule net.py
mesh
mesh dp
mesh dp=4 --node-size 3
mesh dp=4 --rank 9
run nothing
run empty
run full
run
replay nothing --pass split_batch
replay net.py --pass split_batch
replay net.py --pass nope
replay
coverage gpt3
coverage --family nope
coverage mlp --mesh xx=1
coverage --jobs 0
train nothing
train mlp --mesh 1
train llama --mesh 1
train llama --config vocab=288 --mesh 1 --length 1
train llama --config vocab=288 --mesh 1 --text nothing
train llama --config vocab=288 --mesh 1 --device abacus
train llama --config vocab=288 --mesh 1 --resume
train llama --config vocab=288 --mesh 1 --program nothing
train llama --config vocab=288 --mesh 1 --steps 0
train llama --config vocab=288 --mesh 1 --checkpoint net.py
train llama --config vocab=288 --mesh 1 --accumulate 2 --microbatches 2
train llama --config vocab=288 --mesh 1 --log no/x.jsonl
report nothing -o x.html
report mlp -o no/x.html
export-weights nothing -o out
export-weights
--nope
--dump
show mlp --input x
show torch.nn:Linear --config in_features=8 --config out_features=8""".splitlines()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, one that does not import, a config that is none, and other things."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "broken.py").write_text("import nothing_here\n")
    for name in ("empty", "full", "cfgbad"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "a").write_text("x")
    (tmp_path / "cfgbad" / "config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("net", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("line", slow_but(tuple(range(0, len(LINES), 5)), LINES))
def test_a_wrong_command_line(
    line: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in here.rglob("*") if "__pycache__" not in path.parts)
    monkeypatch.setattr(sys, "argv", ["autopar", *shlex.split(line)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2, err
    assert "Traceback" not in err and len(err.splitlines()) < MOST_LINES, err
    assert any(words in out + err for words in WAYS_OUT), err
    assert sorted(path for path in here.rglob("*") if "__pycache__" not in path.parts) == before


@pytest.mark.parametrize("line", ["show nothing", "mesh dp", "schedule 2f2b", "diff mlp", "run nothing", "--nope"])
def test_as_json(line: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["autopar", *shlex.split(line), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    document = json.loads(out)["error"]
    assert document["exit_code"] == ended.value.code == 2 and document["message"] and document["kind"] and not err


def test_there_are_many() -> None:
    assert len(LINES) == len(set(LINES)) >= 100
