"""Loads of experts: counted, put together, balanced; and experts that lie where the plan places them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autopar
from autopar import Mesh, Plan
from autopar.check import Reference, Report
from autopar.commands.expert_loads import loads_json, read_loads
from autopar.errors import IndivisibleError, InvariantError
from autopar.ir.layout import Factor, Layout, shard, unshard
from autopar.ir.load import ExpertLoad
from autopar.ir.parse import parse
from autopar.models import moe
from autopar.routing.placement import balanced_placement, imbalance
from tests.selection import slow_but

LAYER = "blocks.{}.moe.experts"


@cache
def reference() -> Reference:
    torch.manual_seed(0)
    model = moe.build("tiny", balance=0.02)
    return Reference(model, moe.example_batch(model, 12))


def checked(mesh: str, **choices: Any) -> Report:
    report = reference().check(Mesh.parse(mesh), Plan(record_load=True, **choices))
    assert report.worst <= 1e-12, report.worst
    return report


def chosen() -> list[list[int]]:
    """How often each expert of each layer is chosen, counted in the unmodified model."""
    found: list[list[int]] = []
    model = reference().model

    def note(module: Any, given: tuple[Tensor, ...]) -> None:
        scores = module.router(given[0].reshape(-1, given[0].shape[-1])).softmax(-1)
        found.append(scores.topk(module.top_k, -1)[1].flatten().bincount(minlength=12).tolist())

    hooks = [block.moe.register_forward_pre_hook(note) for block in model.blocks]
    with torch.no_grad():
        model(**reference().batch)
    for hook in hooks:
        hook.remove()
    return found


MESHES: list[tuple[str, dict[str, Any], int]] = [
    ("ep=2", {}, 2),
    ("ep=4", {}, 4),
    ("dp=2,ep=3", {"zero": 1}, 6),
    ("ep=2,tp=2", {}, 4),
    ("ep=2,tp=2", {"expert_axes": "ep"}, 2),  # both ranks of tp see the same rows: they count once
    ("ep=2,sp=2", {"expert_axes": "ep"}, 4),
    ("dp=2,ep=2,sp=2", {"expert_axes": "ep+sp", "zero": 3}, 8),
]


@pytest.mark.parametrize(("mesh", "choices", "ranks"), MESHES, ids=[f"{mesh}-{len(c)}" for mesh, c, _ in MESHES])
def test_the_load_is_that_of_the_whole_batch(mesh: str, choices: dict[str, Any], ranks: int) -> None:
    loads = checked(mesh, **choices).step.expert_load
    for number, counts in enumerate(chosen()):
        load = loads[LAYER.format(number)]
        assert list(load.experts) == counts and load.lost == 0
        assert len(load.ranks) == ranks and sum(load.ranks) == sum(counts)
        assert load.imbalance == max(load.ranks) * ranks / sum(counts)


@pytest.mark.parametrize(
    ("mesh", "choices", "ranks"), slow_but([2, 4, 5], MESHES), ids=[f"{mesh}-{len(c)}" for mesh, c, _ in MESHES]
)
def test_placed_experts_compute_the_same_on_other_ranks(mesh: str, choices: dict[str, Any], ranks: int) -> None:
    before = checked(mesh, **choices).step.expert_load
    placement = balanced_placement(before)
    report = checked(mesh, expert_placement=placement, **choices)
    for layer, load in report.step.expert_load.items():
        assert load.experts == before[layer].experts, "routing does not change"
        if ranks == load.ways:  # of one group: what was predicted
            assert load.imbalance == pytest.approx(imbalance(before[layer], placement[layer]))
            assert load.imbalance <= before[layer].imbalance
    text = str(report.program)
    assert "<" in text and str(parse(text)) == text


def test_nothing_is_counted_unless_asked() -> None:
    report = reference().check(Mesh(ep=2), Plan())
    assert not report.step.expert_load and "tally" not in str(report.program)
    parallel = autopar.parallelize(moe.build("tiny"), Mesh(ep=2))
    with pytest.raises(InvariantError, match="Way out: Plan\\(record_load=True\\)"):
        parallel.expert_load()


# ---------------------------------------------------------------- balance


@pytest.mark.parametrize("ways", [2, 4, 8])
@pytest.mark.parametrize("experts", [64, 61])
def test_a_skewed_router_is_balanced(experts: int, ways: int) -> None:
    """Loads that fall as one over the rank, with the fullest experts next to each other."""
    rows = tuple(int(1000 / (1 + number / 8)) for number in range(experts))
    load = ExpertLoad(rows, (1,) * ways, ways)
    order = balanced_placement({"layer": load})["layer"]
    before, after = imbalance(load, tuple(range(experts))), imbalance(load, order)
    assert sorted(order) == list(range(experts))
    assert before > 1.4 and after <= 1.1, (before, after)


def test_one_expert_with_more_than_a_share_is_alone_with_the_lightest() -> None:
    order = balanced_placement({"layer": ExpertLoad((1, 2, 90, 3), (1, 1), 2)})["layer"]
    assert order == (0, 2, 1, 3)


def test_an_order_is_part_of_a_layout() -> None:
    mesh, order = Mesh(dp=2, ep=3), (4, 1, 6, 0, 3, 2, 5)
    layout = Layout(((Factor(7, ("ep",), order=order),), (Factor(4),)))
    whole = torch.arange(28).view(7, 4)
    parts = [shard(whole, layout, mesh, mesh.coordinates(rank)) for rank in range(6)]
    assert parts[0][:, 0].tolist() == [16, 4, 24] and parts[2][:, 0].tolist() == [20]
    padded = [torch.nn.functional.pad(part, (0, 0, 0, 3 - len(part))) for part in parts]
    assert torch.equal(unshard(padded, layout, mesh), whole)
    assert str(layout) == "[7<4 1 6 0 3 2 5>@ep,4]"


# ---------------------------------------------------------------- refused


def split(**choices: Any) -> None:
    model = moe.build("tiny")
    autopar.parallelize(model, Mesh(ep=2), Plan(**choices), example_inputs=moe.example_batch(model, 4))


def test_wrong_placements_are_refused() -> None:
    with pytest.raises(ValueError, match="each expert's number, from 0, once"):
        Plan(expert_placement={"*": (0, 0, 1)})
    with pytest.raises(IndivisibleError, match="has 3 experts for 'blocks.0.moe.experts', which has 12"):
        split(expert_placement={"*": (0, 2, 1)})
    with pytest.raises(IndivisibleError, match="no layer of experts has that name\nWay out: one of blocks.0"):
        split(expert_placement={"block.7": tuple(range(12))})


def test_loads_are_read_from_a_log(tmp_path: Path) -> None:
    loads = checked("ep=2").step.expert_load
    log = tmp_path / "log.jsonl"
    lines = [{"step": 0, "expert_load": {layer: load.to_json() for layer, load in loads.items()}}] * 2
    log.write_text("\n".join(map(json.dumps, lines)))
    assert read_loads(log) == {layer: load + load for layer, load in loads.items()}
    assert loads_json(loads)["expert_load"][LAYER.format(0)]["placement"] == list(
        balanced_placement(loads)[LAYER.format(0)]
    )
    log.write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match="has no load of experts\nWay out: autopar train"):
        read_loads(log)
    log.write_text("loss 1.0\n")
    with pytest.raises(ValueError, match="is no log of autopar train"):
        read_loads(log)


@pytest.mark.parametrize("mesh", slow_but([0, 2], ["ep=1", "dp=1", "dp=2", "tp=2", "sp=2", "pp=2,dp=2"]))
def test_the_load_is_counted_where_no_expert_is_dealt_out(mesh: str) -> None:
    """Every rank has all experts; the counts are the model's own."""
    loads = checked(mesh).step.expert_load
    assert [list(loads[LAYER.format(number)].experts) for number in range(len(loads))] == chosen() and len(loads) > 1
    assert all(sum(load.ranks) == sum(load.experts) and load.ways == 1 and not load.lost for load in loads.values())
