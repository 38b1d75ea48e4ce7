"""Every strategy of our rules against DTensor's: what it accepts without moving anything, and what it makes of it.

Where the two differ the operator is listed below with a reason, and the strategy is proved by numbers: the operator is
run on the pieces and joined (``autopar.verification.rule_check``). ``pytest -s`` prints the counts and both lists of
operators.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from autopar.errors import WrongRuleError
from autopar.ir.layout import REPLICATED, Partial, Placement, Split, Whole
from autopar.rules import RULES, rule_for
from autopar.rules.reductions import share_of_mean
from autopar.verification.rule_check import Case, Sample, cases, prove
from tests.rules import dtensor_oracle as dtensor
from tests.rules.samples import NOT_COMPARED, name_of, samples_of, tagged_pointwise

aten = torch.ops.aten
OURS = sorted({*RULES, *tagged_pointwise()} - NOT_COMPARED, key=name_of)

CONVOLUTIONS = (
    "conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding"
    " conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input"
)
NOT_FOR_MODELS = ("prims.", "aten._foreach", "aten._fused_adam", "aten._amp")
# kind of difference -> reason -> operators of aten
LISTED = {
    "pending sum": {
        "DTensor adds up a pending sum before the operator, which is linear in it": f"""{CONVOLUTIONS}
            adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default clone.default
            col2im.default cumsum.default diagonal.default dot.default einsum.default embedding.default gather.default
            index_add.default index_put.default _unsafe_index_put.default diag_embed.default diagonal_scatter.default
            max_unpool2d.default max_unpool3d.default masked_fill.Scalar matmul.default mean.default mean.dim
            pixel_shuffle.default pixel_unshuffle.default repeat_interleave.self_int scatter.src scatter.value
            scatter_add.default select_scatter.default slice_scatter.default tril.default triu.default
            where.ScalarOther where.self lerp.Scalar lerp.Tensor addcdiv.default addcmul.default _conj.default
            masked_fill.Tensor""",
        "DTensor adds up a pending gradient first, in which the backward pass is linear": """gelu_backward.default
            logit_backward.default native_dropout_backward.default sigmoid_backward.default silu_backward.default
            tanh_backward.default threshold_backward.default""",
    },
    "split": {
        "DTensor splits convolutions by batch and by input channels only, never a single image": CONVOLUTIONS,
        "DTensor has no rule for splitting this dim": """_native_batch_norm_legit_no_training.default
            grid_sampler.default grid_sampler_2d.default grid_sampler_3d.default group_norm.default
            instance_norm.default logsumexp.default""",
        "DTensor runs the operator whole though its leading dims are a batch": """diagonal.default inverse.default
            _linalg_eigh.default _linalg_svd.default diag_embed.default linalg_cholesky.default linalg_inv.default
            linalg_qr.default tril.default triu.default""",
        "DTensor wants both operands split where one is broadcast": """__lshift__.Tensor __rshift__.Tensor
            _linalg_solve_ex.default addr.default cosine_similarity.default linalg_cross.default matmul.default
            quantile.scalar""",
        "DTensor does not cut a dim that is sliced": "slice.Tensor",
        "an operator below, in torch's decomposition, loses the split": """all.dims col2im.default
            cross_entropy_loss.default einsum.default scaled_dot_product_attention.default""",
    },
    "average": {
        "DTensor averages the ranks' means, ours adds their shares": """binary_cross_entropy.default
            binary_cross_entropy_with_logits.default hinge_embedding_loss.default huber_loss.default kl_div.default
            l1_loss.default margin_ranking_loss.default mean.default mean.dim mse_loss.default poisson_nll_loss.default
            smooth_l1_loss.default soft_margin_loss.default""",
    },
    "average, DTensor is wrong": {
        "DTensor averages means over unequal numbers of targets": "cross_entropy_loss.default nll_loss_nd.default",
    },
    "output": {
        "DTensor keeps a pending norm, product or flag, ours makes the whole one": """all.default all.dim any.default
            any.dim any.dims linalg_vector_norm.default norm.Scalar norm.ScalarOpt_dim prod.default prod.dim_int""",
        "an output without elements": "_native_batch_norm_legit_no_training.default lu_unpack.default",
        "DTensor expands to global sizes, so that a new dim is never split": "broadcast_tensors.default",
    },
    "output, DTensor is wrong": {
        "DTensor takes an empty list of dims for no dims, torch for all": "sum.dim_IntList",
        "DTensor forgets keepdim": "logsumexp.default",
    },
    "no rule": {
        "DTensor has no rule for an operator below": "scaled_dot_product_attention.default",
    },
}


@dataclass
class Comparison:
    counts: Counter[str] = field(default_factory=Counter)
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)  # operator -> what DTensor was asked about
    unknown: dict[str, str] = field(default_factory=dict)  # operator -> the one below that DTensor has no rule for
    different: dict[tuple[str, str], list[tuple[Case, Any]]] = field(default_factory=lambda: defaultdict(list))


def whole(placements: tuple[Placement, ...]) -> tuple[Placement, ...]:
    """I and R are one to DTensor."""
    return tuple(REPLICATED if isinstance(placement, Whole) else placement for placement in placements)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    found = Comparison()
    for target in OURS:
        rule = rule_for(target)
        assert rule is not None
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            found.counts["operators of autopar's own"] += 1
            continue
        for sample in samples_of(target):
            seen = set()
            for case in cases(target, rule, sample, dtensor.WAYS):
                key = whole(case.strategy.inputs), whole(case.strategy.outputs)
                if key not in seen:
                    seen.add(key)
                    _compare(found, name_of(target).removeprefix("aten."), sample, case, *key)
    for name in found.levels:
        if name in found.unknown:  # other calls of it have one
            del found.unknown[name]
    for key in [key for key in found.different if key[1] in found.unknown]:
        found.counts["strategies of operators that only we know"] += len(found.different.pop(key))
    return found


def _compare(
    found: Comparison, name: str, sample: Sample, case: Case, inputs: tuple[Any, ...], outputs: tuple[Any, ...]
) -> None:
    if all(placement == REPLICATED for placement in inputs):
        found.counts["nothing is split"] += 1
        return
    if any(isinstance(placement, Split) and not placement.contiguous for placement in (*inputs, *outputs)):
        found.counts["blocks or segments, which DTensor cannot say"] += 1
        return
    try:
        answer = dtensor.ask(case.call.target, sample, inputs)
    except dtensor.NoRule as problem:
        found.unknown.setdefault(name, str(problem))
        found.different["no rule", name].append((case, problem))
        return
    except dtensor.Redistributes as problem:
        pending = any(isinstance(placement, Partial) for placement in inputs)
        found.different["pending sum" if pending else "split", name].append((case, problem))
        found.levels.setdefault(name, ())
        return
    found.levels[name] = answer.level
    if answer.outputs == outputs:
        found.counts["agreed"] += 1
        return
    averaged = [Partial("sum") if placement == Partial("avg") else placement for placement in answer.outputs]
    kind = "average" if tuple(averaged) == outputs else "output"
    found.different[kind, name].append((case, answer))


def listed() -> dict[tuple[str, str], str]:
    """(kind, operator) -> reason."""
    return {
        (kind.partition(",")[0], name): reason
        for kind, reasons in LISTED.items()
        for reason, names in reasons.items()
        for name in names.split()
    }


def test_every_difference_is_listed(comparison: Comparison) -> None:
    """And nothing is listed in which the two agree."""
    table = listed()
    unlisted = [
        f"{key}: {case.call.inputs} {_show(case.strategy.inputs)} -> {_show(case.strategy.outputs)}; DTensor: {answer}"
        for key, ((case, answer), *_) in comparison.different.items()
        if key not in table
    ]
    assert not unlisted, "\n".join(unlisted)
    agreed = sorted(set(table) - set(comparison.different))
    assert not agreed, f"listed without a difference: {agreed}"


def _show(placements: tuple[Placement, ...]) -> str:
    return ", ".join(map(str, placements))


def test_every_difference_is_proved(comparison: Comparison) -> None:
    """The operator itself, run on the pieces, gives what ours says."""
    for differences in comparison.different.values():
        for case, _ in differences:
            torch.manual_seed(0)
            prove(case)
            comparison.counts["listed with a reason and proved"] += 1


@pytest.mark.parametrize("kind", [kind for kind in LISTED if kind.endswith("DTensor is wrong")])
def test_where_dtensor_is_wrong(comparison: Comparison, kind: str) -> None:
    """What it says of the output is refuted by the same numbers, for some call at least."""
    for names in LISTED[kind].values():
        for name in names.split():
            assert any(_refuted(case, answer) for case, answer in comparison.different[kind.partition(",")[0], name])


def test_averages_are_right_elsewhere(comparison: Comparison) -> None:
    for names in LISTED["average"].values():
        for name in names.split():
            assert not any(_refuted(case, answer) for case, answer in comparison.different["average", name])


def _refuted(case: Case, answer: Any) -> bool:
    """Whether the operator on the pieces gives something else than DTensor says."""
    outputs = tuple(Partial("sum") if placement == Partial("avg") else placement for placement in answer.outputs)
    averaged = outputs != answer.outputs  # the average of what the ranks have is the sum of their shares
    strategy = replace(case.strategy, outputs=outputs, part=case.strategy.part if averaged else None)
    shares = dict.fromkeys(case.factoring.sizes, share_of_mean)
    factoring = replace(case.factoring, rewrites=shares) if averaged else case.factoring
    return _is_wrong(replace(case, strategy=strategy, factoring=factoring))


def test_torch_is_the_one_that_this_was_written_for() -> None:
    """A plain case each of yes, of another placement, of no and of no rule: if this fails, see dtensor_oracle.py."""
    matrices = Sample((torch.ones(4, 6), torch.ones(6, 4)), {})
    answer = dtensor.ask(aten.mm.default, matrices, (Split(1), Split(0)))
    assert answer == dtensor.Answer((Partial("sum"),), ("aten.mm.default",))
    answer = dtensor.ask(aten.linear.default, Sample((torch.ones(4, 6), torch.ones(8, 6)), {}), (Split(0), REPLICATED))
    assert answer.outputs == (Split(0),) and "aten.mm.default" in answer.level
    with pytest.raises(dtensor.Redistributes, match="aten.mm.default"):
        dtensor.ask(aten.mm.default, matrices, (Split(1), REPLICATED))
    with pytest.raises(dtensor.NoRule, match="aten.scatter_reduce.two"):
        arguments = (torch.ones(4), 0, torch.zeros(4, dtype=torch.int64), torch.ones(4), "amax")
        dtensor.ask(aten.scatter_reduce.two, Sample(arguments, {}), (REPLICATED,) * 3)


# Splits that DTensor accepts and our rules do not offer -> why not
NOT_OFFERED = {
    "DTensor is wrong": """_linalg_solve_ex.default linalg_solve_triangular.default broadcast_tensors.default
        cumsum.default max_unpool2d.default""",
    "right forward only: how often a row is used is not known to a rank alone": "embedding.default",
    "a largest and a smallest value in one operator: seldom on a split dim": "aminmax.default",
    "a mean over positions: too few of them": """adaptive_avg_pool1d.default adaptive_avg_pool2d.default
        adaptive_avg_pool3d.default""",
    "coordinates, turned pictures, the width of attention's values, a table that is looked up: nobody splits them":
        "affine_grid_generator.default rot90.default scaled_dot_product_attention.default isin.Tensor_Tensor",
    "an index smaller than what it writes": "scatter_add.default",
    "a squeeze that does nothing is no node of ours": "squeeze.default squeeze.dim squeeze.dims",
}  # fmt: skip


@pytest.mark.slow
def test_what_dtensor_splits_and_we_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    lacking: dict[str, list[tuple[Case, str]]] = {}
    for target in OURS:
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
            for sample in samples_of(target)[:4]:
                for case, text in _not_offered(target, sample):
                    lacking.setdefault(name_of(target).removeprefix("aten."), []).append((case, text))
    reasons = {name: reason for reason, names in NOT_OFFERED.items() for name in names.split()}
    assert set(reasons) == set(lacking), {name: lacking.get(name) for name in set(reasons) ^ set(lacking)}
    for name in NOT_OFFERED["DTensor is wrong"].split():
        assert any(_is_wrong(case) for case, _ in lacking[name]), name
    with capsys.disabled():
        print("\nsplits that DTensor accepts and we do not offer")
        for name, found in lacking.items():
            print(f"  {len(found):3} {name}: {reasons[name]}, e.g. {found[0][1]}")


def _is_wrong(case: Case) -> bool:
    torch.manual_seed(0)
    try:
        prove(case)
    except WrongRuleError:
        return True
    return False


def _not_offered(target: Any, sample: Sample) -> Iterator[tuple[Case, str]]:
    """Splits that DTensor accepts for a call and our rule does not have (pending sums apart)."""
    rule = rule_for(target)
    assert rule is not None
    ours = list(cases(target, rule, sample, dtensor.WAYS))
    call = ours[0].call
    offered = {whole(case.strategy.inputs) for case in ours}
    splits = [[REPLICATED, *[Split(d) for d, n in enumerate(s) if n and n % dtensor.WAYS == 0]] for s in call.inputs]
    if math.prod(map(len, splits)) > 100 or len(set(call.operands)) < len(call.operands):
        return
    for inputs in itertools.product(*splits):
        if inputs in offered or all(placement == REPLICATED for placement in inputs):
            continue
        try:
            answer = dtensor.ask(target, sample, inputs)
        except (dtensor.NoRule, dtensor.Redistributes):
            continue
        theirs = replace(ours[0].strategy, label="DTensor's", inputs=inputs, outputs=answer.outputs)
        yield replace(ours[0], strategy=theirs), f"{call.inputs} {_show(inputs)} -> {_show(answer.outputs)}"


def test_report(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    ours = {name_of(target).removeprefix("aten.") for target in OURS}
    theirs = {name for name in map(str, dtensor.known()) if not name.startswith(NOT_FOR_MODELS)}
    theirs = {name.removeprefix("aten.") for name in theirs if "_backward" not in name and "_copy." not in name}
    below = {part.removeprefix("aten.") for level in comparison.levels.values() for part in level}
    same = {name for name, level in comparison.levels.items() if level == (f"aten.{name}",)}
    with capsys.disabled():
        print(f"\n\nDTensor: {len(comparison.levels)} operators that both know, {len(same)} at the same level")
        for what, count in sorted(comparison.counts.items()):
            print(f"  {count:6} {what}")
        print("reasons:")
        for kind, reasons in LISTED.items():
            for reason, names in reasons.items():
                cases = [len(comparison.different[kind.partition(",")[0], name]) for name in names.split()]
                print(f"  {sum(cases):4} strategies of {len(cases)} operators  {kind}: {reason}")
        _print_names("operators that only we know", comparison.unknown)
        _print_names("operators that only DTensor knows", theirs - ours - below)
        _print_names("compared below, as torch takes them apart", set(comparison.levels) - same)
    assert len(comparison.levels) > 400 and comparison.counts["agreed"] > 1800


def _print_names(title: str, names: Iterable[str]) -> None:
    print(f"{title}: {len(found := sorted(names))}")
    print(textwrap.fill(" ".join(found), 118, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False))
