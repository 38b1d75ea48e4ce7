"""What notebooks show of programs: HTML that needs nothing else, whatever the names in the program are."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from tests.traces.programs import compiled

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"
VOID = {"rect", "img", "br"}


class Parsed(HTMLParser):
    """The tags of a document, which must be closed in order; and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_self_contained(text: str) -> Parsed:
    found = Parsed(text)
    assert not {"script", "link", "img", "iframe", "object"} & found.tags
    assert not any(name.startswith("on") or name in ("src", "href") for name in found.attributes)
    return found


@pytest.mark.parametrize("name", ["data and tensors", "zero bubble"])
def test_a_program(name: str) -> None:
    program = compiled(name)
    found = check_self_contained(program._repr_html_())
    assert str(program.mesh) in found.text and "blocks.0" in found.text
    assert ("svg" in found.tags) == (name == "zero bubble")


class Net(nn.Module):
    """A module whose name is hostile."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("x<b>y", nn.Linear(4, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {HOSTILE: self.get_submodule("x<b>y")(x).sum()}


def test_names_are_text() -> None:
    program = autopar.compile_program(Net(), Mesh(tp=2), Plan(check_numerics=False), (), {"x": torch.ones(2, 4)})
    found = check_self_contained(program._repr_html_())
    assert HOSTILE in found.text and "x<b>y" in found.text and "b" in found.tags


def test_a_module_before_and_after_its_first_program() -> None:
    net = type("<script>", (Net,), {})()
    parallel = autopar.parallelize(net, Mesh(tp=2), Plan(check_numerics=False))
    assert "no program yet" in check_self_contained(parallel._repr_html_()).text
    parallel.prepare(x=torch.ones(2, 4))
    found = check_self_contained(parallel._repr_html_())
    assert "<script>" in found.text and "mesh(tp=2)" in found.text
