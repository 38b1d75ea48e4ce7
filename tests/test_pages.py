"""The site of docs/: it is built without a warning and without a network, and what its pages quote is in the code."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import autopar
from tests.test_layering import sources, tree_of

ROOT = Path(__file__).parents[1]
ELLIPSIS = "…"
SAYING = re.compile(r"Way out|Error\(|warn")  # in files that have messages for users
QUOTED = re.compile(r"^\*\*`(.*)`\*\*$", re.M)
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\ssrc="(?:https?:)?//[^"]*"|<link\b[^>]*\shref="(?:https?:)?//'
)


def texts_of(tree: ast.AST) -> Iterator[str]:
    """The strings of a module but for its docstrings; where an f-string has a value, an ellipsis."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else ELLIPSIS for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@cache
def texts() -> tuple[str, ...]:
    paths = [path for path in sources("autopar", "passes") if SAYING.search(path.read_text(encoding="utf-8"))]
    return tuple(text for path in paths for text in texts_of(tree_of(path)))


def is_said(message: str) -> bool:
    """Whether a text of the code has the words between the ellipses of ``message``, in their order."""
    words = [part.strip() for part in message.split(ELLIPSIS) if part.strip()]
    inorder = re.compile(".*?".join(map(re.escape, words)), re.S)
    return any(inorder.search(text) for text in texts() if all(word in text for word in words))


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    messages = QUOTED.findall((ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"))
    assert len(messages) >= 25
    assert [message for message in messages if not is_said(message)] == []


def test_a_message_that_nobody_says_is_found() -> None:
    assert is_said("… needs … processes and this is a single one")
    assert not is_said("… needs … processes and this is a married one")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. ``strict`` in mkdocs.yml: a link or an anchor that leads nowhere is an error."""
    pytest.importorskip("mkdocs", reason="pip install 'autopar[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    made = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(made))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    config.plugins.on_shutdown()
    return made


def test_every_page_is_in_the_site_and_fetches_nothing(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        built = site / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")
        assert not FETCHED.findall(built.read_text(encoding="utf-8")), page.name


def test_messages_and_docstrings_are_found_by_searching(site: Path) -> None:
    found = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    words = " ".join(entry["title"] + entry["text"] for entry in found)
    assert [name for name in autopar.__all__ if name not in words and not name.startswith("__")] == []
    assert "was built on the meta device" in words
    assert "a drop-in" in words  # of the docstring of parallelize


def test_what_would_be_fetched_is_found() -> None:
    assert FETCHED.search('<script async src="https://cdn.example/x.js">')
    assert FETCHED.search('<link rel="stylesheet" href="//fonts.example/css">')
    assert not FETCHED.search('<a href="https://example.org">')
