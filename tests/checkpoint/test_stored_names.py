"""Files that ``transformers`` converts while it loads: read and written under their names, by any ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autopar
from autopar import CheckpointError, Mesh, Plan
from autopar.checkpoint.stored_names import Rectangle, _rectangle, stored_names
from autopar.zoo.experts import ARCHITECTURES
from autopar.zoo.named import named_model
from tests.launch import run_ranks
from tests.selection import slow_but

pytest.importorskip("transformers")

State = dict[str, Tensor]
TINY: dict[str, Any] = {"num_hidden_layers": 2}


def built(name: str, seed: int) -> Any:
    return named_model(f"hf:{name}", TINY, seed=seed).model


def same(found: State, wanted: State) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """What ``save_pretrained`` writes is read, in either form; what is written has its names, and it reads that."""
    model, theirs, ours, fused = built(name, 1), tmp_path / "theirs", tmp_path / "ours", tmp_path / "fused"
    model.save_pretrained(theirs)
    model.save_pretrained(fused, save_original_format=False)
    for directory in (theirs, fused):
        other = built(name, 2)
        assert not same(other.state_dict(), model.state_dict())
        found = autopar.load_safetensors(other, directory)
        assert same(other.state_dict(), model.state_dict()) and not found.initialised and not found.unused
        assert set(found.loaded) >= {parameter for parameter, _ in model.named_parameters()}
    autopar.save_safetensors(model, ours)
    assert same(load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors"))
    assert same(type(model).from_pretrained(ours).state_dict(), model.state_dict())


def test_experts_of_mixtral_have_a_name_each() -> None:
    model = built("mixtral", 0)
    names = stored_names(model, dict(model.state_dict()))
    parts = names["model.layers.1.mlp.experts.gate_up_proj"]
    assert len(parts) == 2 * 12
    assert parts["model.layers.1.block_sparse_moe.experts.3.w3.weight"] == Rectangle((3, 96, 0), (1, 96, 192), (1, 2))
    assert names["lm_head.weight"] == {"lm_head.weight": Rectangle.of_all(tuple(model.lm_head.weight.shape))}
    plain = nn.Linear(3, 4)
    assert stored_names(plain, plain.state_dict())["bias"] == {"bias": Rectangle.of_all((4,))}


def test_a_file_without_one_expert_is_refused_and_nothing_has_changed(tmp_path: Path) -> None:
    model, other = built("mixtral", 1), built("mixtral", 2)
    model.save_pretrained(tmp_path)
    tensors, before = load_file(tmp_path / "model.safetensors"), {k: v.clone() for k, v in other.state_dict().items()}
    lost = "model.layers.1.block_sparse_moe.experts.7.w1.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gate_up_proj' is 24 tensors in files, which lack 1: '.*experts.7.w1"):
        autopar.load_safetensors(other, tmp_path)
    save_file({**tensors, lost: torch.ones(3, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts.7.w1.weight' in .* is \[3, 4\], and .* it is \[96, 192\]"):
        autopar.load_safetensors(other, tmp_path)
    assert same(other.state_dict(), before)


@given(st.data())
def test_the_rectangle_of_a_view(data: st.DataObject) -> None:
    """Any parts along any dims, in any order of the dims, with single dims gone and new ones."""
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4))
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    view = whole
    for dim, size in enumerate(shape):
        start = data.draw(st.integers(0, size - 1))
        view = view.narrow(dim, start, data.draw(st.integers(1, size - start)))
    view = view.permute(data.draw(st.permutations(range(len(shape)))))
    view = view.squeeze() if data.draw(st.booleans()) else view.unsqueeze(data.draw(st.integers(0, view.dim())))
    found = _rectangle(view, whole)
    assert found is not None and found.shape == tuple(view.shape)
    everything = found.common((0,) * len(shape), whole)
    assert everything is not None and torch.equal(everything[1], view)
    if not shape:
        return
    dim = data.draw(st.integers(0, len(shape) - 1))
    cut = data.draw(st.integers(0, shape[dim] - 1))
    offsets = tuple(cut if other == dim else 0 for other in range(len(shape)))
    part = found.common(offsets, whole.narrow(dim, cut, shape[dim] - cut))
    wanted = [float(number) for number in view.flatten() if int(number) // whole.stride(dim) % shape[dim] >= cut]
    assert (part is None) == (not wanted)
    if part is not None:
        assert sorted(part[1].flatten().tolist()) == sorted(wanted)
        there = view[tuple(slice(start, start + size) for start, size in zip(part[0], part[1].shape))]
        assert torch.equal(there, part[1])


@pytest.mark.parametrize("form", ["flat", "every second", "expanded"])
def test_what_is_no_rectangle(form: str) -> None:
    whole = torch.zeros(4, 6)
    views = {"flat": whole.view(24), "every second": whole[:, ::2], "expanded": whole[:1].expand(3, 6)}
    assert _rectangle(views[form], whole) is None


def visit(mesh: str, zero: int, source: Path, target: Path) -> State:
    """Load into a model on the meta device, save again; the whole tensors that the ranks have."""
    example = named_model("hf:mixtral", TINY, batch=12)
    with torch.device("meta"):
        model = type(example.model)(example.model.config)
    plan = Plan(zero=zero, check_numerics=False, microbatches=2 if "pp" in mesh else 1)
    parallel = autopar.parallelize(model, Mesh.parse(mesh), plan, example_inputs=example.batch)
    autopar.load_safetensors(parallel, source)
    autopar.save_safetensors(parallel, target, max_shard_size="2MB")
    return parallel.full_state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "zero"), slow_but([2], [("dp=2,tp=2", 3), ("dp=3", 2), ("pp=2,ep=2", 1)]))
def test_ranks_read_and_write_their_parts_of_each_expert(mesh: str, zero: int, tmp_path: Path) -> None:
    model = built("mixtral", 1)
    model.save_pretrained(tmp_path / "theirs")
    states = run_ranks(visit, Mesh.parse(mesh).world_size, mesh, zero, tmp_path / "theirs", tmp_path / "ours")
    assert all(same(state, model.state_dict()) for state in states)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    assert same(type(model).from_pretrained(tmp_path / "ours").state_dict(), model.state_dict())
