"""Names of stacked parameters, and tensors from and to the names of the model."""

from __future__ import annotations

import pytest
import torch

from autopar.ir.stacked_parameters import by_member, is_stacked, member_names, names_of_stacks, stacked, stacked_name


@pytest.mark.parametrize("name", ["experts.*.up.weight", "*.weight", "layers.3.experts.*", "a.*.b.0.c"])
def test_names_go_both_ways(name: str) -> None:
    names = member_names(name, 12)
    assert len(set(names)) == 12 and not any(map(is_stacked, names))
    assert is_stacked(name) and stacked_name(names) == name and name in names_of_stacks(names[7])


@pytest.mark.parametrize(
    "names",
    [
        ["experts.0.weight"],
        ["experts.1.weight", "experts.2.weight"],
        ["experts.1.weight", "experts.0.weight"],
        ["experts.0.weight", "experts.1.bias"],
        ["0.experts.0", "1.experts.1"],
        ["experts.a.weight", "experts.b.weight"],
        ["expert0.weight", "expert1.weight"],
        ["up", "up.0"],
    ],
    ids=" ".join,
)
def test_other_names_are_not_stacked(names: list[str]) -> None:
    assert stacked_name(names) is None


def test_tensors_go_both_ways() -> None:
    own = {"experts.0.w": torch.ones(2, 3), "experts.1.w": torch.zeros(2, 3), "gate": torch.ones(4)}
    whole = stacked("experts.*.w", 2, own)
    assert whole is not None and whole.shape == (2, 2, 3) and stacked("others.*.w", 2, own) is None
    back = by_member({"gate": own["gate"], "experts.*.w": whole})
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)
    assert back["experts.0.w"].untyped_storage().nbytes() == 24  # a copy that does not keep the others
