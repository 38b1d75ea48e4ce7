"""Families on disk: read back as they were, run without compiling, and refused where they are damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import autopar
from autopar.cache import compiled as cache_compiled
from autopar.errors import ProgramFileError
from autopar.families.family import Family
from autopar.mesh import Mesh
from autopar.models import gpt, llama, moe
from autopar.plan import Plan
from autopar.program_files.directory import checksum, entry, laid_out
from autopar.program_files.family_file import load_family, member_for, save_family
from tests.exporters.test_families import LLAMA, MIXTURE, batch_of, family_of
from tests.launch import run_ranks
from tests.selection import slow_but

EXACT = 1e-10
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "dp=2", {"zero": 3}),
    ("llama", "sp=2", {}),
    ("mixture", "ep=2", {}),
    ("deep", "pp=2", {"microbatches": 2}),
    ("gpt", "tp=2", {"sequence": "megatron"}),
]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama.Llama(replace(LLAMA, layers=1)),
    "deep": lambda: llama.Llama(LLAMA),
    "gpt": lambda: gpt.GPT(gpt.Config(vocab=64, context=128, width=16, layers=1, heads=4)),
    "mixture": lambda: moe.Mixtral(replace(MIXTURE, layers=1)),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


def saved(folder: Path, name: str, mesh: str, plan: dict[str, Any]) -> Path:
    family = family_of(model_of(name), mesh, plan)
    return save_family(family, folder / "family")


@pytest.fixture(scope="module")
def family() -> Family:
    return family_of(model_of(CASES[0][0]), *CASES[0][1:])


@pytest.fixture(scope="module")
def directory(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(family, tmp_path_factory.mktemp("families") / "family")


def train(folder: str, name: str, batches: list[tuple[int, int]]) -> tuple[list[int], list[float], float]:
    """Compiles so far after each step, the error of each loss, and that of the weights after all."""
    model, alone, compiles, counted = model_of(name), model_of(name), 0, []
    original = cache_compiled.compile_program

    def counting(*args: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return original(*args)

    cache_compiled.compile_program = counting  # type: ignore[attr-defined]
    parallel, errors = autopar.parallelize(model, program=folder), []
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (parallel, alone)]
    for sizes in batches:
        batch = batch_of(*sizes)
        loss, expected = parallel.train_step(**batch), alone(**batch)["loss"]
        expected.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        errors.append(abs(float(loss) - float(expected)))
        counted.append(compiles)
    weights, right = parallel.full_state_dict(), alone.state_dict()
    return counted, errors, max(float((weights[key] - right[key]).abs().max()) for key in right)


@pytest.mark.parametrize(("name", "mesh", "plan"), slow_but((0,), CASES))
def test_all_sizes_without_compiling(
    name: str, mesh: str, plan: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The fifth is outside of the family, which grows by one compile, and by more than that batch."""
    first = (name, mesh, plan) == CASES[0]
    folder = request.getfixturevalue("directory") if first else saved(tmp_path, name, mesh, plan)
    sizes = [(8, 16), (12, 40), (8, 12), (12, 128), (24, 16), (20, 60)]
    compiles, errors, weights = zip(*run_ranks(train, Mesh.parse(mesh).world_size, str(folder), name, sizes))
    assert [sum(of_ranks) for of_ranks in zip(*compiles)] == [0, 0, 0, 0, 1, 1]  # by one, for all
    assert max(*(error for several in errors for error in several), *weights) <= EXACT


def test_read_back(family: Family, directory: Path) -> None:
    first, again = family, load_family(directory)
    assert str(again) == str(first) and str(again.template) == str(first.template)
    sizes = {"b": 12, "s": 52}
    assert str(again.member(sizes)) == str(first.member(sizes))
    assert again.scheme == first.scheme
    assert isinstance(autopar.Program.load(directory), autopar.Program)  # the program of the first batch


def test_what_is_outside_is_told(directory: Path) -> None:
    again = load_family(directory)
    assert member_for(again, [(10, 28), (10, 28)]) is not None
    for shapes in ([(10, 300), (10, 300)], [(10, 28), (10, 32)], [(10, 28)]):
        with pytest.raises(ProgramFileError, match="none of this family"):
            member_for(again, shapes)


@pytest.mark.slow
def test_run_without_the_model(directory: Path, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in model_of("llama").state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    for sizes, ends in (((10, 28), 0), ((10, 300), 1)):
        batch: dict[str, Tensor] = batch_of(*sizes)
        safetensors.torch.save_file(batch, tmp_path / "inputs.safetensors")
        command = [sys.executable, "-m", "autopar", "run", str(directory), "--output", str(tmp_path / "out")]
        command += [
            "--weights",
            str(tmp_path / "weights.safetensors"),
            "--inputs",
            str(tmp_path / "inputs.safetensors"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert (done.returncode != 0) == bool(ends), done.stderr
        if ends:
            assert "is none of this family" in done.stderr.replace("\n", " ")
        else:
            expected = model_of("llama")(**batch)["loss"].detach()
            assert abs(float(safetensors.torch.load_file(tmp_path / "out")["loss"]) - float(expected)) <= EXACT


def test_a_program_of_one_size_is_no_family(tmp_path: Path) -> None:
    model = model_of("gpt")
    autopar.compile_program(model, Mesh(dp=2), Plan(check_numerics=False), (), batch_of(4, 8)).save(tmp_path / "p")
    with pytest.raises(ProgramFileError, match="one size"):
        load_family(tmp_path / "p")


DAMAGES: dict[str, Any] = {
    "another form": lambda about: about["forms"][0].__setitem__(1, [3, 1, "s"]),
    "text as a size": lambda about: about["forms"][0].__setitem__(1, [1, 1, "__import__('os')"]),
    "no denominator": lambda about: about["forms"][0].__setitem__(1, [1, 0, "s"]),
    "a place behind the end": lambda about: about["numbers"].append([10**9, 0]),
    "a form behind the end": lambda about: about["numbers"].append([0, 99]),
    "a negative size": lambda about: about["points"][1].__setitem__("s", -4),
    "other names": lambda about: about["points"][1].pop("s"),
    "no points": lambda about: about.__setitem__("points", []),
    "a dim of no size": lambda about: about["names"].append([0, 0, "x"]),
    "a missing constant": lambda about: about["constants"].update(nothing=["7", -1]),
    "a size divided by nothing": lambda about: about["rounded"].append(["floordiv", "s", 0]),
    "a list": lambda about: about.clear(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told(directory: Path, tmp_path: Path, damage: str) -> None:
    """Also where somebody has computed the checksums anew."""
    shutil.copytree(directory, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    about = json.loads((tmp_path / "copy" / "sizes.json").read_text())
    DAMAGES[damage](about)
    content = json.dumps(about).encode()
    (tmp_path / "copy" / "sizes.json").write_bytes(content)
    with pytest.raises(ProgramFileError, match="sha256"):
        load_family(tmp_path / "copy")
    manifest["files"]["sizes.json"] = entry(content)
    manifest["sha256"] = checksum(manifest)
    (tmp_path / "copy" / "manifest.json").write_text(laid_out(manifest))
    with pytest.raises(ProgramFileError, match="family"):
        load_family(tmp_path / "copy")
