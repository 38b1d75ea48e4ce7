"""The README and the pages of docs/ are true: Python blocks run, what they print is compared, commands too."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from autopar.__main__ import main
from autopar.ir.tables import InputKind, OutputKind
from autopar.plan import Plan
from autopar.rules import RULES
from tests.launch import run_ranks
from tests.selection import slow_but
from tests.test_layering import STANDS_ON

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BY_DEFAULT = ("README.md",)  # whose scripts for torchrun are not slow
NEEDS = {  # page -> what its blocks import, beside what every installation has
    "checkpoints.md": ("transformers",),
    "frameworks.md": ("transformers", "accelerate", "lightning", "peft"),
}
RUN_HERE = ("autopar show", "autopar check")  # the others install things, or start processes
NUMBER = re.compile(r"\d[\d.,e+-]*( (B|kB|MB|GB|TB)\b)?")
SMALLER = {"models.llama:llama_70b": "--config layers=4"}  # the same lines, with other numbers, in less time
OUR_PATH = re.compile(r"`((?:autopar|passes|models|tests|docs|examples)/[\w./]*)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


def blocks(page: Path, language: str) -> Iterator[tuple[Block, Block | None]]:
    """The blocks of a language, each with the block that follows it."""
    found: list[Block] = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        line = page.read_text(encoding="utf-8").count("\n", 0, match.start()) + 2
        found.append(Block(match[1], match[2], line))
    for block, after in zip(found, [*found[1:], None]):
        if block.language == language:
            yield block, after


def compiled(block: Block, page: Path = README) -> Any:
    return compile("\n" * (block.line - 1) + block.text, str(page), "exec")


def is_script(block: Block) -> bool:
    """Whether the block is a file of its own, for torchrun."""
    return "torchrun" in block.text.splitlines()[0]


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page, "python"))], ids=lambda page: page.name)
def test_python_blocks(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as if in one session; rules that a page registers are gone after it."""
    monkeypatch.setattr("autopar.rules.RULES", dict(RULES))
    for name in NEEDS.get(page.name, ()):
        pytest.importorskip(name, reason=f"{page.name} imports {name}")
    session: dict[str, Any] = {"__name__": page.stem}
    compared = 0
    for block, after in blocks(page, "python"):
        if is_script(block):
            continue
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compiled(block, page), session)
        if after is not None and after.language == "text":
            assert printed.getvalue() == after.text, f"{page.name} line {after.line}"
            compared += 1
    assert compared


def run_script(number: int) -> None:
    """What torchrun does with a script, here with the ``number``-th of all pages."""
    exec(compiled(scripts()[number]), {"__name__": "__main__"})


def scripts() -> list[Block]:
    return [block for page in PAGES for block, _ in blocks(page, "python") if is_script(block)]


def of_which_some_are_slow() -> list[Any]:
    """The numbers of the scripts; those of one page run by default."""
    pages = [page.name for page in PAGES for block, _ in blocks(page, "python") if is_script(block)]
    return slow_but([place for place, page in enumerate(pages) if page in BY_DEFAULT], range(len(pages)))


@pytest.mark.parametrize("number", of_which_some_are_slow())
def test_scripts(number: int) -> None:
    pytest.importorskip("transformers")
    found = re.search(r"--nproc-per-node (\d+)", scripts()[number].text)
    assert found
    run_ranks(run_script, int(found[1]), number)


def commands() -> list[tuple[str, str]]:
    """Command and output of every console block that can be run here."""
    found = []
    for block, _ in blocks(README, "console"):
        first, _, output = block.text.partition("\n")
        assert first.startswith("$ "), f"README line {block.line}: a console block starts with $"
        if first[2:].startswith(RUN_HERE):
            found.append((first[2:], output))
    return found


@pytest.mark.parametrize("command, output", commands(), ids=[command for command, _ in commands()])
def test_console_blocks(
    command: str, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output is that of the README, up to its numbers, which differ in the last digits and in seconds."""
    more = next((words for name, words in SMALLER.items() if name in command), "")
    monkeypatch.setattr(sys, "argv", shlex.split(f"{command} {more}"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert shape(capsys.readouterr().out) == shape(output)


def shape(text: str) -> list[str]:
    """The words of each line, numbers as N and rulers left out: widths follow the numbers."""
    lines = [" ".join(NUMBER.sub("N", line).split()) for line in text.splitlines()]
    return [line for line in lines if line.strip("─")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_paths_in_pages() -> None:
    """What is named like a file of this repository is one."""
    for page in PAGES:
        for name in re.findall(
            r"`((?:autopar|passes|models|tests|docs|examples)/[\w./]*)`", page.read_text(encoding="utf-8")
        ):
            example = "cut_stages" in name
            assert example or (ROOT / name).exists(), f"{page.name} names {name}, which is not there"


def test_the_page_of_the_plan_has_every_choice() -> None:
    """Each choice has its paragraph, and an example that sets it."""
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    examples = "".join(block.text for block, _ in blocks(ROOT / "docs" / "plan.md", "python"))
    for entry in fields(Plan):
        assert f"**`{entry.name}`**" in page, f"docs/plan.md says nothing about {entry.name}"
        assert f"{entry.name}=" in examples, f"docs/plan.md has no example of {entry.name}"
    assert "Plan.from_tp_plan(" in examples


def test_the_map_has_every_room() -> None:
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8").partition("## The map")[2]
    for room in STANDS_ON.keys() - {"autopar", "__main__", "passes"}:
        assert f"`autopar/{room}/`" in page or f"`autopar/{room}.py`" in page, f"{room} is not on the map"


def test_the_answers_to_ten_questions_are_where_it_says() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Ten questions")[2].partition("\n## ")[0]
    answers = re.findall(r"^\| .*\? \| `(.*)` \| `(.*)` \|$", page, re.M)
    assert len(answers) == 10
    for file, words in answers:
        assert words in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {words}"


def test_the_words_of_the_text_form_are_explained() -> None:
    """Every kind of input and output, and every collective, stands on the page."""
    page = (ROOT / "docs" / "text_form.md").read_text(encoding="utf-8")
    for kind in [*InputKind, *OutputKind]:
        assert kind is OutputKind.USER or re.search(rf"`{kind.value}\b", page), f"{kind.value} is not explained"
    for word in ("also", "nograd", "grad", "saved", "start_all_reduce", "wait", "return"):
        assert re.search(rf"`(comm\.)?{word}\b", page), f"{word} is not explained"
