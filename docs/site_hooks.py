"""Hooks of mkdocs: pages and names that nobody has put anywhere are in the site too; roles of docstrings are words."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "autopar"
ROLE = re.compile(r":(?:mod|func|class|meth|attr|data):<code>~?")


def named(nav: Any) -> set[str]:
    """The pages in a navigation: lists, and dicts of a title with a page or a list."""
    if isinstance(nav, str):
        return {nav}
    entries = nav.values() if isinstance(nav, dict) else nav
    return {page for entry in entries for page in named(entry)}


def on_config(config: Any) -> Any:
    """Put the pages that no section names under "More"."""
    pages = {path.name for path in Path(config["docs_dir"]).glob("*.md")}
    if more := sorted(pages - named(config["nav"])):
        config["nav"].append({"More": more})
    return config


def exported() -> list[str]:
    """What ``import autopar`` gives, but for its errors and its version."""
    names: list[str] = []
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
    errors = ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8")).body
    classes = {node.name for node in errors if isinstance(node, ast.ClassDef)}
    return [name for name in names if name not in classes and not name.startswith("__")]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """On the page of the API, the names that it does not have follow under "More"."""
    if page.file.src_uri != "api.md":
        return markdown
    there = set(re.findall(r"^::: autopar\.(\w+)$", markdown, re.M))
    more = [f"::: autopar.{name}" for name in exported() if name not in there]
    return "\n\n".join([markdown, "## More", *more]) if more else markdown


def on_page_content(html: str, **_: Any) -> str:
    """``:func:`autopar.compile_program``` of a docstring as the name alone."""
    return ROLE.sub("<code>", html)
