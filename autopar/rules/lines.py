"""A rule line and its reader: ``"b m k, b k n -> b m n; whole k; linear 0, 1"``.

docs/rules.md explains every clause.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

Term = list[list[str]]  # for each dim its factors, outermost first; ["..."] for any number of leading dims

CLAUSES = {
    "whole": "factors that must not be split",
    "max": "factors over which the output is a maximum",
    "min": "factors over which the output is a minimum",
    "linear": "operands, by number, that may be pending sums together; further sets after a comma",
    "added": "operands, by number, that are added to a sum over factors that they lack",
    "uneven": "factors that may be padded at the end",
    "plain": "factors of which each rank must have one contiguous piece",
    "contraction": "(no words) a product with weights, as matmul",
}


@dataclass(frozen=True)
class Line:
    """A rule line that has been read. Operands are numbered from 0 in the order of ``inputs``."""

    text: str
    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    factors: Mapping[str, frozenset[str]] = field(default_factory=dict)  # clause -> factors
    linear: tuple[frozenset[int], ...] = ()
    added: frozenset[int] = frozenset()
    contraction: bool = False

    @property
    def only_outputs(self) -> frozenset[str]:
        """Factors that no input has: no rule says how the operator would compute a part of them."""
        return _names(self.outputs) - _names(self.inputs)


@cache
def read_rule(text: str) -> Line:
    """The rule of a line. Raises ValueError for a line that cannot be read, with the reason."""
    rule, *clauses = (piece.strip() for piece in text.split(";"))
    if rule.count("->") != 1:
        raise ValueError(f"rule '{text}': expected 'inputs -> outputs', e.g. 'b m k, b k n -> b m n'")
    left, right = rule.split("->")
    inputs, outputs = (tuple(map(read_dims, side.split(","))) if side.strip() else () for side in (left, right))
    outputs = outputs or ([],)  # "k, k ->": one output without dims
    factors: dict[str, frozenset[str]] = {}
    numbers: dict[str, tuple[frozenset[int], ...]] = {}
    known = _names((*inputs, *outputs))
    for clause in clauses:
        name, _, words = clause.partition(" ")
        if name not in CLAUSES:
            listed = "; ".join(f"{clause}: {meaning}" for clause, meaning in CLAUSES.items())
            raise ValueError(f"rule '{text}': unknown clause '{name}'; there are {listed}")
        if name in ("linear", "added"):
            numbers[name] = tuple(_operands(group, name, len(inputs), text) for group in words.split(","))
        else:
            factors[name] = frozenset(words.replace(",", " ").split())
            unknown = sorted(word for word in factors[name] - known if not re.fullmatch(r"d\d+", word))
            if unknown:
                there = " ".join(sorted(known))
                raise ValueError(f"rule '{text}': '{name} {unknown[0]}' names no factor; there are {there}")
    for tensor in (*inputs, *outputs):
        _check_repeats(tensor, factors.get("whole", frozenset()), text)
    for name in ("max", "min"):
        kept = sorted(factors.get(name, frozenset()) & _names(outputs))
        if kept:
            raise ValueError(f"rule '{text}': '{name} {kept[0]}', but an output has '{kept[0]}': it is not combined")
    added = frozenset().union(*numbers.get("added", ()))
    return Line(text, inputs, outputs, factors, numbers.get("linear", ()), added, "contraction" in factors)


def _operands(words: str, clause: str, count: int, text: str) -> frozenset[int]:
    for word in words.split():
        if not word.isdecimal() or int(word) >= count:
            raise ValueError(f"rule '{text}': '{clause} {word}' is no operand; they are numbered 0 to {count - 1}")
    return frozenset(map(int, words.split()))


def _names(tensors: tuple[Term, ...]) -> frozenset[str]:
    return frozenset(name for tensor in tensors for dim in tensor for name in dim if name != "...")


def _check_repeats(tensor: Term, whole: frozenset[str], text: str) -> None:
    names = [name for dim in tensor for name in dim]
    twice = sorted({name for name in names if names.count(name) > 1 and name not in whole})
    if twice:
        name, dims = twice[0], " ".join(_shown(dim) for dim in tensor)
        raise ValueError(
            f"rule '{text}': factor '{name}' stands twice in '{dims}'; a split would cut both dims: "
            f"give them different names, or add '; whole {name}'"
        )


def _shown(dim: list[str]) -> str:
    return dim[0] if len(dim) == 1 else f"({' '.join(dim)})" if dim else "1"


def read_dims(text: str) -> Term:
    """``"b (h d) 1"`` -> [["b"], ["h", "d"], []]."""
    dims: Term = []
    inside = False
    for token in text.replace("(", " ( ").replace(")", " ) ").split():
        if token in "()":
            if inside == (token == "("):
                raise ValueError(f"rule dims '{text}': a '{token}' too many")
            inside = token == "("
            dims += [[]] if inside else []
        elif inside and not token.isidentifier():
            raise ValueError(f"rule dims '{text}': inside brackets stand names of factors, not '{token}'")
        elif inside:
            dims[-1].append(token)
        elif token in ("1", "...") or token.isidentifier():
            dims.append([] if token == "1" else [token])
        else:
            raise ValueError(f"rule dims '{text}': '{token}' is no name of a factor; a dim of size 1 is written 1")
    if inside:
        raise ValueError(f"rule dims '{text}': a '(' is not closed")
    if dims.count(["..."]) > 1:
        raise ValueError(f"rule dims '{text}': '...' stands twice")
    return dims
