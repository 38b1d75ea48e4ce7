"""Which dims of a call are sizes, which points are compiled beside those that came, and how ranges grow."""

from __future__ import annotations

import math

import pytest

from autopar.families.sizes import BATCH, SEQUENCE, Range, Scheme, further, in_steps, reaching

ROLES = {(0, 0): BATCH, (0, 1): SEQUENCE, (1, 0): BATCH, (1, 1): SEQUENCE}


def test_dims_that_are_equal_are_one_size() -> None:
    scheme = Scheme.of([((4, 10), (4, 10)), ((4, 12), (4, 12))], ROLES)
    assert scheme.sizes(((6, 20), (6, 20))) == {"b": 6, "s": 20}
    assert scheme.sizes(((6, 20), (6, 21))) is None  # the same so far
    assert scheme.shapes(((4, 10), (4, 10)), {"b": 2, "s": 7}) == ((2, 7), (2, 7))


def test_source_and_target_have_lengths_of_their_own() -> None:
    scheme = Scheme.of([((4, 10), (4, 10)), ((4, 12), (4, 8))], ROLES)
    assert scheme.sizes(((6, 20), (6, 21))) == {"b": 6, "s": 20, "s2": 21}


def test_what_never_changed_is_fixed() -> None:
    scheme = Scheme.of([((4, 10, 64),), ((4, 12, 64),)], ROLES)
    assert scheme.sizes(((4, 11, 64),)) == {"b": 4, "s": 11}
    assert scheme.sizes(((4, 11, 65),)) is None


@pytest.mark.parametrize(
    ("lengths", "unit"),
    [((41, 13), 1), ((58, 28), 1), ((54, 30), 1), ((48, 32), 1), ((64, 128), 1), ((20, 36), 4), ((24, 40), 8)],
)
def test_further_points_are_not_in_proportion(lengths: tuple[int, int], unit: int) -> None:
    points = [{"b": 8, "s": length} for length in lengths]
    high, low = further(points, {"b": 2, "s": unit}, varies_batch=True)
    assert high["s"] >= 2 * max(lengths) and (low["s"] < min(lengths) or lengths == (64, 128))
    assert {high["b"], low["b"], 8} == {8, 10, 12}
    assert all(each["s"] % unit == 0 for each in (high, low))
    common = math.gcd(*lengths, 64)
    step = math.gcd(*(each["s"] - lengths[0] for each in (*points[1:], high, low)))
    assert step == (common if common >= 8 * unit else unit)
    if step == unit == 1:  # a length that is a multiple of all powers of two, and one that is not
        assert high["s"] % 64 == 0 and any(each["s"] % 2 for each in (*points, low))


def test_very_short_batches_end_the_search() -> None:
    """All are even, whatever multiple of 64 the greatest is: others are compiled when they come."""
    high, low = further([{"b": 8, "s": 2}, {"b": 8, "s": 66}], {"b": 2, "s": 1}, varies_batch=True)
    assert high["s"] % 64 == 0 and low["s"] == 2


def test_a_batch_that_may_not_change_does_not() -> None:
    points = [{"b": 8, "s": 41}, {"b": 8, "s": 13}]
    assert {point["b"] for point in further(points, {"b": 2, "s": 1}, varies_batch=False)} == {8}


def test_ranges() -> None:
    known = Range.of([16, 40, 24])
    assert known.holds(32) and not known.holds(36) and not known.holds(48)
    assert str(known) == "16 to 40, multiples of 8"
    assert str(Range.of([13, 29])) == "13 to 29, multiples of 16 plus 13"
    assert str(Range.of([5, 5])) == "5"


def test_a_range_grows_by_more_than_one_length() -> None:
    ranges = {"b": Range.of([4, 6]), "s": Range.of([16, 17, 40])}
    assert reaching({"b": 4, "s": 41}, ranges) == {"b": 4, "s": 128}
    assert reaching({"b": 4, "s": 9}, ranges)["s"] < 9
    assert reaching({"b": 4, "s": 20}, ranges) == {"b": 4, "s": 20}
    assert reaching({"b": 8, "s": 20}, ranges) == {"b": 16, "s": 20}
    assert reaching({"b": 2, "s": 20}, ranges) == {"b": 2, "s": 20}


def test_steps_of_points() -> None:
    points = [{"b": 4, "n": 12, "s": 9}, {"b": 8, "n": 20, "s": 27}, {"b": 8, "n": 128, "s": 9}]
    assert in_steps(points, {"b": 2, "n": 1, "s": 2}) == {"b": 2, "n": 4, "s": 2}
    assert in_steps(points[:2], {"b": 1, "n": 3, "s": 1}) == {"b": 1, "n": 12, "s": 1}
