"""All optimizers of this process are found, whosever class they are of."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from autopar.dtensors.made_optimizers import _may_have_objects, made_optimizers


class Own(torch.optim.SGD):
    pass


class Bare(Optimizer):
    """Has parameters, and torch has not heard of it."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": parameters}]


def test_all_that_were_made_are_found() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    made = [torch.optim.Adagrad(parameters), Own(parameters, lr=0.1), Bare(parameters)]
    found = {id(each) for each in made_optimizers()}
    assert {id(each) for each in made} <= found


def test_torch_marks_the_classes_of_which_there_are_objects() -> None:
    """Torch's own habit (``Optimizer._patch_step_function``), without which all classes would be looked for."""
    assert not _may_have_objects(torch.optim.SparseAdam), "no test makes one"
    torch.optim.SparseAdam([torch.nn.Parameter(torch.ones(2))])
    assert _may_have_objects(torch.optim.SparseAdam)
