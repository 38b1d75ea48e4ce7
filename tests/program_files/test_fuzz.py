"""Thousands of damaged files: each is refused with an error of ours, or read, in less than a second; nothing else."""

from __future__ import annotations

import random
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import autopar
from autopar import CheckpointError, ProgramFileError
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.plan import Plan
from autopar.program_files.program_file import load, save
from tests.program_files.damage import damage_program, flipped, header_changed, json_changed, watched
from tests.texts import NORMALISED, ROLES

MOST_SECONDS = 1.0  # of the processor, for the worst of hundreds of files that each take a few milliseconds
CASES = 200
PIPELINED = f"""\
{ROLES.partition("forward:")[0].replace("mesh(tp=2)", "mesh(pp=1 tp=2)")}
{ROLES.replace("program", "stage 0 of 1", 1)}

schedule gpipe microbatches=1 placement=0
rank 0: F0.0 B0.0
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One with constants and structures, one with roles, one with stages, schedule and fingerprint, one compiled."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4)), torch.randn(4, 4)
    found = [
        parse(NORMALISED, Plan(seed=5, batch_dims={"labels": 0}), {"lifted.0": torch.tensor([1, 2, 3])}),
        parse(ROLES),
        parse(PIPELINED),
        autopar.compile_program(model, autopar.Mesh(dp=2, tp=2), None, (batch,)),
    ]
    folder = tmp_path_factory.mktemp("programs")
    for number, program in enumerate(found):
        save(program, folder / str(number))
    return sorted(folder.iterdir())


def fuzz_program(source: Path, target: Path, seed: int) -> str:
    """What came of the damage of ``seed``: ``read`` or ``refused``."""
    chance = random.Random(seed)
    shutil.copytree(source, target)
    done = damage_program(target, chance)
    start = time.process_time()
    with watched(target) as other, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = load(target)
            result = "read" if str(program) else ""
        except ProgramFileError as error:
            assert len(str(error).splitlines()) < 15, (seed, done, str(error))
            result = "refused"
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {done}: {type(error).__name__}: {error}") from error
    seconds = time.process_time() - start
    assert not other, f"seed {seed}, {done}: {other}"
    assert seconds < MOST_SECONDS, f"seed {seed}, {done}: {seconds:.1f} s"
    shutil.rmtree(target)
    return result


def check_programs(programs: list[Path], folder: Path, seeds: range) -> None:
    results = [fuzz_program(programs[seed % len(programs)], folder / f"case{seed}", seed) for seed in seeds]
    assert results.count("refused") > len(results) // 2 and "read" in results


def test_damaged_programs(programs: list[Path], tmp_path: Path) -> None:
    check_programs(programs, tmp_path, range(CASES))


@pytest.mark.slow
def test_many_damaged_programs(programs: list[Path], tmp_path: Path) -> None:
    check_programs(programs, tmp_path, range(CASES, CASES + 2000))


def check_weights(folder: Path, seeds: range) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    autopar.save_safetensors(model, folder / "whole")
    autopar.save_safetensors(model, folder / "parts", max_shard_size=200)
    results = []
    for seed in seeds:
        chance, target = random.Random(seed), folder / f"case{seed}"
        shutil.copytree(folder / chance.choice(("whole", "parts")), target)
        path = chance.choice(sorted(target.iterdir()))
        ways = (header_changed, header_changed, flipped) if path.suffix == ".safetensors" else (json_changed, flipped)
        path.write_bytes(chance.choice(ways)(path.read_bytes(), chance))
        start = time.process_time()
        with watched(target) as other:
            try:
                autopar.load_safetensors(model, target)
                results.append("read")
            except CheckpointError:
                results.append("refused")
            except BaseException as error:
                raise AssertionError(f"seed {seed}, {path.name}: {type(error).__name__}: {error}") from error
        assert not other and time.process_time() - start < MOST_SECONDS, (seed, path.name, other)
        shutil.rmtree(target)
    assert results.count("refused") > len(results) // 3 and "read" in results


def test_damaged_weights(tmp_path: Path) -> None:
    check_weights(tmp_path, range(CASES // 2))


@pytest.mark.slow
def test_many_damaged_weights(tmp_path: Path) -> None:
    check_weights(tmp_path, range(CASES, CASES + 2000))


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    with watched(tmp_path) as found:
        (tmp_path / "new").write_text("x")
        assert Path("/etc/hostname").exists() and open("/etc/hostname").close() is None
    assert [line.partition(" ")[0] for line in found] == ["open", "open"]
    assert isinstance(parse(ROLES), Program)
