"""Axes of a mesh that were typed as several words, where the command line has one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise, takewhile

AXIS = re.compile(r"((?:--\w+=)?)((?:pp|dp|dp_replicate|dp_shard|ep|sp|cp|tp)=\d+,?)+")


def refuse_split_axes(arguments: Sequence[str]) -> None:
    """Raise ValueError for axes with a blank between them: ``--mesh dp=2 tp=2``."""
    own = list(arguments)[: list(arguments).index("--") if "--" in arguments else None]
    for place, (before, word) in enumerate(pairwise(own)):
        if AXIS.fullmatch(before) and _is_bare(word):
            joined = ",".join(one.rstrip(",") for one in (before, *takewhile(_is_bare, own[place + 1 :])))
            raise ValueError(f"'{word}' stands by itself, and the axes of a mesh are one word\nWay out: {joined}")


def _is_bare(word: str) -> bool:
    return AXIS.fullmatch(word) is not None and not word.startswith("-")
