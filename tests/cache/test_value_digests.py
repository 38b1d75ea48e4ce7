"""Digests of values that the model's code names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import ItemsView
from typing import Any

from autopar.cache.value_digests import Digests


class Lazy(OrderedDict[str, int]):
    """As the tables of transformers: their items import modules, some of which are not there."""

    def items(self) -> ItemsView[str, int]:
        raise ValueError("could not find the module")


def digest_of(value: Any) -> str:
    return Digests(lambda _: None).of(value)


def test_a_dict_whose_items_cannot_be_had() -> None:
    assert digest_of(Lazy(a=1)) == digest_of(Lazy(a=1)) != digest_of(Lazy(a=2))
