"""The prime field: numbers in it, inverses, exact products, hash functions."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from autopar.proof import field
from autopar.proof.field import PRIME

F64 = torch.float64


def element(fraction: Fraction) -> int:
    return fraction.numerator * pow(fraction.denominator, -1, PRIME) % PRIME


def test_rational_numbers_are_exact() -> None:
    fractions = [Fraction(p, q) for q in (1, 2, 3, 7, 24, 999, 4096, 12345) for p in (1, -5, 10007)]
    numbers = [float(one) for one in fractions]
    assert [field.number(one) for one in numbers] == list(map(element, fractions))
    assert field.embedded(torch.tensor(numbers, dtype=F64)).tolist() == list(map(element, fractions))
    assert field.embedded(torch.tensor([1 / 3, 0.1, -2.5])).tolist() == [
        element(Fraction(1, 3)), element(Fraction(1, 10)), element(Fraction(-5, 2)),
    ]  # fmt: skip


def test_other_numbers_keep_their_sign_and_forget_rounding() -> None:
    root = math.sqrt(2)
    assert field.number(root) == field.number(math.nextafter(root, 2)) != field.number(root + 1e-8)
    assert field.number(root) + field.number(-root) == PRIME


def test_what_is_no_number_is_a_code() -> None:
    lowest = torch.finfo(torch.float32).min
    given = torch.tensor([-math.inf, math.inf, math.nan, lowest, -1e9, -1.0], dtype=F64)
    codes = [field.NEGATIVE, field.POSITIVE, field.UNDEFINED, field.LOWEST, field.LOWEST, PRIME - 1]
    assert field.embedded(given).tolist() == codes
    assert field.embedded(given, hides=False)[4] == -(10**9) % PRIME


def test_inverses() -> None:
    x = field.drawn((1000,), "x", 0)
    assert bool((field.inverse(x) * x % PRIME == 1).all())
    assert field.inverse(torch.zeros(1, dtype=torch.int64)).tolist() == [0]
    assert field.power(x, -3).tolist() == [pow(one, -3, PRIME) for one in x.tolist()]


def test_products_of_matrices_are_exact() -> None:
    for terms in (1, 300, 513):
        a, b = field.drawn((2, 3, terms), "a", 0), field.drawn((terms, 2), "b", 0)
        a[0], b[:, 0] = PRIME // 2, PRIME // 2  # the largest terms that there are
        rows, columns = a.tolist(), b.t().tolist()
        wanted = [[[sum(map(int.__mul__, row, column)) % PRIME for column in columns] for row in part] for part in rows]
        assert field.product(a, b).tolist() == wanted


def test_order_is_that_of_the_numbers() -> None:
    numbers = torch.tensor([-math.inf, -1e12, -3.0, -1.0, 0.0, 2.0, math.inf], dtype=F64)
    around = field.signed(field.embedded(numbers))
    assert bool((around.diff() > 0).all())
    assert field.unsigned(around).tolist() == field.embedded(numbers).tolist()


def test_hashes_depend_on_all_that_they_are_given() -> None:
    x = field.drawn((500,), "x", 0)
    found = [
        field.hashed("exp", x),
        field.hashed("log", x),
        field.hashed("exp", x, attributes=1),
        field.hashed("exp", x, x),
    ]
    with field.hashing(1):
        found.append(field.hashed("exp", x))
    assert len(torch.unique(torch.cat(found))) == 2500
    assert torch.equal(field.hashed("exp", x), found[0])
    assert all(int(one.min()) >= 0 and int(one.max()) < PRIME for one in found)
