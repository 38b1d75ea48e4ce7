"""The house rules: imports go one way, one door to node.meta, small files and functions, names that say something."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("autopar", "passes", "models", "tests", "benchmarks", "examples")
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60
DULL = {"util", "utils", "helper", "helpers", "manager", "common", "core", "misc"}
ABOVE_PASSES = {"autopar.driver"}  # the one module that may import passes
FLOORS = (  # from the ground up; a name stands for the package below it too
    ("errors", "mesh"),
    ("layout", "plan"),
    ("program", "comm"),
    ("text", "invariants", "trace", "operators", "emit"),
    ("rules", "pipeline", "differentiate", "simulate", "runtime"),
    ("split",),
    ("passes",),
    ("module", "driver"),
    ("commands",),
    ("__main__",),
)


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if ROOT / "autopar" / "passes" not in path.parents)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("autopar", *parts) if parts[0] == "passes" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {module_name(path): path for path in sources("autopar", "passes", "models")}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


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
    return {name for node in ast.walk(tree_of(path)) for name in imported(node)}


def imports_at_start(path: Path) -> set[str]:
    """What is loaded with the module: not inside functions, not under ``if TYPE_CHECKING``."""

    def visit(statements: list[ast.stmt]) -> Iterator[str]:
        for node in statements:
            yield from imported(node)
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if isinstance(node, (ast.If, ast.Try, ast.With)) and not typing_only:
                yield from visit(node.body)

    return set(visit(tree_of(path).body))


def test_models_stand_apart() -> None:
    for path in sources("models"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in {"torch", "models", *STANDARD}, f"{path} imports {name}; models import torch only"


STANDARD = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "typing"}


def test_only_the_driver_imports_passes() -> None:
    for name, path in OURS.items():
        if name in ABOVE_PASSES or name.startswith("autopar.passes"):
            continue
        found = sorted(other for other in imports(path) if other.startswith("autopar.passes"))
        assert not found, f"{name} imports {found}; only {ABOVE_PASSES} may"


def test_passes_do_not_import_each_other() -> None:
    for path in sources("passes"):
        if path.name == "__init__.py":
            continue
        found = sorted(other for other in imports(path) if other.startswith(("autopar.passes", "passes")))
        assert not found, f"{path.name} imports {found}; what two passes share belongs into autopar/"


def test_nothing_imports_models() -> None:
    for path in sources("autopar", "passes"):
        found = sorted(name for name in imports(path) if name.split(".")[0] == "models")
        assert not found, f"{path} imports {found}"


def needs() -> dict[str, set[str]]:
    """Module -> those of ours that load with it."""
    found = {name: {other for other in imports_at_start(path) if other in OURS} for name, path in OURS.items()}
    for name in found:
        # a package's __init__ loads first, but its submodules do not lean on it
        found[name] -= {name, *(name[:i] for i, letter in enumerate(name) if letter == ".")}
    return found


def everything_needed(table: dict[str, set[str]]) -> dict[str, set[str]]:
    """``table`` with what the needed modules need, and so on; fails where something needs itself."""
    found: dict[str, set[str]] = {}

    def climb(name: str, above: tuple[str, ...]) -> set[str]:
        assert name not in above, "imports go in circles: " + " -> ".join([*above[above.index(name) :], name])
        if name not in found:
            found[name] = table[name].union(*(climb(other, (*above, name)) for other in sorted(table[name])))
        return found[name]

    for name in table:
        climb(name, ())
    return found


def floor(name: str) -> int | None:
    for number, rooms in enumerate(FLOORS):
        if any(f"{name}.".startswith(f"autopar.{room}.") for room in rooms):
            return number
    return None


def test_imports_go_one_way() -> None:
    for name, needed in everything_needed(needs()).items():
        own = floor(name)
        for other in needed:
            found = floor(other)
            assert own is None or found is None or found <= own, f"{name} (floor {own}) needs {other} (floor {found})"


def test_a_circle_is_found() -> None:
    with pytest.raises(AssertionError, match="a -> b -> c -> a"):
        everything_needed({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_only_program_touches_meta() -> None:
    for name, path in OURS.items():
        if name == "autopar.program":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and node.attr == "meta":
                raise AssertionError(f"{path}:{node.lineno} touches .meta; program.py has functions for it")


@pytest.mark.parametrize("path", sources(*FOLDERS), ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    where = path.relative_to(ROOT).as_posix()
    lines = text.count("\n")
    assert lines <= MOST_LINES, f"{where} has {lines} lines, at most {MOST_LINES}"
    assert not DULL & set(path.stem.split("_")), f"{where}: a name that says what is in it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{where}:{node.lineno} {node.name} has {length} lines"
