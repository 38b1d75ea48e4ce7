"""Digests of code: the same wherever its file is, another for each change of what it does."""

from __future__ import annotations

from types import CodeType

import pytest

from autopar.cache.code_digests import _has_sets, code_digest

BODY = """
def outer(x, y=1):
    def inner(z):
        return z + {constant}
    return [inner(each) for each in x], "{text}"
"""
CONSTANTS = ["2", "(2, 'a')", "2.0", "(z in {'a', 'b', 'c', 'd'})", "((z in {1, 2}) or (z in {'a', 'b'}))"]


def code(constant: str = "2", text: str = "", file: str = "/one/place/file.py") -> CodeType:
    return inner_of(compile(BODY.format(constant=constant, text=text), file, "exec"))


def inner_of(outer: CodeType) -> CodeType:
    return next(each for each in outer.co_consts if isinstance(each, CodeType))


@pytest.mark.parametrize("constant", CONSTANTS)
def test_the_folder_does_not_count_and_all_else_does(constant: str) -> None:
    known = code_digest(code(constant))
    assert known == code_digest(code(constant, file="/another/file.py"))
    others = [code(constant, file="/one/place/other.py"), code(constant, "b"), code(f"({constant}, 7)")]
    others += [code(each) for each in CONSTANTS if each != constant]
    assert len({known, *map(code_digest, others)}) == 1 + len(others)


def test_code_that_has_run_has_the_same_digest() -> None:
    made = code()
    namespace: dict[str, object] = {}
    exec(compile(BODY.format(constant="2", text=""), "/one/place/file.py", "exec"), namespace)
    outer = namespace["outer"]
    for _ in range(100):  # long enough for Python to write other instructions in place of these
        outer([1, 2, 3])  # type: ignore[operator]
    assert code_digest(outer.__code__) == code_digest(made)  # type: ignore[attr-defined]


def test_a_set_has_another_order_in_each_process() -> None:
    """So it is one that is digested part by part."""
    inner = inner_of(code(CONSTANTS[3]))
    assert any(isinstance(each, frozenset) for each in inner.co_consts) and _has_sets(code(CONSTANTS[3]))
    assert not _has_sets(code())
