"""What fits: closed forms are near programs of two depths, these near the whole model; reasons for the rest."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from autopar.__main__ import main
from autopar.analysis.footprint import sent
from autopar.compiler import compile_program
from autopar.fitting.counted import compiled, counted, few_microbatches
from autopar.fitting.estimate import Estimate, estimate
from autopar.fitting.fit import Fitting, fits, guesses, in_words
from autopar.fitting.meshes import AXES, Model, Refused, Wanted, impossible, meshes, read_axes, tried_axes
from autopar.fitting.prices import ROWS, Price, Prices, rows_of
from autopar.fitting.shallow import depth_of, shallow
from autopar.fitting.weights import settled
from autopar.memory.device import Device
from autopar.memory.table import memory_of
from autopar.mesh import Mesh, axes_of
from autopar.models import llama
from autopar.plan import Plan
from autopar.zoo.named import named_model
from tests.selection import slow_but

BLOCKS, OPTIMIZER = 6, "adamw"


@cache
def prices() -> Prices:
    model = llama.build("tiny", layers=BLOCKS)
    batch = llama.example_batch(model, ROWS, 32, 0)
    return Prices(model, lambda rows: rows_of(batch, rows), Plan())


def wanted(devices: int, memory: int = 10**12, rows: int = 8, node_size: int = 8) -> Wanted:
    device = Device(memory, fixed=0, share=0.0)
    return Wanted(devices, node_size, rows, OPTIMIZER, device, Plan(), frozenset({"zero", "recompute", "sequence"}))


def found_of(sought: Wanted) -> tuple[list[Fitting], list[Refused]]:
    every = list(fits(prices(), sought))
    return [one for one in every if isinstance(one, Fitting)], [one for one in every if isinstance(one, Refused)]


def estimated(mesh: Mesh, rows: int = 1, **choices: Any) -> Estimate:
    plan = Plan(**choices)
    price = prices().of(mesh, plan)
    assert isinstance(price, Price), price
    return estimate(mesh, plan, rows, price, BLOCKS, OPTIMIZER, 8)


def test_a_shallow_model_is_the_model_with_fewer_blocks() -> None:
    model = llama.build("tiny", layers=BLOCKS)
    depth = depth_of(model)
    assert depth.blocks == BLOCKS
    short = shallow(model, depth, 2)
    assert depth_of(model).blocks == BLOCKS and len(list(short.get_submodule(depth.name).children())) == 2
    names = {name for name, _ in short.named_parameters()}
    assert names < {name for name, _ in model.named_parameters()}
    batch = llama.example_batch(model, 2, 8, 0)
    assert torch.isfinite(short(**batch)["loss"] if isinstance(short(**batch), dict) else short(**batch)[0]).all()


MESHES: list[tuple[Mesh, dict[str, Any]]] = [
    (Mesh(dp=2, tp=2), {"zero": 3}),
    (Mesh(pp=2, dp=2), {"microbatches": 4}),
    (Mesh(dp=4), {"zero": 1, "recompute": "full"}),
    (Mesh(tp=2), {"sequence": "megatron", "recompute": "selective"}),
    (Mesh(pp=3, tp=2), {"microbatches": 3}),
    (Mesh(sp=2, tp=2), {"microbatches": 2}),
    (Mesh(dp=2, sp=2), {"microbatches": 2, "zero": 1}),
]


@pytest.mark.parametrize(("mesh", "choices"), slow_but((1,), MESHES), ids=str)
def test_two_depths_tell_the_memory_of_the_whole_model(mesh: Mesh, choices: dict[str, Any]) -> None:
    one = estimated(mesh, **choices)
    found = counted(one, prices())
    assert isinstance(found, Estimate) and found.compiled
    batch = prices().batch_of(mesh.size("dp") * (one.plan.microbatches if mesh.is_pipelined else 1))
    whole = compile_program(prices().model, mesh, replace(one.plan, check_numerics=False), (), batch)
    exact = memory_of(whole, OPTIMIZER).largest.peak
    assert found.memory == pytest.approx(exact, rel=0.02)
    assert one.memory == pytest.approx(exact, rel=0.25)
    middle = mesh.world_size // 2 if whole.mesh.is_pipelined else 0
    moved = {axis: sum(t.bytes for t in sent(whole, middle) if t.axis == axis) for axis in found.sent}
    assert {axis for axis, size in mesh.axes if size > 1} == {axis for group in moved for axis in axes_of(group)}
    for axis, size in moved.items():
        near = pytest.approx(size, rel=0.1) if mesh.size("tp") > 1 else size  # see test_agreement
        assert found.sent[axis] == near, (axis, found.sent, moved)


SCHEDULES = ["1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"]


@pytest.mark.parametrize("schedule", slow_but((0,), SCHEDULES), ids=str)
def test_the_peak_is_that_of_fewer_microbatches_unless_all_are_in_flight(schedule: str) -> None:
    plan = Plan(schedule=schedule, microbatches=16, check_numerics=False)
    program = compile_program(llama.build("tiny", layers=4), Mesh(pp=2), plan, (), prices().batch_of(16))
    fewer = few_microbatches(program)
    assert fewer.plan.microbatches == {"gpipe": 16, "1f1b": 6, "zb-h1": 6}.get(schedule, 12)
    peaks = [[rank.peak for rank in memory_of(one, OPTIMIZER).ranks] for one in (program, fewer)]
    assert peaks[0] == peaks[1]


def test_guesses_come_before_any_way_to_split_layers_is_priced() -> None:
    model = llama.build("tiny", layers=BLOCKS)
    fresh = Prices(model, prices().batch_of, Plan())
    sought = wanted(2)
    guessed = guesses(fresh, sought)
    assert {key[0] for key in fresh._known} == {Mesh().axes}
    fitting, _ = found_of(sought)
    assert {one.mesh.axes for one in guessed} == {one.mesh.axes for one in fitting}
    assert [one.seconds for one in guessed] == sorted(one.seconds for one in guessed)
    whole = next(one for one in guessed if one.mesh.axes == Mesh(dp=2).axes)
    priced = next(one for one in fitting if one.mesh.axes == Mesh(dp=2).axes)
    assert whole.memory == priced.best.memory  # nothing is divided there, so that the guess is the price


def mixture(balance: float) -> Prices:
    example = named_model("moe", {"layers": 2, "balance": balance}, ROWS, 8)
    return Prices(example.model, lambda rows: rows_of(example.batch, rows), Plan())


def test_microbatches_of_a_loss_that_is_no_sum_are_weighed_by_their_own_statistics() -> None:
    sought = replace(wanted(2), fixed=frozenset({"zero", "recompute", "sequence"}), axes=("dp",))
    assert settled(mixture(0.0), sought) == (sought, ())
    balanced = mixture(0.01)
    chosen, (line,) = settled(balanced, sought)
    assert chosen.plan.microbatch_weights == "statistics" and "microbatch_weights=statistics" in line
    assert settled(balanced, replace(sought, fixed=sought.fixed | {"microbatch_weights"}))[0].plan == sought.plan
    one = next(found for found in fits(balanced, chosen) if isinstance(found, Fitting))
    several = next(plan for plan in one.plans if plan.plan.microbatches > 1)
    assert "microbatch_weights=statistics" in in_words(several)
    assert isinstance(counted(several, balanced), Estimate)
    exact = replace(several, plan=replace(several.plan, microbatch_weights="exact"))
    refused = counted(exact, balanced)
    assert isinstance(refused, Refused) and 'Plan(microbatch_weights="statistics")' in refused.why


def test_an_optimizer_of_whole_parameters_gets_no_mesh_that_splits_them() -> None:
    sought = replace(wanted(4), optimizer="adafactor", fixed=frozenset({"recompute", "sequence"}))
    fitting, refused = found_of(sought)
    assert {one.mesh.axes for one in fitting} == {Mesh(dp=4).axes, Mesh(pp=2, dp=2).axes, Mesh(pp=4).axes}
    assert all(plan.plan.zero == 0 for one in fitting for plan in one.plans)
    assert all("cannot update split parameters" in one.why for one in refused)
    found = counted(next(one for one in fitting if one.mesh.axes == Mesh(dp=4).axes).best, prices())
    assert isinstance(found, Estimate)


def test_every_mesh_fits_or_says_why() -> None:
    sought = wanted(6, rows=8, node_size=2)
    found, refused = found_of(sought)
    every = {mesh.axes for mesh in meshes(sought, ("pp", "dp", "tp"))}
    assert {one.mesh.axes for one in [*found, *refused]} == every
    why = {one.mesh.axes: one.why for one in refused}
    assert "batch: 8 rows do not divide by dp=3" in why[Mesh(dp=3, tp=2).axes]
    assert "beyond a node of 2" in why[Mesh(tp=6).axes]
    for one in found:
        assert [plan.seconds for plan in one.plans] == sorted(plan.seconds for plan in one.plans)


def test_heads_and_layers_are_reasons() -> None:
    _, refused = found_of(wanted(7, rows=7))
    why = {one.mesh.axes: one.why for one in refused}
    assert "layers: 6 for pp=7 stages" in why[Mesh(pp=7).axes]
    assert "tp=7" in why[Mesh(tp=7).axes] and "heads" in why[Mesh(tp=7).axes]


def test_axes_are_those_that_help_and_the_others_are_said() -> None:
    dense, mixture = Model(6, 0), Model(6, 8)
    short, long = replace(wanted(8), length=1024), replace(wanted(8), length=131072)
    assert tried_axes(dense, short)[0] == ("pp", "dp", "tp") and "sp is not tried" in tried_axes(dense, short)[1][0]
    assert tried_axes(mixture, long) == (AXES, ())
    asked = replace(short, axes=read_axes("tp,sp"))
    assert tried_axes(dense, asked) == (("sp", "tp"), ())
    assert Mesh(ep=2, sp=2, tp=2).axes in {mesh.axes for mesh in meshes(long, AXES)}
    with pytest.raises(ValueError, match="--axes pp,dp,tp"):
        read_axes("cp")


def test_experts_and_lengths_are_reasons() -> None:
    dense, mixture, sought = Model(6, 0), Model(6, 6), replace(wanted(8), length=16384)
    assert "none for ep=2" in str(impossible(Mesh(ep=2), dense, sought))
    assert "6 do not divide by ep=4" in str(impossible(Mesh(ep=4), mixture, sought))
    assert "2,048 tokens" in str(impossible(Mesh(sp=8), dense, sought))
    assert impossible(Mesh(sp=8), dense, replace(sought, axes=("sp",))) is None
    assert "do not divide by sp=3" in str(impossible(Mesh(sp=3), dense, sought))
    assert "dp=4 x ep=6" in str(impossible(Mesh(dp=4, ep=6), mixture, sought))


def test_memory_is_a_reason_with_the_bytes() -> None:
    found, refused = found_of(wanted(2, memory=1000))
    assert not found and all("too much" in one.why for one in refused)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_after_all_gives_way_to_the_next() -> None:
    plans = (estimated(Mesh(dp=2)), estimated(Mesh(dp=2), zero=3, recompute="full"))
    real = counted(plans[0], prices())
    assert isinstance(real, Estimate)
    tight = wanted(2, memory=real.memory - 1)
    optimistic = replace(plans[0], memory=plans[1].memory)
    found = compiled(Fitting(Mesh(dp=2), (optimistic, plans[1])), prices(), tight)
    assert isinstance(found, Refused) or found.plan.zero == 3


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = "autopar fit llama --config layers=4 --gpus 2 --batch 4 --length 16 --shown 1 --json"
    chosen = "--zero 0 --recompute none --sequence none"
    monkeypatch.setattr(sys, "argv", f"{command} {chosen}".split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    document = json.loads(capsys.readouterr().out)
    assert {tuple(one["mesh"]) for one in document["fits"]} == {("dp",), ("tp",), ("pp",)}
    assert document["fits"][0]["compiled"] and all(one["plan"]["zero"] == 0 for one in document["fits"])
