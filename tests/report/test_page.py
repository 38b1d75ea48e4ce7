"""The page is one file that loads nothing, and runs no text that comes from a model."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from autopar.report.document import Document
from autopar.report.page import page_of
from tests.report.programs import reported

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028$title"
MOST_BYTES = 3_000_000


class Elements(HTMLParser):
    """The start tags with their attributes, and the texts of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
            self.in_script = True

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(Document((reported("mlp", "dp=2,tp=2"),)))


def policy_of(found: Elements) -> str:
    (policy,) = [a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    return policy or ""


def test_nothing_is_loaded(page: str) -> None:
    found = Elements(page)
    assert len(page.encode()) < MOST_BYTES
    assert not [a for _, a in found.tags if "src" in a or (a.get("href") or "#")[0] != "#"]
    assert not {tag for tag, _ in found.tags} & {"link", "iframe", "img", "object", "embed", "base"}
    assert policy_of(found).startswith("default-src 'none'")


def test_only_the_own_scripts_may_run(page: str) -> None:
    found = Elements(page)
    document, *scripts = found.scripts
    assert json.loads(document)["form"] == "autopar report 1"
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy_of(found)
    assert len(scripts) == 4 and "unsafe-inline" not in policy_of(found).split("script-src")[1]


def test_the_document_comes_back(page: str) -> None:
    document = Document((reported("mlp", "dp=2,tp=2"),))
    assert json.loads(Elements(page).scripts[0]) == json.loads(json.dumps(document.to_json()))


def test_hostile_names_stay_text() -> None:
    report = reported("mlp", "dp=2,tp=2")
    hostile = replace(report, model=HOSTILE, text=HOSTILE, modules=replace(report.modules, name=HOSTILE))
    page = page_of(Document((hostile,), differences=HOSTILE))
    found, plain = Elements(page), Elements(page_of(Document((report,))))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    document = json.loads(found.scripts[0])
    assert document["reports"][0]["text"] == document["differences"] == HOSTILE


def test_the_page_says_what_it_is_to_a_reader_of_screens(page: str) -> None:
    found = Elements(page)
    assert ("html", {"lang": "en"}) in found.tags
    assert any(a.get("name") == "viewport" for _, a in found.tags)
    assert {"main", "nav", "header", "h1", "footer"} <= {tag for tag, _ in found.tags}
