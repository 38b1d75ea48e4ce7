"""Layouts and the choices between them in words."""

from __future__ import annotations

import re
from collections.abc import Mapping

from autopar.cost.machine import Machine
from autopar.ir.node import Value
from autopar.mesh import Mesh

PLACEMENT = re.compile(r"S\((\d+)([^)]*)\)|P\((\w+)\)|\b([PIR])\b")
PLAIN = {
    "I": "whole on every rank",
    "R": "whole on every rank, which each uses differently",
    "P": "a summand on each rank",
    "invariant": "whole on every rank",
    "replicated": "whole on every rank, which each uses differently",
    "partial": "on a summand on each rank",
}
SHORT = {"I": "whole", "R": "whole", "P": "summands"}  # of an operator's operands and results
OPERANDS = re.compile(r"(?P<factor>[\w ]+): (?P<before>.*) -> (?P<after>.*)")


def choice_words(label: str, is_matrix: bool) -> str:
    """A choice as the compiler calls it, in words: ``S(1)`` is split by columns, of a parameter that ``is_matrix``.

    That of an operator has a factor, and placements of its operands and results: ``k: S(2), S(1) -> P``.
    """
    if label in PLAIN:
        return PLAIN[label]
    found = OPERANDS.fullmatch(label)
    if found is None:
        return _placements(label, is_matrix)
    before, after = (_placements(found[end], False, SHORT) for end in ("before", "after"))
    return f"a part of {found['factor']} on each rank (operands {before}; result {after})"


def _placements(text: str, is_matrix: bool, plain_words: Mapping[str, str] = PLAIN) -> str:
    def words(match: re.Match[str]) -> str:
        dim, more, reduction, plain = match.groups()
        if plain:
            return plain_words[plain]
        if reduction:
            return f"a candidate for the {reduction} on each rank"
        what = ("by rows", "by columns")[int(dim)] if is_matrix and int(dim) < 2 else f"along dim {dim}"
        blocks = re.search(r"outer=(\d+)", more)
        extra = f", each of {blocks[1]} blocks" if blocks else ""
        extra += ", dealt out back and forth" if "mirrored" in more else ""
        ratio = re.search(r"ratio=([\d+]+)", more)
        extra += f", in segments as {ratio[1].replace('+', ' to ')}" if ratio else ""
        return f"split {what}{extra}"

    return PLACEMENT.sub(words, text)


def size_words(kind: Value, mesh: Mesh) -> str:
    """``[192, 192/tp] of float32``: the whole sizes, and the axes that divide each of them."""
    sizes = []
    for whole, part, dim in zip(kind.shape, kind.layout.local_shape(mesh), kind.layout.dims):
        axes = [axis for factor in dim for axis in factor.axes]
        sizes.append(f"{whole}/{'/'.join(axes)}" if axes and part != whole else str(whole))
    summed = [axis for axis, _ in kind.layout.partial]
    words = f"[{', '.join(sizes)}] of {str(kind.dtype).removeprefix('torch.')}"
    return words + (f", a summand on each rank of {', '.join(summed)}" if summed else "")


def machine_words(machine: Machine) -> str:
    """The device whose costs are given."""
    return f"a device of {machine.flops / 1e12:.0f} Tflop/s with links of {machine.link / 1e9:.0f} GB/s"
