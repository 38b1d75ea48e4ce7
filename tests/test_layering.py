"""The house rules: rooms stand on rooms below, one door to node.meta, small files and functions, names that speak."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).parent.parent
FOLDERS = ("autopar", "passes", "models", "tests", "benchmarks", "examples")
MOST_LINES, MOST_LINES_OF_A_PASS, MOST_LINES_OF_A_FUNCTION = 400, 200, 60
DULL = {"util", "utils", "helper", "helpers", "manager", "common", "core", "misc"}

# Who may stand on whom. A room is a folder of autopar/, or a file of its root; from the ground up. "*" is everything
# that stands above it in this table. Imports inside functions and for typing count too.
STANDS_ON = {
    "notes": "",
    "errors": "",
    "plain_files": "",
    "mesh": "errors notes",
    "precision": "errors",
    "operators": "",
    "models": "",
    "zoo": "errors models",
    "schedules": "errors",
    "plan": "errors precision schedules",
    "ir": "errors mesh operators plan schedules",
    "rules": "ir mesh operators",
    "data": "errors ir mesh plan",
    "masks": "ir operators",
    "experts": "ir operators rules",
    "cost": "ir mesh operators",
    "codegen": "errors ir mesh operators",
    "families": "errors ir mesh",
    "program_files": "errors families ir mesh notes plain_files plan",
    "observation": "errors ir",
    "selections": "errors ir mesh observation rules",
    "frontend": "errors ir mesh notes observation operators plan selections",
    "autodiff": "cost errors ir mesh operators",
    "split": "cost errors ir mesh notes operators rules",
    "routing": "errors ir mesh operators rules split",
    "pipeline": "cost errors ir mesh plan schedules",
    "memory": "autodiff ir mesh operators pipeline plan schedules",
    "analysis": "autodiff cost errors ir memory mesh pipeline plan schedules",
    "inductor": "codegen errors ir mesh notes",
    "simulator": "autodiff codegen errors inductor ir mesh pipeline plan schedules",
    "simulate": "errors ir mesh pipeline simulator",
    "dtensors": "errors ir notes",
    "communication": "dtensors errors ir mesh schedules",
    "weights": "autodiff communication dtensors errors ir mesh notes pipeline",
    "runtime": "autodiff codegen communication dtensors errors families inductor ir mesh pipeline schedules weights",
    "calls": "autodiff communication dtensors errors families ir mesh notes pipeline plan runtime weights",
    "traces": "autodiff communication cost errors ir mesh pipeline schedules",
    "report": "analysis ir memory mesh pipeline plan schedules",
    "levels": "ir pipeline",
    "passes": (
        "autodiff errors experts frontend ir levels masks mesh notes operators pipeline routing rules schedules split"
    ),
    "choices": "ir mesh plan",
    "compiler": "choices errors frontend ir mesh observation passes pipeline plan",
    "other_methods": "errors plan precision",
    "reference": "compiler errors frontend ir mesh pipeline plan simulate simulator",
    "check": "compiler errors frontend ir mesh pipeline plan precision reference simulate simulator",
    "proof": (
        "autodiff check codegen compiler errors frontend ir levels mesh notes operators pipeline plan "
        "runtime schedules simulate simulator"
    ),
    "cache": (
        "compiler errors families frontend ir mesh notes observation plain_files plan precision "
        "program_files proof schedules"
    ),
    "fitting": "analysis compiler cost errors frontend ir memory mesh pipeline plan schedules",
    "holding": "cache calls families frontend ir mesh observation plan weights",
    "module": (
        "analysis cache calls communication dtensors errors families frontend holding ir mesh other_methods "
        "pipeline plan runtime schedules simulate simulator traces weights"
    ),
    "compiled_family": "cache calls choices errors families frontend ir mesh plan runtime",
    "stored_programs": "cache errors families frontend ir mesh plan program_files runtime",
    "compiled_models": "",
    "hidden_modules": "notes",
    "api": (
        "choices communication compiled_models errors frontend hidden_modules mesh module other_methods plan "
        "stored_programs"
    ),
    "verification": "analysis check cost errors ir mesh operators pipeline plan rules simulator split",
    "checkpoint": "communication dtensors errors ir mesh module plain_files weights",
    "exporters": (
        "checkpoint communication errors families ir mesh operators pipeline program_files schedules simulator traces"
    ),
    "pretrained": "api checkpoint errors mesh module plan weights zoo",
    "frameworks": "checkpoint errors mesh module other_methods pretrained",
    "training": "api checkpoint communication cost data errors ir mesh module notes plan pretrained traces zoo",
    "autopar": "*",  # the package itself: its names are imported at first use
    "commands": "*",
    "__main__": "*",
}
# The one exception: what a user calls as a method of a program is done by rooms above it, imported when it is called.
PROGRAM = "autopar.ir.program"
METHODS_OF_PROGRAM = {
    "autopar.codegen.python": "program.rank(3).code",
    "autopar.program_files.program_file": "program.save(directory), Program.load(directory)",
    "autopar.analysis.explain": "program.explain(name)",
    "autopar.memory.table": "program.memory()",
    "autopar.analysis.notebook": "program, as the last line of a notebook's cell",
}


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    links = {ROOT / "autopar" / "passes", ROOT / "autopar" / "models"}  # of folders at the top
    return sorted(path for path in found if not links & set(path.parents))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("autopar", *parts) if parts[0] in ("passes", "models") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {module_name(path): path for path in sources("autopar", "passes", "models")}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree_of(path)))


def imported(node: ast.AST) -> list[str]:
    """Modules that an import statement may load: of ``from a import b`` both a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide where a name comes from"
        module = node.module or ""
        return [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return []


def imports(path: Path) -> set[str]:
    return {name for node in nodes_of(path) for name in imported(node)}


def test_models_stand_apart() -> None:
    for path in sources("models"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in {"torch", *STANDARD}, f"{path} imports {name}; models import torch only"


STANDARD = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "typing"}


def test_passes_do_not_import_each_other() -> None:
    for path in sources("passes"):
        if path.name == "__init__.py":
            continue
        found = sorted(other for other in imports(path) if other.startswith(("autopar.passes", "passes")))
        assert not found, f"{path.name} imports {found}; what two passes share belongs into autopar/"


@pytest.mark.parametrize("path", sources("passes"), ids=lambda p: p.stem)
def test_a_pass_is_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    where = "library code belongs into autopar/"
    assert lines <= MOST_LINES_OF_A_PASS, f"{path.name} has {lines} lines, at most {MOST_LINES_OF_A_PASS}; {where}"


def test_nothing_imports_models() -> None:
    for path in sources("autopar", "passes"):
        found = sorted(name for name in imports(path) if name.startswith(("models", "autopar.models")))
        assert not found or path.parts[-2:] == ("zoo", "named.py"), f"{path} imports {found}"


def room(name: str) -> str:
    """The room of a module: ``autopar.ir.text`` is in ``ir``, ``autopar.plan`` is a room of its own."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def needed(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module -> those of ours that its file imports anywhere: at its head, inside functions, for typing."""
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        found[name] = {
            f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in modules else str(node.module)
            for node in nodes_of(path)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        found[name] |= {name for node in nodes_of(path) if isinstance(node, ast.Import) for name in imported(node)}
        found[name] = {other for other in found[name] if other in modules} - {name}
    return found


def without_exceptions(table: Mapping[str, set[str]]) -> dict[str, set[str]]:
    return {name: others - METHODS_OF_PROGRAM.keys() if name == PROGRAM else others for name, others in table.items()}


def check_rooms(table: Mapping[str, set[str]]) -> None:
    """Fails for a module that stands on a room which its own may not stand on."""
    for name, others in table.items():
        own = room(name)
        assert own in STANDS_ON, f"{name}: a new room; say in STANDS_ON what it stands on"
        for other in sorted(others):
            allowed = STANDS_ON[own].split()
            fits = room(other) == own or "*" in allowed or room(other) in allowed
            assert fits, f"{name} imports {other}: '{own}' stands on {', '.join(allowed) or 'nothing'}"


def check_no_circle(table: Mapping[str, set[str]]) -> None:
    try:
        list(TopologicalSorter(table).static_order())
    except CycleError as problem:
        raise AssertionError("imports go in circles: " + " -> ".join(reversed(problem.args[1]))) from None


def test_rooms_stand_on_rooms_below() -> None:
    check_rooms(without_exceptions(needed(OURS)))


def test_the_table_of_rooms_is_tight() -> None:
    """Every room named exists, stands above what it stands on, and really needs it."""
    table = without_exceptions(needed(OURS))
    order = list(STANDS_ON)
    for own, allowed in STANDS_ON.items():
        used = {room(other) for name, others in table.items() if room(name) == own for other in others} - {own}
        if allowed != "*":
            assert set(allowed.split()) == used, f"{own} needs {sorted(used)}"
            assert all(order.index(other) < order.index(own) for other in used), own


def test_no_file_imports_in_a_circle() -> None:
    check_no_circle(without_exceptions(needed(OURS)))


def test_the_exceptions_are_needed() -> None:
    assert needed(OURS)[PROGRAM] >= METHODS_OF_PROGRAM.keys()


def test_a_circle_is_found() -> None:
    with pytest.raises(AssertionError, match="imports go in circles"):
        check_no_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize(
    "line",
    [
        "from autopar.passes.split_batch import split_batch\n",
        "def f():\n    from autopar.compiler import compile_program\n",
        "if TYPE_CHECKING:\n    from autopar.communication.connect import Connection\n",
        "import autopar.communication.connect\n",
        "from autopar.communication import connect\n",
    ],
)
def test_a_planted_upward_import_is_found(line: str, tmp_path: Path) -> None:
    planted = tmp_path / "layout.py"
    planted.write_text(OURS["autopar.ir.layout"].read_text(encoding="utf-8") + line, encoding="utf-8")
    with pytest.raises(AssertionError, match="autopar.ir.layout imports autopar"):
        check_rooms(without_exceptions(needed({**OURS, "autopar.ir.layout": planted})))


def test_only_node_touches_meta() -> None:
    for name, path in OURS.items():
        if name == "autopar.ir.node":
            continue
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and node.attr == "meta":
                raise AssertionError(f"{path}:{node.lineno} touches .meta; ir/node.py has functions for it")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def private_names(path: Path) -> set[str]:
    """What a file defines with an underscore: functions, classes, constants, methods, attributes of its objects."""
    found: set[str] = set()
    for node in nodes_of(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if is_private(name)}


def private_reads(path: Path, elsewhere: set[str]) -> list[tuple[int, str]]:
    """(line, name) of private names of ours that a file imports, or reads of an object, and does not define itself."""
    found = [
        (node.lineno, alias.name)
        for node in nodes_of(path)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "autopar"
        for alias in node.names
        if is_private(alias.name)
    ]
    strangers = elsewhere - private_names(path)
    found += [
        (node.lineno, node.attr)
        for node in nodes_of(path)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr in strangers
    ]
    return sorted(found)


def check_private_names(modules: Mapping[str, Path]) -> None:
    ours = set().union(*map(private_names, modules.values())) - TORCHS_OWN
    for path in modules.values():
        for line, read in private_reads(path, ours):
            raise AssertionError(f"{path}:{line} reads '{read}', which is private to another file")


# names that torch's own objects have too: of such a read the text does not say whose it is
TORCHS_OWN = {name for one in (nn.Module(), torch.Tensor(), DTensor, torch.ops.aten.add.Tensor) for name in dir(one)}


def test_no_file_reads_private_names_of_another() -> None:
    check_private_names(OURS)


@pytest.mark.parametrize(
    "line",
    [
        "from autopar.ir.text import _Lines\n",
        "def f(model):\n    return model._held\n",
        "def f(model):\n    model._held.calls = 1\n",
        "class A:\n    def f(self):\n        return self._programs\n",
    ],
)
def test_a_planted_private_read_is_found(line: str, tmp_path: Path) -> None:
    planted = tmp_path / "layout.py"
    planted.write_text(OURS["autopar.ir.layout"].read_text(encoding="utf-8") + line, encoding="utf-8")
    with pytest.raises(AssertionError, match="is private to another file"):
        check_private_names({**OURS, "autopar.ir.layout": planted})


@pytest.mark.parametrize("path", sources(*FOLDERS), ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    where = path.relative_to(ROOT).as_posix()
    lines = text.count("\n")
    assert lines <= MOST_LINES, f"{where} has {lines} lines, at most {MOST_LINES}"
    assert not DULL & set(path.stem.split("_")), f"{where}: a name that says what is in it"
    for node in nodes_of(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{where}:{node.lineno} {node.name} has {length} lines"
