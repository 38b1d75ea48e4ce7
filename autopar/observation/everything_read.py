"""Readings of all that a model holds, where nobody saw what a trace read."""

from __future__ import annotations

from torch import nn

from autopar.ir.guards import Guards
from autopar.observation.code_names import functions_of
from autopar.observation.readings import Readings
from autopar.observation.tables import own_names


def everything_of(model: nn.Module, modes: bool = True) -> Guards:
    """Guards of all that ``model`` holds: for a program that was traced elsewhere, so that nobody saw what it reads.

    ``modes``: with training or evaluation of each module.
    """
    readings = Readings(model)
    for module in model.modules():
        for name in (*vars(module), *module._modules, "_modules", "forward"):
            if modes or name != "training":
                readings.attribute(module, name)
        for function in functions_of(type(module).forward):
            readings.function(function)
    readings.hooks_of(model)
    for owner, _ in list(readings.objects.values()):
        for name in own_names(owner):
            readings.attribute(owner, name)
    return readings.settle()
