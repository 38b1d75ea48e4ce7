"""Programs on disk: what is written comes back, damage and strangers are refused, nothing is executed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from autopar.errors import ProgramFileError
from autopar.ir.layout import Layout, Split
from autopar.ir.node import Origin, origin, set_origin
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.program_files import directory
from autopar.program_files.manifest import split_of
from autopar.program_files.program_file import load, save
from tests.texts import MLP, NORMALISED, ROLES, node_of


def example() -> Program:
    program = parse(NORMALISED, Plan(seed=5, batch_dims={"labels": 0}), {"lifted.0": torch.tensor([1, 2, 3])})
    set_origin(node_of(program, "norm"), Origin("bn", "net.py:3 in forward: x = self.bn(x)"))
    return replace(
        program,
        role=None,
        in_spec=pytree.tree_structure(((1, [2]), {"labels": 3, "flag": True, "dtype": 4, "mask": 5})),
        out_spec=pytree.tree_structure({"loss": 1, "past key": (2, None)}),
        static_inputs=((2, True), (3, 0.5), (4, torch.float32), (5, None)),
        static_outputs=((1, "x"),),
        passes=("trace", "split_batch"),
    )


# ---------------------------------------------------------------- round trip


def test_a_program_comes_back_as_it_was(tmp_path: Path) -> None:
    program = example()
    assert save(program, tmp_path / "out") == tmp_path / "out"
    again = load(tmp_path / "out")
    assert str(again) == str(program)
    for name in (
        "mesh",
        "plan",
        "inputs",
        "outputs",
        "in_spec",
        "out_spec",
        "static_inputs",
        "static_outputs",
        "passes",
    ):
        assert getattr(again, name) == getattr(program, name), name
    assert again.constants["lifted.0"].tolist() == [1, 2, 3]
    assert origin(node_of(again, "norm")) == Origin("bn", "net.py:3 in forward: x = self.bn(x)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "constants.safetensors",
        "manifest.json",
        "program.txt",
    ]


def test_roles_come_back(tmp_path: Path) -> None:
    program = parse(ROLES)
    save(program, tmp_path / "out")
    again = load(tmp_path / "out")
    assert str(again) == str(program)
    assert again.required_role.differentiable == (0,)


def test_the_same_program_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    save(example(), tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    for name in ("manifest.json", "program.txt", "constants.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.float64, torch.bfloat16, torch.complex64, torch.uint8]
)
def test_constants_keep_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    from autopar.ir.text import DTYPE_NAMES

    source = f"program mesh()\n  c = const c : {DTYPE_NAMES[dtype]}[2,3]\n  s = const s : f32[]\n  return c, s"
    whole = torch.arange(6).reshape(3, 2).to(dtype).t()  # not contiguous
    program = parse(source, constants={"c": whole, "s": torch.tensor(0.1)})
    save(program, tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(again.constants["c"], whole)
    assert again.constants["s"].item() == torch.tensor(0.1).item()


def test_constants_that_share_memory(tmp_path: Path) -> None:
    source = "program mesh()\n  a = const a : f32[2]\n  b = const b : f32[2]\n  return a, b"
    shared = torch.ones(2)
    save(parse(source, constants={"a": shared, "b": shared}), tmp_path / "out")
    assert load(tmp_path / "out").constants["b"].tolist() == [1, 1]


def test_another_process_reads_it(tmp_path: Path) -> None:
    save(parse(MLP), tmp_path / "out")
    command = "import sys; from autopar.program_files.program_file import load; print(load(sys.argv[1]), end='')"
    arguments = [sys.executable, "-W", "ignore", "-c", command, str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout == MLP


# ---------------------------------------------------------------- the manifest


def manifest_of(program: Program, tmp_path: Path) -> dict[str, Any]:
    save(program, tmp_path / "manifest")
    found: dict[str, Any] = json.loads((tmp_path / "manifest" / "manifest.json").read_text())
    return found


def test_the_manifest_says_where_everything_lies(tmp_path: Path) -> None:
    found = manifest_of(parse(MLP.replace("up.weight ", "up.weight also tied.weight ")), tmp_path)
    assert (found["format"], found["version"], found["mesh"]) == ("autopar program", 1, {"dp": 2, "tp": 2})
    assert found["torch"] == torch.__version__
    assert found["groups"] == {"dp": [[0, 2], [1, 3]], "tp": [[0, 1], [2, 3]]}
    assert found["ranks"][2] == {"rank": 2, "role": 0, "coordinates": {"dp": 1, "tp": 0}}
    assert found["parameters"][0] == {
        "name": "up.weight",
        "tied": ["tied.weight"],
        "node": "p_up_weight",
        "shape": [32, 8],
        "dtype": "f32",
        "layout": "[32@tp,8]",
        "requires_grad": True,
        "split": {"0": {"axes": ["tp"], "pieces": [[[0, 16]], [[16, 32]]]}},
    }
    assert found["inputs"][0]["split"] == {"0": {"axes": ["dp"], "pieces": [[[0, 2]], [[2, 4]]]}}
    assert found["outputs"] == [
        {
            "kind": "output",
            "name": "",
            "shape": [4, 16, 8],
            "dtype": "f32",
            "layout": "[4@dp,16,8]",
            "requires_grad": True,
            "split": {"0": {"axes": ["dp"], "pieces": [[[0, 2]], [[2, 4]]]}},
        }
    ]


def test_pieces_of_splits_that_are_not_contiguous() -> None:
    mesh = Mesh(dp=2, tp=2)
    fused = Layout.whole([12]).place("tp", Split(0, outer=3), mesh)
    assert split_of(fused, mesh)["0"] == {
        "axes": ["tp"],
        "pieces": [[[0, 2], [4, 6], [8, 10]], [[2, 4], [6, 8], [10, 12]]],
    }
    twice = Layout.whole([8]).place("tp", Split(0), mesh).place("dp", Split(0), mesh)
    assert split_of(twice, mesh)["0"] == {"axes": ["tp", "dp"], "pieces": [[[0, 2]], [[2, 4]], [[4, 6]], [[6, 8]]]}
    uneven = Layout.whole([3]).place("tp", Split(0), mesh).place("dp", Split(0), mesh)
    assert split_of(uneven, mesh)["0"]["pieces"] == [[[0, 1]], [[1, 2]], [[2, 3]], []]
    assert split_of(Layout.whole([3]), mesh) == {}


def test_the_manifest_of_merged_axes(tmp_path: Path) -> None:
    """Pieces are of axes of the mesh; a group over several of them is listed beside these."""
    lines = [
        "w = param w : f32[5@dp+sp]",
        "x = input : f32[2]{sum:sp}",
        "y = comm.all_gather(w, dp+sp, dim=0) : f32[5]",
    ]
    lines.append("z = comm.all_reduce(x, sp) : f32[2]")
    program = parse("\n  ".join(["program mesh(dp=2 sp=2)", *lines, "return y, z"]))
    assert isinstance(program, Program)
    found = manifest_of(program, tmp_path)
    assert found["groups"] == {"dp": [[0, 2], [1, 3]], "sp": [[0, 1], [2, 3]], "dp+sp": [[0, 1, 2, 3]]}
    pieces = [[[0, 2]], [[2, 4]], [[4, 5]], []]
    assert found["parameters"][0]["split"] == {"0": {"axes": ["dp", "sp"], "pieces": pieces}}
    assert str(load(tmp_path / "manifest")) == str(program)


# ---------------------------------------------------------------- extra files


def test_extra_files_are_for_reading_only(tmp_path: Path) -> None:
    code = "raise SystemExit('this was executed')\n"
    save(parse(MLP), tmp_path / "out", extra_files={"stage0/forward.py": code, "__init__.py": code})
    assert (tmp_path / "out/stage0/forward.py").read_text() == code
    (tmp_path / "out/stage0/forward.py").write_text(code + "breakpoint()\n")
    (tmp_path / "out/__init__.py").unlink()
    assert str(load(tmp_path / "out")) == MLP
    save(parse(MLP), tmp_path / "out")
    assert not (tmp_path / "out/stage0").exists()


@pytest.mark.parametrize(
    "name", ["../evil.py", "/etc/evil", "a/../../evil", "", "manifest.json", "./program.txt", "a\\b"]
)
def test_extra_files_stay_inside(name: str, tmp_path: Path) -> None:
    with pytest.raises(ProgramFileError, match="extra file"):
        save(parse(MLP), tmp_path / "out", extra_files={name: "x"})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- saving: all or nothing


def test_a_program_replaces_a_program(tmp_path: Path) -> None:
    save(example(), tmp_path / "out")
    save(parse(MLP), tmp_path / "out")
    assert str(load(tmp_path / "out")) == MLP
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(parse(MLP), tmp_path / "out")
    assert str(load(tmp_path / "out")) == MLP


def test_parents_are_made(tmp_path: Path) -> None:
    save(parse(MLP), tmp_path / "a" / "b" / "out")
    assert str(load(tmp_path / "a" / "b" / "out")) == MLP


def test_the_files_of_others_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ProgramFileError, match="is not empty and holds no program; save into another directory"):
        save(parse(MLP), tmp_path)
    save(parse(MLP), tmp_path / "out")
    (tmp_path / "out" / "weights").mkdir()
    (tmp_path / "out" / "weights" / "0.safetensors").write_text("weights")
    with pytest.raises(ProgramFileError, match="not of the program there: weights/0.safetensors; move them away"):
        save(example(), tmp_path / "out")
    with pytest.raises(ProgramFileError, match="thesis.tex is a file\nWay out: give the name of a directory"):
        save(parse(MLP), tmp_path / "thesis.tex")
    assert str(load(tmp_path / "out")) == MLP


def cannot_print(program: Program) -> Program:
    node_of(program, "gelu").kwargs = {"approximate": object()}
    return program


UNSAVEABLE: dict[str, tuple[Callable[[], Program], str]] = {
    "argument": (lambda: cannot_print(parse(MLP)), "its text form does not read back"),
    "constant": (
        lambda: replace(example(), constants={"lifted.0": torch.zeros(3, device="meta")}),
        "constant 'lifted.0' has no data",
    ),
    "static": (lambda: replace(example(), static_inputs=((1, object()),)), "static_inputs: <object"),
    "structure": (
        lambda: replace(example(), in_spec=pytree.tree_structure({(1, object()): 1})),
        "cannot be written as JSON",
    ),
}


@pytest.mark.parametrize("case", UNSAVEABLE)
def test_a_failed_save_leaves_what_was_there(case: str, tmp_path: Path) -> None:
    save(parse(MLP), tmp_path / "out")
    build, message = UNSAVEABLE[case]
    for name in ("out", "new"):
        with pytest.raises(ProgramFileError, match=message):
            save(build(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert str(load(tmp_path / "out")) == MLP


# ---------------------------------------------------------------- loading: refusals


def rewrite_manifest(out: Path, change: Callable[[dict[str, Any]], None], *, sign: bool = True) -> None:
    found = json.loads((out / "manifest.json").read_text())
    change(found)
    if sign:
        found["sha256"] = directory.checksum(found)
    (out / "manifest.json").write_text(json.dumps(found))


def forge(out: Path, old: str, new: str) -> None:
    """Changes program.txt and signs it again, as somebody who wants to do harm would."""
    content = (out / "program.txt").read_text()
    assert old in content
    (out / "program.txt").write_text(content.replace(old, new))
    entry = directory.entry((out / "program.txt").read_bytes())
    rewrite_manifest(out, lambda manifest: manifest["files"].update({"program.txt": entry}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (lambda out: out.rename(out.parent / "gone"), "holds no program: manifest.json is missing"),
    "no manifest": (lambda out: (out / "manifest.json").unlink(), "manifest.json is missing"),
    "no text": (lambda out: (out / "program.txt").unlink(), "program.txt is missing or cannot be read"),
    "no constants": (lambda out: (out / "constants.safetensors").unlink(), "constants.safetensors is missing"),
    "cut manifest": (
        lambda out: (out / "manifest.json").write_text('{"format"'),
        "is damaged .*save the program again",
    ),
    "other manifest": (
        lambda out: (out / "manifest.json").write_text("[]"),
        "is not the manifest of an autopar program",
    ),
    "binary manifest": (lambda out: (out / "manifest.json").write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "version": (
        lambda out: rewrite_manifest(out, lambda m: m.update(version=2)),
        "has format version 2, this autopar reads 1; save it again with this version",
    ),
    "edited manifest": (
        lambda out: rewrite_manifest(out, lambda m: m["mesh"].update(tp=4), sign=False),
        "manifest.json was changed or is damaged",
    ),
    "edited text": (
        lambda out: (out / "program.txt").write_text((out / "program.txt").read_text() + " "),
        r"program.txt was changed or is damaged \(its sha256",
    ),
    "edited constants": (
        lambda out: (out / "constants.safetensors").write_bytes(
            (out / "constants.safetensors").read_bytes()[:-1] + b"x"
        ),
        "constants.safetensors was changed or is damaged",
    ),
    "missing entry": (lambda out: rewrite_manifest(out, lambda m: m.pop("plan")), "cannot be read: KeyError: 'plan'"),
    "unknown choice": (
        lambda out: rewrite_manifest(out, lambda m: m["plan"].update(magic=1)),
        "Plan has no choice 'magic'",
    ),
    "unknown operator": (lambda out: forge(out, "nll_loss_forward(", "no_such("), "a registered operator.*torch 2"),
    "file operator": (
        lambda out: forge(out, "aten.nll_loss_forward(y, labels, None, 1, -100)", 'aten.from_file("/etc/passwd")'),
        "an operator that a program may call .it opens files",
    ),
    "another constant": (
        lambda out: forge(out, ": i64[3]", ": i64[4]"),
        r"int64\[3\], the program says .*\[4\]",
    ),
    "no constant": (lambda out: forge(out, "const lifted.0", "const lifted.1"), "constant 'lifted.1' is missing"),
    "structure": (
        lambda out: rewrite_manifest(out, lambda m: m["structures"].update(inputs=[1, {"type": 3}])),
        "no structure of inputs or outputs",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_with_a_way_out(case: str, tmp_path: Path) -> None:
    save(example(), tmp_path / "out")
    harm, message = DAMAGE[case]
    harm(tmp_path / "out")
    with pytest.raises(ProgramFileError, match=f"(?s){message}") as caught:
        load(tmp_path / "out")
    assert len(str(caught.value).splitlines()) < 15
