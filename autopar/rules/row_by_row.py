"""Whether an operator treats each row alone, so that rows may be left out, or be made of another row's weights."""

from __future__ import annotations

from torch import fx

from autopar.ir.text import operator_name
from autopar.mesh import Mesh
from autopar.rules import call_of, rule_for


class MixesRows(Exception):
    """Rows of a result are not made of one row each, or no rule says so."""


def row_dims(node: fx.Node, index: int, dim: int) -> list[int | None]:
    """For each operand the dim along which it has the rows that result ``index`` has along ``dim``.

    None for an operand that is the same for all rows. Raises MixesRows.
    """
    rule = rule_for(node.target)
    if rule is None:
        raise MixesRows(f"no rule says whether {operator_name(node.target)} treats each row alone")
    factoring = rule(call_of(node, Mesh()))
    names = factoring.outputs[index][dim]
    alone = len(names) == 1 and names[0] not in factoring.whole and names[0] not in factoring.rewrites
    tensors = (*factoring.inputs, *factoring.outputs)
    places = [[at for at, factors in enumerate(tensor) if alone and names[0] in factors] for tensor in tensors]
    shared = any(len(tensor[at]) > 1 for tensor, found in zip(tensors, places) for at in found)
    if not alone or shared or any(len(found) > 1 for found in places):
        raise MixesRows(f"{operator_name(node.target)} mixes them")
    return [found[0] if found else None for found in places[: len(factoring.inputs)]]
