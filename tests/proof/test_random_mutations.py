"""Small random changes: none that changes a number is accepted, and none that changes none is called wrong."""

from __future__ import annotations

import pytest

from tests.proof.mutated_programs import CASES
from tests.proof.random_mutations import ACCEPTED, FALSE, Dice, tried
from tests.selection import slow_but

CHANGES = 5  # of each program
DRAWN = ("dropout", "noisy")  # a change of what is drawn may change no draw of these few
QUICK = ("net",)


@pytest.mark.parametrize("case", slow_but([place for place, case in enumerate(CASES) if case in QUICK], list(CASES)))
def test_no_change_of_numbers_is_accepted(case: str) -> None:
    found = [tried(case, Dice(f"2 {case} {number}")) for number in range(3 if case in QUICK else CHANGES)]
    assert not [one for one in found if one.verdict == ACCEPTED]
    assert case in DRAWN or not [one for one in found if one.verdict == FALSE]
