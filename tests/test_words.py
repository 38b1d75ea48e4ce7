"""The words of comments, docstrings and markdown: what they refer to exists, and one thing has one word.

CONTRIBUTING.md has the page of words.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("autopar", "passes", "models", "benchmarks", "tests", "examples")
ROLE = re.compile(r":(?:mod|func|class|meth|attr|data):`~?([\w.]+)`")
PATH = re.compile(r"(?<![\w./<{-])((?:[\w-]+/)*[\w-]+\.(?:py|md))\b")
# Files of users and of other projects, and files that autopar writes.
NOT_OURS = re.compile(r"(?:file|mlp|train|script|model|rank|mine|modeling_\w+)\.py|stage0/rank\.py")
INSTEAD = {  # what a thing was called before -> what it is called
    r"ma(?:de|ke|kes|king) (?:\S+ )?again": "recomputed",
    r"remade": "recomputed (by backward) or duplicated (by stages)",
    r"hand(?:s|ed|ing)? over": "pass, is passed",
    r"as (?:it|they) lies?": "is laid out",
    r"told dtypes?": "dtype at the border",
    r"what [\w`]+(?: [\w`]+)? is of": "the X that ...",
}
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts and not (folder == "autopar" and "passes" in path.relative_to(ROOT).parts)
)
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def prose(source: str) -> Iterator[str]:
    """The docstrings and comments of a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


@cache
def text_of(path: Path) -> str:
    """All prose of a file: a Python file's docstrings and comments, or a page with the lines of its tables."""
    source = path.read_text()
    return source if path.suffix == ".md" else "\n".join(prose(source))


def missing_references(text: str, source: str) -> list[str]:
    """References in ``text`` that lead nowhere; without ``autopar.`` in front, those to names of ``source``."""
    names = set(re.findall(r"\w+", re.sub(ROLE, "", source)))
    return [
        name
        for name in ROLE.findall(text)
        if not (exists(name) if name.startswith("autopar.") else set(name.split(".")) <= names)
    ]


def exists(name: str) -> bool:
    """Whether ``autopar.ir.node.values`` is a module, or a name in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def missing_paths(text: str, folder: Path) -> list[str]:
    """Python and markdown files named in ``text`` that are neither at the root, nor in autopar, nor in ``folder``."""
    places = (ROOT, ROOT / "autopar", folder)
    found = {path for path in PATH.findall(text) if not NOT_OURS.fullmatch(path)}
    return sorted(path for path in found if not any((place / path).exists() for place in places))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_references_lead_somewhere(path: Path) -> None:
    assert missing_references(text_of(path), path.read_text()) == []


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=relative)
def test_paths_exist(path: Path) -> None:
    assert missing_paths(text_of(path), path.parent) == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path != Path(__file__)], ids=relative)
def test_one_word_for_one_thing(path: Path) -> None:
    found = {old: new for old, new in INSTEAD.items() if re.search(rf"\b{old}\b", " ".join(text_of(path).split()))}
    assert not found, f"write instead: {found}"


def test_a_planted_reference_is_found() -> None:
    text = "see :func:`autopar.ir.node.values` and :func:`autopar.ir.node.valuez`, :meth:`there`, :meth:`gone`"
    assert missing_references(text, "def there(): ...") == ["autopar.ir.node.valuez", "gone"]
    paths = "autopar/ir/node.py, ir/node.py, node.py, recorder.py, docs/layers.md"
    assert missing_paths(paths, ROOT / "autopar/ir") == ["docs/layers.md", "recorder.py"]
    assert re.search("|".join(INSTEAD), "what backward makes again")
