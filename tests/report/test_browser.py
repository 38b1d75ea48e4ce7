"""The page in a real browser: what is drawn, clicked, typed, and how it looks on a phone and in the dark.

It needs playwright and a chromium: ``pip install -e .[browser]``, and Debian's package ``chromium``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autopar.memory.device import Device
from autopar.report.collect import document_of, report_of
from autopar.report.document import Document
from autopar.report.page import page_of
from tests.report.programs import program_of, reported

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[browser]")
CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


class Opened:
    """A page in the browser; ``errors``: of its scripts. ``asked``: what it wanted from a network."""

    def __init__(self, browser: Any, path: Path, html: str, **options: Any) -> None:
        path.write_text(html, encoding="utf-8")
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.errors, self.asked = list[str](), list[str]()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")
        self.page.wait_for_selector("#memory .plot svg")

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))


@pytest.fixture(scope="module")
def html() -> str:
    return page_of(Document((reported("llama", "pp=2,dp=2,tp=2", microbatches=4, zero=1),)))


@pytest.fixture
def opened(browser: Any, html: str, tmp_path: Path) -> Iterator[Opened]:
    found = Opened(browser, tmp_path / "page.html", html)
    yield found
    assert not found.errors
    assert found.asked == [(tmp_path / "page.html").as_uri()]
    found.page.close()


def test_all_sections_are_drawn(opened: Opened) -> None:
    names = ["overview", "mesh", "parameters", "block", "memory", "traffic", "pipeline", "plan", "program"]
    assert opened.page.eval_on_selector_all("section", "all => all.map(one => one.id)") == names
    for section in ("memory", "traffic", "pipeline"):
        label = opened.page.get_attribute(f"#{section} svg[role=img]", "aria-label")
        assert label and opened.page.locator(f"#{section} svg[role=img] path, #{section} svg[role=img] rect").count()
    assert opened.page.locator("#block g.call.collective").count() >= 2


def test_a_click_on_a_rank_moves_its_parts(opened: Opened) -> None:
    def held() -> Any:
        script = "all => all.map(one => one.classList.contains('held'))"
        return opened.page.eval_on_selector_all('[data-name="tokens.weight"] .cell', script)

    before = held()
    opened.page.click('button[aria-label^="rank 3:"]')
    assert sum(held()) == sum(before) == 1 and held() != before
    assert "Rank 3 is in a group with 2, 3" in opened.text("#mesh ul")
    opened.page.click('button[aria-label^="rank 7:"]')
    assert opened.page.locator('[data-name="tokens.weight"] svg.absent').count() == 1
    assert "place 1" in opened.text("#traffic")


def test_ranks_are_walked_by_keys(opened: Opened) -> None:
    opened.page.focus('button.rank[aria-pressed="true"]')
    for key, rank in (("ArrowRight", 1), ("ArrowDown", 3), ("ArrowLeft", 2), ("ArrowLeft", 2)):
        opened.page.keyboard.press(key)
        assert opened.page.evaluate("document.activeElement.textContent") == str(rank)
    opened.page.fill('input[aria-label="Rank"]', "6")
    assert opened.page.locator('button.rank[aria-pressed="true"]').inner_text() == "6"


def test_a_parameter_opens_with_its_reasons(opened: Opened) -> None:
    opened.page.focus('[data-name="blocks.0.attn.q.weight"] > summary')
    opened.page.keyboard.press("Enter")
    assert "whole on every rank would cost" in opened.text('[data-name="blocks.0.attn.q.weight"] pre')
    opened.page.fill('input[aria-label="Find a parameter"]', "gate")
    assert opened.page.locator("details.parameter:not(.hidden)").count() == 1
    assert "1 of" in opened.text("#parameters [role=status]")
    opened.page.fill('input[aria-label="Find a parameter"]', "")
    assert opened.page.locator("details.parameter.hidden").count() == 0


def test_a_call_of_a_block_is_chosen_by_keys(opened: Opened) -> None:
    opened.page.focus('#block g.call.collective[aria-label^="all_reduce over tp"]')
    opened.page.keyboard.press("Enter")
    assert "all_reduce over tp: a rank sends" in opened.text("#block .chosen")
    before = opened.page.locator("#block g.call").count()
    opened.page.check("#block input[type=checkbox]")
    assert opened.page.locator("#block g.call").count() > before


def test_the_program_is_searched(opened: Opened) -> None:
    opened.page.fill('input[aria-label="Search the program"]', "comm.all_reduce")
    status = "#program [role=status]"
    assert opened.text(status).startswith("1 of ")
    count = int(opened.text(status).split(" of ")[1])
    assert opened.page.locator("#program mark").count() == count > 3
    opened.page.keyboard.press("Shift+Enter")
    assert opened.text(status) == f"{count} of {count}"
    opened.page.fill('input[aria-label="Search the program"]', "no such text")
    assert opened.text(status) == "no match"


def test_the_colours_can_be_switched(opened: Opened) -> None:
    def becomes(theme: str) -> Any:
        opened.page.wait_for_selector(f"html[data-theme={theme}]")
        return opened.page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = becomes("light")
    opened.page.emulate_media(color_scheme="dark")
    assert (dark := becomes("dark")) != light
    opened.page.click("#theme")
    assert becomes("light") == light
    opened.page.click("#theme")
    assert becomes("dark") == dark


def test_a_phone_needs_no_scrolling_to_the_side(browser: Any, html: str, tmp_path: Path) -> None:
    phone = Opened(browser, tmp_path / "page.html", html, viewport={"width": 360, "height": 740})
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert not phone.errors


def test_two_plans_stand_side_by_side(browser: Any, tmp_path: Path) -> None:
    programs = [program_of("mlp", "dp=2,tp=2"), program_of("mlp", "dp=4", zero=3)]
    document = document_of([report_of("mlp", program) for program in programs], programs)
    both = Opened(browser, tmp_path / "page.html", page_of(document))
    boxes = [one.bounding_box() for one in both.page.query_selector_all("#memory .side")]
    assert len(boxes) == 2 and boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    assert "most memory of a rank" in both.text("#overview table")
    both.page.set_viewport_size({"width": 360, "height": 740})
    boxes = [one.bounding_box() for one in both.page.query_selector_all("#memory .side")]
    assert boxes[0]["y"] < boxes[1]["y"] and not both.errors


@pytest.mark.parametrize(
    "model, mesh, choices",
    [
        ("mlp", "dp=1", {}),
        ("moe", "ep=2,dp=2,tp=2", {"zero": 3}),
        ("llama", "sp=2,tp=2", {"attention": "ring"}),
        ("gpt", "dp=1,tp=4", {}),
        ("llama", "pp=2", {"microbatches": 4, "schedule": "zb-v"}),
    ],
)
def test_other_programs_are_drawn(browser: Any, tmp_path: Path, model: str, mesh: str, choices: dict[str, Any]) -> None:
    found = Opened(browser, tmp_path / "page.html", page_of(Document((reported(model, mesh, **choices),))))
    assert found.page.locator("details.parameter .cell.held").count() and not found.errors


def test_what_does_not_fit_is_said(browser: Any, tmp_path: Path) -> None:
    program = program_of("mlp", "dp=2,tp=2")
    report = report_of("mlp", program, device=Device(200_000, fixed=0))
    found = Opened(browser, tmp_path / "page.html", page_of(Document((report,))))
    assert "It does not fit, by" in found.text("#memory") and "zero=3" in found.text("#memory ul:last-child")
    assert "device: 200 kB" in found.text("#memory figure") and not found.errors


def test_hostile_names_run_nothing(browser: Any, tmp_path: Path) -> None:
    report = reported("mlp", "dp=2,tp=2")
    hostile = '</script><img src=x onerror="window.hurt=1"><script>window.hurt=1</script>'
    module = replace(report.modules, name=hostile)
    document = Document((replace(report, model=hostile, text=hostile, modules=module),), hostile)
    found = Opened(browser, tmp_path / "page.html", page_of(document))
    assert found.page.evaluate("window.hurt === undefined") and hostile in found.text("#program pre")
    assert not found.errors and found.page.locator("img").count() == 0
