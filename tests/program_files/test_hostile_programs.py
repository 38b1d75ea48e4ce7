"""What is written down as a program by somebody who means harm: no name becomes code, nothing dear is computed."""

from __future__ import annotations

import ast
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.errors import ProgramFileError
from autopar.ir.loadable_operators import EVERY
from autopar.ir.node import Origin, set_origin
from autopar.ir.parse import parse
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import Output
from autopar.program_files.program_file import load, save
from tests.program_files.damage import seal
from tests.texts import MLP, ROLES

ROOT = Path(__file__).parents[2]

# ---------------------------------------------------------------- names are no code

BREAKS = ("\n", "\r", "\r\n", "\f", "\v", "\x00", "\x1c", "\x85", "\u2028", "\u2029", "\u202e", "\ud800")
EVIL = "x{0} ) = inputs; raise SystemExit('executed'){0} (a, #'\"\\"


def example() -> Program:
    program = parse(ROLES.replace("forward:", "forward:", 1))
    assert isinstance(program, Program)
    return program


def renamed(program: Program, old: str, new: str) -> Program:
    role = program.required_role
    return replace(
        program,
        inputs=tuple(replace(entry, target=new) if entry.target == old else entry for entry in program.inputs),
        role=replace(role, grads=tuple(new if target == old else target for target in role.grads)),
    )


def with_origin(program: Program, evil: str) -> Program:
    for graph in program.graphs.values():
        for node in graph.nodes:
            set_origin(node, Origin(evil, evil))
    return program


def with_alias(program: Program, evil: str) -> Program:
    return replace(
        program, inputs=tuple(replace(entry, aliases=(evil,)) for entry in program.inputs[:1]) + program.inputs[1:]
    )


def with_output(program: Program, evil: str) -> Program:
    first, *rest = program.outputs
    return replace(program, outputs=(Output(first.kind, evil), *rest))


PLACES: dict[str, Callable[[Program, str], Program]] = {
    "parameter": lambda program, evil: renamed(program, "w", evil),
    "input": lambda program, evil: renamed(program, "x", evil),
    "alias": with_alias,
    "output": with_output,
    "origin": with_origin,
}


def statements(program: AnyProgram) -> str:
    """The code of a rank without its comments."""
    rank = program.rank(1)
    return ast.dump(ast.parse(rank.code)) + ast.dump(ast.parse(rank.inference_code))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("letter", BREAKS, ids=ascii)
def test_names_stay_comments(letter: str, place: str, tmp_path: Path) -> None:
    hostile = PLACES[place](example(), EVIL.format(letter))
    save(hostile, tmp_path / "out")
    again = load(tmp_path / "out")
    assert str(again) == str(hostile)
    assert statements(hostile) == statements(again) == statements(example())


def test_texts_stay_texts(tmp_path: Path) -> None:
    for letter in BREAKS:
        evil = EVIL.format(letter)
        source = (
            f"program mesh()\n  x = input : f32[3,2]\n  y = aten.gelu(x, approximate={json.dumps(evil)})\n  return y"
        )
        save(parse(source), tmp_path / "out")
        tree = ast.parse(load(tmp_path / "out").rank(0).code)
        assert evil in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert [type(node) for node in ast.walk(tree) if isinstance(node, ast.stmt)].count(ast.Raise) == 0


def test_variables_that_mean_something_else() -> None:
    """Nodes with the names of what the emitted code uses, of operators, and of each other."""
    names = ("comm", "comm_", "inputs", "inputs_", "operator", "op", "math", "aten_add_Tensor", "aten_add_Tensor_")
    lines = [f"  {name} = aten.add.Tensor(x, {place + 1.5})" for place, name in enumerate(names)]
    source = "\n".join(["program mesh()", "  x = input : f64[2]", *lines, f"  return {', '.join(names)}"])
    namespace: dict[str, Any] = {}
    exec(parse(source).rank(0).code, namespace)
    found = namespace["forward"](None, [torch.zeros(2, dtype=torch.float64)])
    assert [float(tensor[0]) for tensor in found] == [place + 1.5 for place in range(len(names))]


# ---------------------------------------------------------------- operators


REFUSED = {
    'aten.from_file("/etc/passwd")': "it opens files",
    'aten.save(x, "/tmp/file")': "registered operator|other things than tensors",
    "aten.set_.source_Tensor(x, x)": "it writes to its arguments",
    "aten.resize_(x, [9])": "it writes to its arguments",
    "aten.add.out(x, x, out=x)": "it writes to its arguments",
    "aten.add.Tensor(x, x, out=x)": r"an argument of aten::add \(self, other, alpha\)",
    "aten.add.Tensor(x)": "argument other of aten::add",
    "aten.add.Tensor(x, x, x, x)": "at most 2 positional arguments",
    "aten._print(x)": "it gives no tensor|other things",
    "aten.item(x)": "other things than tensors|it gives no tensor",
    "aten._sparse_csr_tensor_unsafe(x, x, x, [9])": "it trusts addresses",
    "aten._nested_view_from_buffer(x, x, x, x)": "it trusts addresses",
    "stored_test.twice(x)": r'it is of the library stored_test; where you trust it: load\(directory, operators=',
    "os.system(x)": "a registered operator",
    "op.no_such(x)": "an operator of autopar.operators",
    "op.__class__(x)": "an operator of autopar.operators",
    "comm.__class__(x)": "a collective",
    "op.masked_attention(x, evil=x)": r"arguments of op.masked_attention",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def library() -> Any:
    library = torch.library.Library("stored_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    yield library
    library._destroy()


@pytest.mark.parametrize("call", REFUSED)
def test_operators_that_do_more_than_compute(call: str) -> None:
    with pytest.raises(ProgramFileError, match=REFUSED[call]):
        parse(f"program mesh()\n  x = input : f32[3]\n  y = {call}\n  return y")


def test_operators_that_the_reader_trusts(tmp_path: Path) -> None:
    source = "program mesh()\n  x = input : f32[3]\n  y = stored_test.twice(x)\n  return y"
    program = parse(source, operators=EVERY)
    save(program, tmp_path / "out")  # a process may write down what it has made
    with pytest.raises(ProgramFileError, match="of the library stored_test"):
        load(tmp_path / "out")
    for trusted in ("stored_test", "stored_test::twice"):
        assert str(Program.load(tmp_path / "out", operators=[trusted])) == str(program)


# ---------------------------------------------------------------- sizes


LARGE = {
    "size": "program mesh()\n  x = input : f32[1152921504606846976]\n  return x",
    "sizes": "program mesh()\n  x = input : f32[4294967296,4294967296]\n  return x",
    "constant": "program mesh()\n  x = const c : f32[1099511627776]\n  return x",
    "digits": f"program mesh()\n  x = input : f32[{'9' * 9999}]\n  return x",
    "number": f"program mesh()\n  x = input : f32[2]\n  y = aten.add.Scalar(x, {'9' * 9999})\n  return y",
    "ranks": "program mesh(dp=1000000000)\n  x = input : f32[2]\n  return x",
    "brackets": f"program mesh()\n  x = input : f32[2]\n  y = aten.add.Scalar(x, {'[' * 10**6})\n  return y",
    "dims": f"program mesh()\n  x = input : f32[{'1,' * 10**5}1]\n  return x",
    "factors": f"program mesh()\n  x = input : f32[({'1 ' * 10**5})]\n  return x",
    "order": "program mesh()\n  x = input : f32[999999999999<0 1>]\n  return x",
    "ways": "program mesh()\n  x = input : f32[2]\n  y = aten.add.Scalar(x, slice(1, 2, 3, 4))\n  return y",
    "tails": f"{MLP}\n" + "tail mesh()\n" * 10**4,
    "rank of a schedule": f"{MLP}\nschedule x microbatches=1 placement=0\nrank 99999999999: F0.0",
    "stage of a schedule": f"{MLP}\nschedule x microbatches=1\nrank 0: F99999999999.0",
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in LARGE if case != "constant"])
def test_what_is_too_large_costs_nothing(case: str) -> None:
    """Counted in calls: seven million for the longest, of a text of 200 thousand characters."""
    calls = itertools.count()
    sys.setprofile(lambda *_: next(calls))
    try:
        with pytest.raises(ProgramFileError) as caught:
            parse(LARGE[case])
    finally:
        sys.setprofile(None)
    assert next(calls) < 20_000_000 and len(str(caught.value).splitlines()) < 15


def seconds_for(returned: int, programs: int = 1) -> float:
    values = ",\n    ".join(f"o{number}=x" for number in range(returned))
    start = time.process_time()
    for _ in range(programs):
        parse(f"program mesh()\n  x = input : f32[2]\n  return {values}")
    return time.process_time() - start


def test_many_returned_values_are_read_in_time() -> None:
    """As many lines in one program as in twenty: about the same time. With a copy for each line, twenty times."""
    times = [(seconds_for(20_000), seconds_for(1000, programs=20)) for _ in range(5)]
    one, twenty = (min(column) for column in zip(*times, strict=True))
    assert one < 6 * twenty


def rewritten(out: Path, text: str) -> None:
    (out / "program.txt").write_text(text)
    seal(out)


def test_a_constant_that_the_file_lacks_is_not_allocated(tmp_path: Path) -> None:
    save(parse(MLP), tmp_path / "out")
    rewritten(tmp_path / "out", LARGE["constant"])
    with pytest.raises(ProgramFileError, match="constant 'c' is missing"):
        load(tmp_path / "out")


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    """Sparse files of terabytes, and one whose manifest says so."""
    for name in ("manifest.json", "program.txt", "constants.safetensors"):
        save(parse(MLP), tmp_path / name)
        os.truncate(tmp_path / name / name, 1 << 42)
        with pytest.raises(ProgramFileError, match="at most 268,435,456 are read|was changed"):
            load(tmp_path / name)
    save(parse(MLP), tmp_path / "said")
    manifest = json.loads((tmp_path / "said" / "manifest.json").read_text())
    manifest["files"]["program.txt"]["bytes"] = 1 << 62
    (tmp_path / "said" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ProgramFileError):
        load(tmp_path / "said")


# ---------------------------------------------------------------- files that are none


def piped(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


NO_FILES: dict[str, Callable[[Path], Any]] = {
    "pipe": piped,
    "socket": listening,
    "directory": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link": lambda path: path.symlink_to(path.parent.parent / f"outside-{path.name}"),
    "circle": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("name", ["manifest.json", "program.txt", "constants.safetensors"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_only_ordinary_files_of_the_directory_are_read(kind: str, name: str, tmp_path: Path) -> None:
    save(parse(MLP), tmp_path / "out")
    (tmp_path / "out" / name).rename(tmp_path / f"outside-{name}")
    NO_FILES[kind](tmp_path / "out" / name)
    with pytest.raises(ProgramFileError):
        load(tmp_path / "out")


def test_a_link_inside_the_directory_is_one_of_its_files(tmp_path: Path) -> None:
    save(parse(MLP), tmp_path / "out")
    (tmp_path / "out" / "program.txt").rename(tmp_path / "out" / "data")
    (tmp_path / "out" / "program.txt").symlink_to("data")
    assert str(load(tmp_path / "out")) == MLP


# ---------------------------------------------------------------- parts that contradict each other


MISFITS = {
    "two inputs": ("input                : f32[3,2]\n  linear", "param w : f32[3,2]\n  linear", "two inputs of the"),
    "an untyped input": (r"x      = input                : f32[3,2]", "x      = input", "'x' of .* has no type"),
    "a gradient of nothing": ("return w=mm", "return v=mm", "gradient of 'v', which the program does not take"),
    "a returned number": ("logits=linear\n\nforward", "logits=3\n\nforward", "returns 3"),
    "a saved value less": ("logits=linear, saved x", "logits=linear", "backward takes 2 and returns 1 values"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_contradict_each_other(case: str, tmp_path: Path) -> None:
    old, new, message = MISFITS[case]
    save(parse(ROLES), tmp_path / "out")
    assert old in ROLES
    rewritten(tmp_path / "out", ROLES.replace(old, new))
    with pytest.raises(ProgramFileError, match=message):
        load(tmp_path / "out")


# ---------------------------------------------------------------- started inside the directory


def test_nothing_of_the_directory_is_imported(tmp_path: Path) -> None:
    """``python -m autopar`` in the directory of a program, and its ranks: what lies there stands for no module."""
    save(parse(ROLES), tmp_path / "out")
    planted = ("torch", "typer", "json", "logging", "re", "sitecustomize", "usercustomize", "rich", "transformers")
    for name in planted:
        (tmp_path / "out" / f"{name}.py").write_text(f"open({str(tmp_path / f'executed-{name}')!r}, 'w')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "autopar", "run", ".", "--json"]
    done = subprocess.run(command, cwd=tmp_path / "out", env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mesh"] == {"tp": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
