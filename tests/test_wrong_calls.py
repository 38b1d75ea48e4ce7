"""Mistakes in calls of the API: each is told in a few lines, with a way out, and never as a traceback from inside.

Python's own errors of a call (an argument that is missing, one that there is not) stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import AutoparError, Mesh, Plan, Precision
from autopar.check import check
from tests.selection import slow_but

MOST_LINES = 15
PYTHONS = ("required positional argument", "unexpected keyword argument", "required argument", "positional arguments")

CALLS = """\
Mesh(dp=0)
Mesh(dp=-2)
Mesh(dp=2.0)
Mesh(dp="2")
Mesh(dp=True)
Mesh(dp=None)
Mesh(ddp=2)
Mesh(data=2)
Mesh(2, 2)
Mesh("dp=2")
Mesh({"dp": 2})
Mesh(dp=2, dp_shard=2)
Mesh(cp=2, sp=2)
Mesh(dp=4, node_size=3)
Mesh(dp=4, node_size=0)
Mesh(dp=4, node_size="8")
Mesh.parse("dp")
Mesh.parse("dp=two")
Mesh.parse("dp=2,dp=2")
Mesh.parse("dp:2")
Mesh.parse(4)
Mesh(dp=2).size("ddp")
Mesh(dp=2).coordinates(2)
Mesh(dp=2).coordinates(-1)
Plan(3)
Plan({"zero": 3})
Plan(zeros=3)
Plan(zero=4)
Plan(zero="3")
Plan(zero=True)
Plan(sequence="megatronn")
Plan(sequence=True)
Plan(attention="flash")
Plan(expert_axes="dp")
Plan(expert_placement={"a": [0, 0]})
Plan(expert_placement={"a": "01"})
Plan(expert_placement=[0, 1])
Plan(record_load=1)
Plan(capacity_factor=0)
Plan(capacity_factor="1")
Plan(reshard_after_forward=None)
Plan(recompute="all")
Plan(recompute=2)
Plan(recompute=True)
Plan(precision="bf61")
Plan(precision=torch.int8)
Plan(precision=Precision(torch.int8))
Plan(precision=16)
Plan(microbatches=0)
Plan(microbatches=2.0)
Plan(microbatches="4")
Plan(microbatch_weights="mean")
Plan(schedule="1f2b")
Plan(schedule=None)
Plan(schedule="zb-v", virtual_stages=3)
Plan(virtual_stages=0)
Plan(tensor=["a"])
Plan(tensor={"a": "col"})
Plan(tensor={"a": 1})
Plan(tensor={1: "row"})
Plan(tensor="row")
Plan(inputs="Local")
Plan(batch_dims=0)
Plan(batch_dims={"x": "0"})
Plan(batch_dims=["x"])
Plan(sequence_dims={"x": 1.0})
Plan(sequence_dims="x")
Plan(outputs="all")
Plan(on_unknown="warn")
Plan(on_indivisible="pad")
Plan(check_numerics="yes")
Plan(bucket_mb=-1)
Plan(bucket_mb="25")
Plan(overlap_mb=float("inf"))
Plan(seed=1.5)
Plan(initial="rank1")
Plan(cuts="layers.1")
Plan(cuts=3)
Plan(cuts=(3,))
Plan(stage_memory_gb=0)
Plan(timeout=0)
Plan(timeout="5")
Plan.from_json({"zeros": 3})
Plan.from_json({"precision": "int8"})
Plan.from_json([1])
Plan.from_json({"precision": 3})
Plan.from_json({"precision": {"paran": "bf16"}})
Plan.from_file("nothing.toml")
Plan.from_tp_plan(["a"])
Precision("bf17")
Precision(param=3)
Precision(params="bf16")
parallelize()
parallelize(net)
parallelize(Net, Mesh(dp=1))
parallelize(3, Mesh(dp=1))
parallelize(None, Mesh(dp=1))
parallelize(net, {"dp": 1})
parallelize(net, "dp=1")
parallelize(net, 1)
parallelize(net, None)
parallelize(net, Mesh(dp=1), {"zero": 3})
parallelize(net, Mesh(dp=1), "zero3")
parallelize(net, Mesh(dp=1), zero=3)
parallelize(net, Mesh(dp=1), Plan(zero=3), example_inputs=x)
parallelize(net, Mesh(dp=1), example_inputs=3)
parallelize(net, Mesh(dp=1), example_inputs=())
parallelize(net, Mesh(dp=1), example_inputs=(torch.randn(4, 9),))
parallelize(net, Mesh(dp=1), example_inputs={"y": x})
parallelize(net, Mesh(dp=1), example_inputs=(x, 3))
parallelize(net, Mesh(tp=1), Plan(zero=3))
parallelize(net, Mesh(dp=1), Plan(sequence="megatron"))
parallelize(net, Mesh(dp=1), program="nothing")
parallelize(net, Mesh(dp=2))(x)
parallelize(net, Mesh(dp=1))(torch.randn(4, 9))
parallelize(net, Mesh(dp=1))()
parallelize(net, Mesh(dp=1))(y=x)
parallelize(net, Mesh(dp=1)).train_step()
parallelize(without_loss, Mesh(dp=1)).train_step(x)
parallelize(net, Mesh(dp=1)).nothing
parallelize(parallelize(net, Mesh(dp=1)), Mesh(dp=1))
compile_program(net)
compile_program(net, Mesh(dp=2))
compile_program(net, Mesh(dp=2), None)
compile_program(net, Mesh(dp=2), None, (torch.randn(4, 9),))
compile_program(net, Mesh(dp=2), None, x)
compile_program(net, Mesh(dp=2), "zero3", (x,))
compile_program(net, "dp=2", None, (x,))
compile_program(3, Mesh(dp=2), None, (x,))
compile_program(net, Mesh(sp=2), None, (x,))
compile_program(net, Mesh(ep=2), None, (x,))
compile_program(net, Mesh(pp=9), Plan(microbatches=9), (torch.randn(18, 8),))
compile_program(net, Mesh(pp=2), Plan(microbatches=3), (x,))
compile_program(net, Mesh(pp=2), Plan(cuts=("nope",), microbatches=2), (x,))
compile_program(net, Mesh(pp=2), Plan(stage_memory_gb=1e-9, microbatches=2), (x,))
compile_program(net, Mesh(tp=2), Plan(tensor={"upp.*": "row"}), (x,))
compile_program(net, Mesh(dp=2), Plan(batch_dims={"y": 0}), (x,))
compile_program(net, Mesh(dp=2), Plan(batch_dims={"x": 5}), (x,))
compile_program(net, Mesh(dp=2), None, (), {"y": x})
compile_program(net, Mesh(dp=2), None, ("text",))
compile_program(broken, Mesh(dp=2), None, (x,))
program.rank(2)
program.rank("0")
program.explain("nothing")
program.save("/proc/nothing/x")
autopar.Program.load("nothing")
autopar.diff(program, 3)
autopar.diff("a", "b")
autopar.export(program, "here", "onix")
autopar.export(program, "here", weights="some")
autopar.export(program, "here", rank=7)
autopar.export(3, "here")
autopar.load_safetensors(net, "nothing.safetensors")
autopar.register_rule("nothing", "a -> a")
autopar.register_rule("nolib::nothing", "a -> a")
autopar.TokenFile("nothing.bin")
autopar.part_of_batch({"x": x}, "dp=2")
autopar.part_of_batch(3, Mesh(dp=2), Plan())
autopar.balanced_placement(3)
autopar.paralelize
autopar.Mash(dp=2)
check(net, 3, Mesh(dp=2))
check(net, {"x": x}, "dp=2")""".splitlines()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).square().mean()  # type: ignore[no-any-return]


class WithoutLoss(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())  # type: ignore[no-any-return]


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.missing(x)  # type: ignore[no-any-return]


def names(call: str) -> dict[str, Any]:
    """What a call may use."""
    found: dict[str, Any] = {"autopar": autopar, "torch": torch, "check": check, "x": torch.randn(4, 8)}
    found |= {"Mesh": Mesh, "Plan": Plan, "Precision": Precision, "Net": Net}
    found |= {"parallelize": autopar.parallelize, "compile_program": autopar.compile_program}
    found |= {"net": Net(), "without_loss": WithoutLoss(), "broken": Broken()}
    if "program." in call or "(program" in call:
        found["program"] = autopar.compile_program(Net(), Mesh(dp=2), None, (torch.randn(4, 8),))
    return found


@pytest.mark.parametrize("call", slow_but(tuple(range(0, len(CALLS), 4)), CALLS))
def test_a_wrong_call(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AutoparError, ValueError, TypeError, AttributeError)) as caught:
        eval(call, names(call))
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert len(said.splitlines()) < MOST_LINES, said
    if isinstance(caught.value, TypeError):
        assert any(words in said for words in PYTHONS), said
    elif isinstance(caught.value, AttributeError):
        assert "has no attribute" in said
    else:
        assert any(words in said for words in ("Way out: ", "one of ", "did you mean")), said
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_there_are_many() -> None:
    assert len(CALLS) == len(set(CALLS)) >= 150
