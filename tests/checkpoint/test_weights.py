"""Safetensors files: rectangles of them, whole models on meshes, what is not in them, and what Hugging Face reads."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autopar
from autopar import CheckpointError, Mesh, Plan
from autopar.checkpoint import safetensors_file
from autopar.checkpoint.safetensors_file import SafetensorsFile, create
from autopar.dtensors.dtensor import local_of
from autopar.models import gpt
from autopar.module import held_by
from tests.against_one_process import GroupedHeads, Tiny, difference, tiny_batch
from tests.launch import run_ranks
from tests.selection import slow_but

BATCH = tiny_batch(rows=12)
State = dict[str, Tensor]


@st.composite
def rectangles(draw: Any) -> tuple[list[int], list[int], list[int]]:
    """A shape of up to 4 dims, and the offsets and sizes of a part of it."""
    shape = draw(st.lists(st.integers(1, 6), max_size=4))
    offsets = [draw(st.integers(0, size - 1)) for size in shape]
    return shape, offsets, [draw(st.integers(1, size - start)) for size, start in zip(shape, offsets)]


@settings(max_examples=60, deadline=None)
@given(rectangle=rectangles(), block=st.sampled_from((1, 24, 1000)), transposed=st.booleans(), cast=st.booleans())
def test_rectangles(rectangle: Any, block: int, transposed: bool, cast: bool, tmp_path_factory: Any) -> None:
    shape, offsets, sizes = rectangle
    path = tmp_path_factory.getbasetemp() / "rectangles.safetensors"
    whole = torch.randn(shape)
    where = tuple(slice(start, start + size) for start, size in zip(offsets, sizes))
    save_file({"other": torch.ones(3, dtype=torch.int8), "it": whole}, path)
    into = torch.zeros(sizes, dtype=torch.float64 if cast else torch.float32)
    into = into.transpose(0, -1).contiguous().transpose(0, -1) if transposed and sizes else into
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "BLOCK", block)
        file = SafetensorsFile(path)
        assert file.read("it", offsets, into) == 4 * into.numel()
        file.close()
        assert torch.equal(into, whole[where].to(into.dtype))
        create(path, {"other": (torch.int8, [3]), "it": (torch.float32, shape)})
        file = SafetensorsFile(path, writable=True)
        assert file.write("it", offsets, into) == 4 * into.numel()
        file.close()
    expected = torch.zeros(shape)
    expected[where] = whole[where]
    assert torch.equal(load_file(path)["it"], expected)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def visit(build: Callable[[], nn.Module], mesh: str, zero: int, source: Path, target: Path) -> dict[str, Any]:
    """Load into a model on the meta device, save again: what the ranks held and read."""
    plan = Plan(zero=zero, check_numerics=False)
    model = autopar.parallelize(on_meta(build), Mesh.parse(mesh), plan, example_inputs=BATCH)
    found = autopar.load_safetensors(model, source)
    model(**BATCH)
    autopar.save_safetensors(model, target, max_shard_size=1500)
    parameters = list(model.parameters())
    return {
        "state": model.full_state_dict(),
        "found": found,
        "held": sum(local_of(parameter).numel() * parameter.itemsize for parameter in parameters),
        "tied": not isinstance(held_by(model).model, Tiny) or model.head.weight is model.tokens.weight,
    }


JOURNEYS = {Tiny: (("dp=2,tp=2", 3), ("dp=3", 3)), GroupedHeads: (("dp=2,tp=2", 3), ("tp=2", 0))}


@pytest.mark.parametrize("build", slow_but([1], list(JOURNEYS)))
def test_round_trip(build: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build()
    model.register_buffer("numbers", torch.arange(3))  # something that the parallel models do not have
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    autopar.save_safetensors(model, tmp_path / "0")
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["model.safetensors"]
    del expected["numbers"]
    for number, (mesh, zero) in enumerate(JOURNEYS[build]):
        results = run_ranks(
            visit, Mesh.parse(mesh).world_size, build, mesh, zero, tmp_path / f"{number}", tmp_path / f"{number + 1}"
        )
        for result in results:
            found = result["found"]
            statistics = {name for name in expected if "running" in name or "batches" in name}
            assert all(torch.equal(result["state"][name], expected[name]) for name in set(expected) - statistics)
            assert result["tied"] and not found.initialised
            assert found.unused == (("numbers",) if number == 0 else ())
            buffers = sum(expected[name].nbytes for name in statistics)
            assert found.bytes_read == result["held"] + buffers
        expected |= {name: results[0]["state"][name] for name in statistics}  # one step of batch norm later
        check_files(tmp_path / f"{number + 1}", expected, {"head.weight"} if build is Tiny else set())


def check_files(directory: Path, expected: State, tied: set[str]) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 1
    assert sorted(path.name for path in directory.iterdir()) == [*files, "model.safetensors.index.json"]
    found = {name: value for file in files for name, value in load_file(directory / file).items()}
    assert set(found) == set(index["weight_map"]) == set(expected) - tied
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())


class Parts(nn.Module):
    """Parameters with each kind of initialisation, in the modules themselves and around them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 16)
        self.mixer = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.scale = Scale()
        self.head = nn.Linear(16, 12)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.scale(self.tokens(ids))
        x = x + self.mixer(x, x, x, need_weights=False)[0]
        x = self.norm(x.flatten(0, 1))
        return {"loss": nn.functional.cross_entropy(self.head(x), labels.flatten())}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.register_buffer("flags", torch.ones(16, dtype=torch.bool), persistent=False)
        self.inner = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.weight) * self.flags

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.constant_(self.weight, 0.5)
            self.flags = torch.arange(16) % 3 > 0
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=3.0)


def initialised(mesh: str, zero: int, source: Path, seed: int) -> tuple[State, tuple[str, ...]]:
    model: Any = on_meta(Parts)
    if mesh:
        model = autopar.parallelize(model, Mesh.parse(mesh), Plan(zero=zero), example_inputs=BATCH)
    found = autopar.load_safetensors(model, source, seed=seed)
    flags = model.scale.flags
    loss = model(**BATCH)["loss"]
    assert bool(loss.isfinite())
    state = model.full_state_dict() if mesh else model.state_dict()
    return {name: value.clone() for name, value in state.items()} | {"flags": flags}, found.initialised


@pytest.mark.parametrize("mesh", slow_but([1], ["dp=2,tp=2", "dp=3"]))
def test_what_has_no_entry(mesh: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"head.weight": torch.zeros(12, 16), "unknown": torch.zeros(2)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING, "autopar"):
        expected, names = initialised("", 0, tmp_path, 0)
    assert "10 parameters have no entry in the files and were initialised: 'tokens.weight'" in caplog.text
    assert "of the files 1 entries are unused, 'unknown'" in caplog.text
    assert "head.bias" in names and "scale.flags" in names and "head.weight" not in names
    assert torch.equal(expected["scale.weight"], torch.full((16,), 0.5))
    assert torch.equal(expected["flags"], torch.arange(16) % 3 > 0)
    assert 2 < expected["scale.inner.weight"].std() < 4 and 0.8 < expected["tokens.weight"].std() < 1.2
    assert float(expected["mixer.in_proj_weight"].abs().max()) < (6 / (16 + 48)) ** 0.5
    assert [bool(expected[name].any()) for name in ("mixer.out_proj.bias", "head.bias", "head.weight")] == [0, 1, 0]
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        del expected[name]  # they have seen a batch
    for state, found in run_ranks(initialised, Mesh.parse(mesh).world_size, mesh, 3, tmp_path, 0):
        assert set(found) == set(names)
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    other, _ = initialised("", 0, tmp_path, 1)
    assert not torch.equal(other["tokens.weight"], expected["tokens.weight"])


class NoInit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4), persistent=False)


def test_a_buffer_that_only_its_constructor_knows(tmp_path: Path) -> None:
    save_file(nn.Linear(4, 4).state_dict(), tmp_path / "linear.safetensors")
    model = on_meta(NoInit)
    with pytest.raises(CheckpointError, match="(?s)'table' has no data and no initialisation: NoInit .*Way out"):
        autopar.load_safetensors(model, tmp_path, rename=lambda name: f"lin.{name}")
    real = NoInit()
    found = autopar.load_safetensors(real, tmp_path, rename=lambda name: f"lin.{name}")
    assert found.loaded == ("lin.weight", "lin.bias") and not found.initialised
    assert found.bytes_read == 80 and torch.equal(real.table, torch.arange(4))


def directory_with(model: nn.Module, directory: Path, how: str) -> None:
    autopar.save_safetensors(model, directory, max_shard_size=800)
    files = sorted(directory.glob("*.safetensors"))
    if how == "shape":
        save_file(load_file(files[0]) | {"tokens.weight": torch.zeros(5, 5)}, files[0])
    elif how == "cut off":
        os.truncate(files[-1], files[-1].stat().st_size - 1)
    elif how == "empty":
        os.truncate(files[-1], 3)
    elif how == "no header":
        files[-1].write_bytes((8).to_bytes(8, "little") + b"not json")
    elif how == "lost":
        files[-1].unlink()
    elif how == "index":
        (directory / "model.safetensors.index.json").write_text("[]")
    elif how == "nothing":
        for path in directory.iterdir():
            path.unlink()


REFUSED = {
    "shape": r"'tokens.weight' in '.*model-00001-of-0000\d.safetensors' is \[5, 5\], and in this model it is \[12, 8\]",
    "cut off": r"is cut off: [\d,]+ of [\d,]+ bytes",
    "empty": "is cut off or no safetensors file: 3 bytes",
    "no header": "is damaged or no safetensors file",
    "lost": r"lacks 1 of \d files, the first is model-",
    "index": "index.json' is damaged",
    "nothing": "has neither model.safetensors nor model.safetensors.index.json",
}


@pytest.mark.parametrize("how", REFUSED)
def test_refused(how: str, tmp_path: Path) -> None:
    model = Tiny()
    directory_with(model, tmp_path, how)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.tokens.weight += 1
        before["tokens.weight"] += 1
        before["head.weight"] += 1
    with pytest.raises(CheckpointError, match=REFUSED[how]):
        autopar.load_safetensors(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_saving_refuses(tmp_path: Path) -> None:
    autopar.save_safetensors(Tiny(), tmp_path)
    with pytest.raises(CheckpointError, match="has weights already"):
        autopar.save_safetensors(Tiny(), tmp_path)
    with pytest.raises(CheckpointError, match="'tokens.weight' has no data"):
        autopar.save_safetensors(on_meta(Tiny), tmp_path / "meta")
    with pytest.raises(ValueError, match="max_shard_size='5 parsecs'"):
        autopar.save_safetensors(Tiny(), tmp_path / "other", max_shard_size="5 parsecs")


def test_dtypes_are_cast(tmp_path: Path) -> None:
    model = gpt.GPT(gpt.PRESETS["tiny"])
    autopar.save_safetensors(model, tmp_path)
    halved = gpt.GPT(gpt.PRESETS["tiny"]).bfloat16()
    autopar.load_safetensors(halved, tmp_path)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in halved.state_dict().items())


def before_layouts(source: Path) -> str:
    model = autopar.parallelize(on_meta(Tiny), Mesh(dp=2), Plan(check_numerics=False))
    try:
        autopar.load_safetensors(model, source)
    except CheckpointError as problem:
        return str(problem)
    return "no error"


def test_layouts_have_to_be_known(tmp_path: Path) -> None:
    autopar.save_safetensors(Tiny(), tmp_path)
    assert all("model.prepare" in text for text in run_ranks(before_layouts, 2, tmp_path))


def small_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=2, tie_word_embeddings=True))


def from_hugging_face(source: Path, target: Path) -> tuple[float, tuple[str, ...], int, int]:
    ids = torch.arange(64).view(8, 8)
    plan = Plan(zero=3)
    batch = {"input_ids": ids, "labels": ids.clone()}
    model = autopar.parallelize(on_meta(small_llama), Mesh(dp=2, tp=2), plan, example_inputs=batch)
    found = autopar.load_safetensors(model, source)
    autopar.save_safetensors(model, target, max_shard_size="40KB")
    held = sum(local_of(parameter).numel() * parameter.itemsize for parameter in model.parameters())
    return float(model(**batch).loss.detach()), found.initialised, found.bytes_read, held


@pytest.mark.slow
def test_hugging_face_writes_and_reads_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = small_llama()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    ids = torch.arange(64).view(8, 8)
    expected = float(model(input_ids=ids, labels=ids.clone()).loss.detach())
    for loss, initialised, read, held in run_ranks(from_hugging_face, 4, tmp_path / "theirs", tmp_path / "ours"):
        assert abs(loss - expected) < 1e-5 and read == held
        assert set(initialised) == {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    model.model.save_pretrained(tmp_path / "base")  # names without the prefix "model."
    assert not autopar.load_safetensors(small_llama(), tmp_path / "base").initialised


class Scaled(nn.Module):
    """With a buffer that no file has, which Python reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.scale: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.register_buffer("scale", torch.arange(1.0, 5.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.up(x) * self.scale.to(x.dtype)).square().mean()


def test_loading_into_a_model_without_data_makes_no_other_program(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Scaled(), torch.randn(2, 4)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    parallel = autopar.parallelize(on_meta(Scaled), Mesh(dp=1), example_inputs=(x,))
    autopar.load_safetensors(parallel, tmp_path)
    assert difference(parallel(x), model(x)) < 1e-7
    assert "another program" not in caplog.text
