"""The schema of an operator: which operator a user means, and whether a rule line fits it."""

from __future__ import annotations

from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

from autopar.operators.registry import REGISTRY
from autopar.rules.factoring import tensor_arguments
from autopar.rules.lines import Line


def operator_named(operator: Any) -> Any:
    """The OpOverload of ``"mylib::op"``, ``"mylib::op.overload"``, an overload, a packet or a ``custom_op``.

    Raises ValueError for one that torch does not know.
    """
    if isinstance(operator, CustomOpDef):
        operator = operator._opoverload
    if isinstance(operator, str):
        operator = _looked_up(operator)
    if isinstance(operator, torch._ops.OpOverloadPacket):
        operator = _only_overload(operator)
    if operator in REGISTRY.values():
        return operator
    if not isinstance(operator, torch._ops.OpOverload):
        raise ValueError(
            f"register_rule: {operator!r} is no operator of a graph; give a name such as 'aten::cosh' or 'mylib::op'\n"
            "Way out: make a function of your own an operator with torch.library.custom_op."
        )
    return operator


def _looked_up(name: str) -> Any:
    namespace, colons, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), base, None) if colons and namespace and base else None
    if packet is None:
        raise ValueError(
            f"register_rule: torch knows no operator '{name}'\nWay out: import the library that defines it first."
        )
    if overload and overload not in packet.overloads():
        there = ", ".join(packet.overloads())
        raise ValueError(f"register_rule: '{namespace}::{base}' has no overload '{overload}'; there are {there}")
    return getattr(packet, overload) if overload else packet


def _only_overload(packet: Any) -> Any:
    found = {name: getattr(packet, name) for name in packet.overloads()}
    found = {name: each for name, each in found.items() if tensor_arguments(each) != []}
    if len(found) > 1 and "default" not in found:
        names = ", ".join(found)
        raise ValueError(f"register_rule: {packet} has the overloads {names}; name one, as '::op.{next(iter(found))}'")
    return found.get("default") or next(iter(found.values()))


def refuse_aliases(target: Any) -> None:
    """Raise ValueError for an operator that writes into its arguments, or returns one of them or a view of it."""
    if not isinstance(target, torch._ops.OpOverload):
        return
    schema = target._schema
    written = [argument.name for argument in schema.arguments if argument.is_write]
    if written:
        raise ValueError(
            f"register_rule: {target} writes into '{written[0]}'; a graph that is split holds functions only\n"
            "Way out: torch.library.custom_op(..., mutates_args=()), and return the new tensor."
        )
    if any(result.alias_info is not None for result in schema.returns):
        raise ValueError(
            f"register_rule: {target} returns a view of its argument; parts of it would share memory\n"
            "Way out: return a copy (.clone())."
        )


def check_fits(line: Line, target: Any) -> None:
    """Raise ValueError where a line has more or fewer inputs or outputs than the operator can have."""
    names = tensor_arguments(target)
    if names is not None:
        kinds = {argument.name: argument for argument in target._schema.arguments}
        needed = sum(str(kinds[name].type) == "Tensor" for name in names)
        if not needed <= len(line.inputs) <= len(names):
            raise ValueError(
                f"rule '{line.text}' has {len(line.inputs)} inputs, {target} takes "
                f"{len(names) if needed == len(names) else f'{needed} to {len(names)}'} tensors: {', '.join(names)}"
            )
    returns = [str(result.type) for result in target._schema.returns] if names is not None else []
    if returns and all(kind == "Tensor" for kind in returns) and len(line.outputs) != len(returns):
        raise ValueError(f"rule '{line.text}' has {len(line.outputs)} outputs, {target} returns {len(returns)}")
