"""The facts about operators against torch: each operator that has a rule is run, and looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from autopar.autodiff.differentiate import differentiate
from autopar.cost.flops import FORMULAS
from autopar.cost.kept_values import operands_kept
from autopar.ir import operator_facts as facts
from autopar.ir.collectives import TARGETS
from autopar.ir.node import output_node, values
from autopar.ir.operator_facts import FACTS, Kept
from autopar.ir.parse import parse
from autopar.operators import cross_entropy_sums
from autopar.rules import RULES, rule_for
from tests.rules.samples import NOT_COMPARED, name_of, samples_of, tagged_pointwise

aten = torch.ops.aten
OPERATORS = sorted({*RULES, *tagged_pointwise()} - {*TARGETS} - NOT_COMPARED, key=name_of)
OVERLOADS = [target for target in OPERATORS if facts.is_overload(target)]
# Composites that return what they were given where there is nothing to do; their schemas do not say so, and nobody may
# write over the result of a composite (``codegen/in_place.py``).
SOMETIMES_THE_ARGUMENT = {
    aten.broadcast_tensors.default, aten.einsum.default, aten.conj_physical.default, aten.dropout.default,
}  # fmt: skip


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def outcomes(target: Any) -> list[tuple[list[Tensor], list[Tensor]]]:
    """What ``target`` is given and returns, for each sample."""
    called = [((s.args, s.kwargs), target(*s.args, **s.kwargs)) for s in samples_of(target)]
    return [(tensors_of(given), tensors_of(result)) for given, result in called]


def memory(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


@pytest.mark.parametrize("target", OVERLOADS, ids=name_of)
def test_views_share_memory(target: Any) -> None:
    shares = [bool(memory(given) & memory(result)) for given, result in outcomes(target)]
    if target in SOMETIMES_THE_ARGUMENT:
        assert any(shares) and facts.is_composite(target, in_python=False) and not facts.is_view(target)
    else:
        assert any(shares) == facts.is_view(target)


def test_random_operators_give_something_else_each_time() -> None:
    for target in OVERLOADS:
        same = True
        for sample in samples_of(target):
            first, second = (tensors_of(target(*sample.args, **sample.kwargs)) for _ in range(2))
            same = same and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second))
        if same and facts.is_random(target):
            assert target in CHANCE_OF_NOTHING, target
        else:
            assert same != facts.is_random(target), target


# of rate 0 in all samples, or drawn only in training
CHANCE_OF_NOTHING = {aten.dropout.default, aten.scaled_dot_product_attention.default, aten.rrelu.default}


def test_factories_take_no_tensors() -> None:
    for target in OVERLOADS:
        takes = any(given for given, _ in outcomes(target))
        assert facts.is_factory(target) == (not takes and not facts.is_random(target)), target


def test_operators_with_a_rule_leave_their_arguments_alone() -> None:
    for target in OVERLOADS:
        assert not facts.writes(target)
        for sample in samples_of(target):
            given = tensors_of((sample.args, sample.kwargs))
            before = [tensor.clone() for tensor in given]
            target(*sample.args, **sample.kwargs)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, given)), target


@pytest.mark.parametrize("target", [aten.add_.Tensor, aten.copy_.default, aten.neg_.default, aten.mul.out])
def test_what_writes_is_not_pure(target: Any) -> None:
    x, y = torch.ones(3), torch.full((3,), 2.0)
    args, kwargs = ((x, y), {"out": y}) if target is aten.mul.out else ((x, y)[: 2 - (target is aten.neg_.default)], {})
    before = [x.clone(), y.clone()]
    target(*args, **kwargs)
    assert facts.writes(target) and not facts.is_pure(target) and not facts.is_view(target)
    assert target is aten.mul.out or not torch.equal(before[0], x)


X, MASK = torch.arange(6.0) - 2, torch.arange(6) % 2 == 0
UNTAGGED: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten._to_copy.default: ((X,), {"dtype": torch.float64}),
    aten.masked_fill.Tensor: ((X, MASK, torch.tensor(2.0)), {}),
    aten.where.ScalarOther: ((MASK, X, 2.0), {}),
    aten.where.ScalarSelf: ((MASK, 2.0, X), {}),
    aten.where.Scalar: ((MASK, 1.0, 2.0), {}),
}


@pytest.mark.parametrize("target", UNTAGGED, ids=str)
def test_pointwise_operators_that_torch_has_no_tag_for(target: Any) -> None:
    args, kwargs = UNTAGGED[target]
    assert facts.is_pointwise(target) and torch.Tag.pointwise not in target.tags
    whole = target(*args, **kwargs)
    for place in range(6):
        alone = [item[place] if isinstance(item, Tensor) and item.dim() else item for item in args]
        assert torch.equal(target(*alone, **kwargs), whole[place])


class Reached(TorchDispatchMode):
    """The operators that come down to a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.targets: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.targets.add(func)
        return func(*args, **(kwargs or {}))


def test_composite_operators_do_not_come_down_to_a_kernel() -> None:
    for target in OVERLOADS:
        with Reached() as reached:
            outcomes(target)
        composite = facts.is_composite(target, in_python=False)
        both = target is aten.silu_backward.default  # composite where there is no kernel: on a CPU there is
        assert composite == (target not in reached.targets or both), target
        assert facts.is_composite(target) or not composite


def test_products_have_a_formula() -> None:
    assert {facts.bare_name(first(packet)) for packet in FORMULAS} == {n for n, row in FACTS.items() if row.product}


def first(packet: Any) -> Any:
    """One overload of it; itself if it is a function of ours."""
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return packet
    return getattr(packet, packet.overloads()[0])


def test_products_are_what_torch_counts() -> None:
    """Of the operators that may stand in a graph of ours."""
    counted = [first(packet) for packet in flop_registry if isinstance(packet, torch._ops.OpOverloadPacket)]
    known = [target for target in counted if rule_for(target) is not None]
    assert aten.mm.default in known and len(known) > 3
    for target in known:
        assert facts.is_product(target), target


def test_gradients_flow_through_the_results_that_the_table_says() -> None:
    listed = [name for name, row in FACTS.items() if row.differentiable < 9]
    x, scale = torch.rand(4, 3, requires_grad=True), torch.rand(3, requires_grad=True)
    statistics = (torch.zeros(3), torch.ones(3))
    calls: dict[str, Callable[[], Any]] = {
        "new_zeros": lambda: aten.new_zeros.default(x, [3]),
        "new_ones": lambda: aten.new_ones.default(x, [3]),
        "new_full": lambda: aten.new_full.default(x, [3], 2.0),
        "new_empty": lambda: aten.new_empty.default(x, [3]),
        "full_like": lambda: aten.full_like.default(x, 2.0),
        "native_dropout": lambda: aten.native_dropout.default(x, 0.5, True),
        "op.cross_entropy_sums": lambda: cross_entropy_sums(x, torch.tensor([0, 1, 2, 0]), None, -100, 0.0),
        "_native_batch_norm_legit_functional": lambda: aten._native_batch_norm_legit_functional.default(
            x, scale, scale, *statistics, True, 0.1, 1e-5
        ),
        "_native_batch_norm_legit": lambda: aten._native_batch_norm_legit.no_stats(x, scale, scale, True, 0.1, 1e-5),
        "_native_batch_norm_legit_no_training": lambda: aten._native_batch_norm_legit_no_training.default(
            x, scale, scale, *statistics, 0.1, 1e-5
        ),
    }
    for name in listed:
        call = calls.get(name, lambda name=name: getattr(aten, name).default(x))
        found = [result for result in tensors_of(call()) if result.dtype.is_floating_point]
        flows = [result.requires_grad and bool(gradient(result, x).any()) for result in found]
        count = FACTS[name].differentiable
        assert flows == [position < count for position in range(len(found))], name


def gradient(result: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(result, x, torch.rand_like(result), retain_graph=True)
    return found


# ---------------------------------------------------------------- what backward keeps

KEEPING = """
program mesh(dp=1)
  a    = param a                 : f64[4,3]
  b    = param b                 : f64[4,3]
  w    = param w                 : f64[3,3]
  m    = input                   : bool[4,3]
  ids  = input                   : i64[4,3]
  places = input                 : i64[2]
  y    = {call}
  loss = aten.sum(y)             : f64[]
  return loss=loss
"""
KEPT: dict[Kept, tuple[str, ...]] = {
    Kept.NOTHING: (
        "aten.add.Tensor(a, b) : f64[4,3]",
        "aten.sub.Tensor(a, b) : f64[4,3]",
        "aten.neg(a) : f64[4,3]",
        "aten.sum.dim_IntList(a, [0]) : f64[3]",
        "aten.mean.dim(a, [0]) : f64[3]",
        "aten.cat([a, b], 1) : f64[4,6]",
        "aten.stack([a, b]) : f64[2,4,3]",
        "aten.clone(a) : f64[4,3]",
        "aten._to_copy(a, dtype=f32) : f32[4,3]",
        "aten.repeat(a, [2, 1]) : f64[8,3]",
        "aten.pad(a, [1, 1]) : f64[4,5]",
        "aten.embedding(a, ids) : f64[4,3,3]",
        "aten.index.Tensor(a, [ids]) : f64[4,3,3]",
        "aten.gather(a, 0, ids) : f64[4,3]",
        "aten.index_select(a, 1, places) : f64[4,2]",
        "aten.scatter.src(a, 0, ids, b) : f64[4,3]",
        "aten.roll(a, [1]) : f64[4,3]",
        "aten.flip(a, [0]) : f64[4,3]",
        "aten.cumsum(a, 0) : f64[4,3]",
    ),
    Kept.RESULT: (
        "aten.relu(a) : f64[4,3]",
        "aten.sigmoid(a) : f64[4,3]",
        "aten.tanh(a) : f64[4,3]",
        "aten.exp(a) : f64[4,3]",
        "aten.sqrt(a) : f64[4,3]",
        "aten.rsqrt(a) : f64[4,3]",
        "aten._softmax(a, -1, False) : f64[4,3]",
    ),
    Kept.CONDITION: (
        "aten.where.self(m, a, b) : f64[4,3]",
        "aten.masked_fill.Scalar(a, m, 0.0) : f64[4,3]",
    ),
    Kept.FACTORS: (
        "aten.mul.Tensor(a, b) : f64[4,3]",
        "aten.mul.Tensor(a, 2.0) : f64[4,3]",
        "aten.mul.Tensor(a, m) : f64[4,3]",
    ),
    Kept.QUOTIENT: ("aten.div.Tensor(a, b) : f64[4,3]", "aten.div.Tensor(a, 2.0) : f64[4,3]"),
    Kept.OPERANDS: (
        "aten.linear(a, w) : f64[4,3]",
        "aten.mm(a, w) : f64[4,3]",
        "aten.gelu(a) : f64[4,3]",
        "aten.silu(a) : f64[4,3]",
        "aten.sin(a) : f64[4,3]",
    ),
}


@pytest.mark.parametrize(("kept", "call"), [(kept, call) for kept, calls in KEPT.items() for call in calls])
def test_backward_keeps_what_the_table_says(kept: Kept, call: str) -> None:
    """The estimate on a forward program, and what ``differentiate`` then keeps of it. Whole numbers aside."""
    program = differentiate(parse(KEEPING.format(call=call).strip()))
    (node,) = (node for node in program.graph.nodes if node.name == "y")
    assert facts.facts_of(node.target).kept is kept
    role = program.role
    assert role is not None
    results = output_node(role.forward).args[0]
    assert isinstance(results, tuple)
    found = {node.name for node in results[len(results) - role.saved :] if not is_whole(node)}
    assert found == {source.name for source in operands_kept(node) if not is_whole(source)}


def is_whole(node: fx.Node) -> bool:
    return values(node)[0].dtype == torch.int64


def test_every_operator_of_which_little_is_kept_is_tried() -> None:
    """``to``, ``contiguous`` and ``softmax`` are other operators when there is a backward pass."""
    tried = {call.partition("(")[0].split(".")[1] for calls in KEPT.values() for call in calls}
    listed = {name for name, row in FACTS.items() if row.kept not in (Kept.OPERANDS, Kept.ATTENTION)}
    assert listed - tried == {"to", "contiguous", "softmax"}
