"""Options and fixtures that all tests share."""

from __future__ import annotations

import difflib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch.distributed

from tests.selection import repeated_by, without_a_test

hypothesis.settings.register_profile("any machine", deadline=None)  # no test fails for a busy machine
hypothesis.settings.load_profile("any machine")

GOLDEN = Path(__file__).parent / "golden"

WITHOUT_A_TEST = pytest.StashKey[list[str]]()  # lines of tests/selection.py

Golden = Callable[[str, object], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt instead of comparing")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()  # a quarter of the time in which 13,000 tests are collected is looking for garbage
    try:
        return (yield)
    finally:  # also where others collect, as with -n
        gc.enable()
        gc.collect()
        gc.freeze()  # nor are tests and modules garbage afterwards
        gc.set_threshold(10_000, 10, 10)  # a trace makes so many objects at once


@pytest.hookimpl(tryfirst=True)  # before the marks choose what runs
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = [item.nodeid.partition("tests/")[2] for item in items]
    for item, name in zip(items, names):
        if repeated_by(name):
            item.add_marker(pytest.mark.slow)
    if not any("::" in argument for argument in config.args):  # whole files
        config.stash[WITHOUT_A_TEST] = without_a_test(names)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """``golden("name", program)``: its text equals tests/golden/name.txt, which ``--update-golden`` writes."""
    update = bool(request.config.getoption("--update-golden"))

    def check(name: str, subject: object) -> None:
        path, found = GOLDEN / f"{name}.txt", str(subject).rstrip() + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found, encoding="ascii")
            return
        way_out = "if this is right: pytest --update-golden"
        expected = path.read_text(encoding="ascii") if path.exists() else ""
        if found != expected:
            lines = difflib.unified_diff(expected.splitlines(), found.splitlines(), str(path), "now", lineterm="")
            pytest.fail("\n".join([f"the text changed; {way_out}", *lines]), pytrace=False)

    return check


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A mesh of one rank makes a process group of its own, which the next test would take for a launch."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True, scope="session")
def failures_leave_nothing_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The programs that failed passes leave are in a directory of the test run, for its processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOPAR_DUMP_DIR", str(tmp_path_factory.mktemp("failures")))
        yield


@pytest.fixture(autouse=True, scope="session")
def nothing_is_cached() -> Iterator[None]:
    """Every test compiles, and none reads or writes the cache of the user; those of the cache have one each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOPAR_CACHE", "0")
        yield


@pytest.fixture(autouse=True)
def default_dtype_is_kept() -> Iterator[None]:
    """Tests that compute in float64 set the default dtype; the next test starts with torch's own."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
