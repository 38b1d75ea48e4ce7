"""Every rule against the real operator: each strategy is run on pieces, outputs and gradients are compared."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from autopar.rules import RULES, rule_for
from autopar.verification.rule_check import cases, prove
from tests.rules.samples import NOT_COMPARED, name_of, samples_of, tagged_pointwise

WAYS = (2, 3)
OPERATORS = sorted({*RULES, *tagged_pointwise()} - NOT_COMPARED, key=name_of)
UNSPLIT = {  # operators whose only strategy is to run whole
    "aten.arange.default", "aten.arange.start", "aten.arange.start_step", "aten.scalar_tensor.default",
    "aten.var.default", "aten.std.default", "aten.var_mean.default", "aten.median.default", "aten.nanmedian.default",
    "autopar.axis_index.default",
}  # fmt: skip

counts: Counter[str] = Counter()


@pytest.mark.parametrize("target", OPERATORS, ids=name_of)
def test_every_strategy_equals_the_operator(target: Any) -> None:
    torch.manual_seed(0)
    rule = rule_for(target)
    assert rule is not None
    tried = splits = 0
    for sample in samples_of(target):
        for ways in WAYS:
            for case in cases(target, rule, sample, ways):
                prove(case)
                tried += 1
                splits += case.strategy.part is not None
    assert splits or str(target) in UNSPLIT, f"no sample of {target} can be split: give one sizes that divide by 2 or 3"
    counts.update(operators=1, cases=tried)


def test_count(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nrules: {len(RULES)} rules, {counts['operators']} operators, {counts['cases']} cases")
