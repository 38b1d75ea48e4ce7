"""Parameters as DTensors: every layout against index arithmetic, and state dicts in the model's own order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import autopar
from autopar import Mesh, Plan
from autopar.communication.connect import connect
from autopar.errors import IndivisibleError
from autopar.ir.layout import Factor, Layout, Split, shard
from autopar.models import gpt
from autopar.weights.stored import cut, in_model_order, in_stored_order, stored
from tests.against_one_process import difference, float64, whole
from tests.launch import run_ranks

MESH = Mesh(dp=2, tp=2)
CONTIGUOUS = {
    "whole": Layout.whole((4, 6)),
    "tp": Layout.whole((4, 6)).place("tp", Split(1), MESH),
    "both dims": Layout.whole((4, 6)).place("tp", Split(1), MESH).place("dp", Split(0), MESH),
    "one dim twice": Layout.whole((8, 3)).place("dp", Split(0), MESH).place("tp", Split(0), MESH),
    "uneven": Layout.whole((7, 3)).place("tp", Split(0), MESH),
    "uneven twice": Layout.whole((7, 3)).place("dp", Split(0), MESH).place("tp", Split(0), MESH),
    "fewer than ranks": Layout.whole((1, 3)).place("tp", Split(0), MESH),
}
IN_PIECES = {
    "thirds": Layout.whole((12, 3)).place("tp", Split(0, outer=3), MESH),
    "thirds of columns": Layout.whole((3, 12)).place("tp", Split(1, outer=3), MESH),
    "tp before dp": Layout.whole((8, 3)).place("tp", Split(0), MESH).place("dp", Split(0), MESH),
    "groups": Layout.whole((16, 3)).place("tp", Split(0, ratio=(2, 1, 1)), MESH),
    "groups and dp": Layout.whole((16, 4)).place("tp", Split(0, ratio=(2, 1, 1)), MESH).place("dp", Split(1), MESH),
    "dp within groups": Layout(((Factor(16, ("tp", "dp"), ratio=(2, 1, 1)),), (Factor(3),))),
    "each group": Layout(((Factor(2), Factor(8, ("tp",), ratio=(2, 1, 1))), (Factor(3),))),
    "experts by load": Layout(((Factor(4, ("tp",), order=(3, 0, 2, 1)),), (Factor(3),))),
    "uneven, by load": Layout(((Factor(3, ("tp",), order=(2, 0, 1)),), (Factor(4, ("dp",)),))),
}
LAYOUTS = CONTIGUOUS | IN_PIECES


@pytest.mark.parametrize("name", LAYOUTS)
def test_forms(name: str) -> None:
    form = stored(LAYOUTS[name], MESH, MESH.names, name)
    kinds = {type(placement).__name__ for placement in form.placements}
    assert ("Pieces" in kinds) == (name in IN_PIECES)
    assert "_StridedShard" not in kinds


def test_parts_that_no_dtensor_has() -> None:
    mesh = Mesh(dp=2, tp=4)
    layout = Layout(((Factor(9, ("tp", "dp")),),))
    with pytest.raises(IndivisibleError, match="(?s)'w' as .* a mesh whose dp x tp divides 9"):
        stored(layout, mesh, mesh.names, "w")


def hold_each() -> dict[str, list[bool]]:
    connection = connect(MESH, 60.0, torch.device("cpu"))
    found = {}
    for name, layout in LAYOUTS.items():
        full = torch.arange(1.0, 1 + torch.Size(layout.shape).numel()).reshape(layout.shape)
        form = stored(layout, MESH, MESH.names, name)
        held = cut(full, form, connection)
        local = shard(full, layout, MESH, connection.comm.coordinates)
        saved = in_model_order(held, form)
        plain = in_stored_order(full, held)
        back = in_stored_order(saved, held)
        found[name] = [
            torch.equal(held.to_local(), local),
            torch.equal(held.full_tensor(), full),
            torch.equal(saved.full_tensor(), full),
            all(type(placement).__name__ in ("Shard", "Replicate") for placement in saved.placements),
            torch.equal(plain.to_local(), local) and torch.equal(back.to_local(), local),
            held.shape == full.shape and held.stride() == full.stride(),
            cut(full.to("meta"), form, connection).to_local().shape == local.shape,
        ]
    return found


def test_every_layout_on_four_processes() -> None:
    for found in run_ranks(hold_each, 4):
        assert all(all(checks) for checks in found.values()), found


def keep_state() -> dict[str, Any]:
    model = float64(gpt.build)
    reference = copy.deepcopy(model)
    expected = reference.state_dict()
    batch = gpt.example_batch(model, 4, 8)
    parallel = autopar.parallelize(model, MESH, Plan(check_numerics=False), example_inputs=batch)
    saved, full = parallel.state_dict(), parallel.full_state_dict()
    child = parallel.blocks[0].state_dict()["attn.qkv.weight"]
    results: dict[str, Any] = {
        "names": list(saved) == list(expected) == list(full),
        "order": all(torch.equal(whole(saved[name]), value) for name, value in expected.items()),
        "full": all(torch.equal(full[name], value) for name, value in expected.items()),
        "sharded": any(value.to_local().numel() < value.numel() for value in saved.values()),
        "tied": parallel.head.weight is parallel.tokens.weight,
        "DTensors": all(isinstance(parameter, DTensor) for parameter in parallel.parameters()),
        "child": torch.equal(whole(child), expected["blocks.0.attn.qkv.weight"]),
        "only rank 0": bool(parallel.full_state_dict(rank0_only=True)) == (torch.distributed.get_rank() == 0),
    }
    parallel.load_state_dict({name: value + 1 for name, value in saved.items()})
    results["loads DTensors"] = all(torch.equal(v, full[n] + 1) for n, v in parallel.full_state_dict().items())
    parallel.load_state_dict(expected)
    results["loads whole tensors"] = all(torch.equal(v, full[n]) for n, v in parallel.full_state_dict().items())
    results["still runs"] = difference(parallel(**batch)["loss"], reference(**batch)["loss"]) < 1e-12
    try:
        parallel.load_state_dict({})
    except RuntimeError as problem:
        results["strict"] = "Missing key" in str(problem)
    return results


def test_state_dicts_have_the_models_own_order() -> None:
    for results in run_ranks(keep_state, 4):
        assert all(results.values()), results


def fill_a_meta_model() -> list[bool]:
    reference = float64(gpt.build)
    with torch.device("meta"):
        model = gpt.GPT(gpt.PRESETS["tiny"])
    batch = gpt.example_batch(reference, 4, 8)
    parallel = autopar.parallelize(model, MESH, example_inputs=batch)
    qkv = parallel.blocks[0].attn.qkv.weight
    was_meta = qkv.to_local().is_meta and qkv.to_local().shape == (72, 48)
    try:
        parallel(**batch)
        said = False
    except autopar.AutoparError as problem:
        said = "to_empty" in str(problem)
    parallel.to_empty(device="cpu")
    parallel.load_state_dict(reference.state_dict())
    return [was_meta, said, difference(parallel(**batch)["loss"], reference(**batch)["loss"]) < 1e-12]


def test_a_model_on_the_meta_device() -> None:
    assert all(all(checks) for checks in run_ranks(fill_a_meta_model, 4))
