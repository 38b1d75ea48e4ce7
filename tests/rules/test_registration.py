"""``autopar.register_rule``: whose operator, does the line fit it, is it right; and a model with such an operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.check import TOLERANCE, check
from autopar.rules import RULES, rule_for
from autopar.rules.factoring import Call, Factoring, factoring_of
from tests.rules.tensors import ints, x


@torch.library.custom_op("autopar_tests::scores", mutates_args=())
def scores(
    q: Tensor, k: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Products (b, q, k) and their largest over the keys; what happens inside is hidden from torch, as in Triton."""
    found = torch.from_numpy(np.einsum("bqd,bkd->bqk", q.detach().numpy(), k.detach().numpy())) * scale
    found = found if mask is None else found * mask
    found = found if bias is None else found + bias
    return found, found.amax(-1)


@scores.register_fake
def _(q: Tensor, k: Tensor, mask: Any = None, bias: Any = None, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    found = q.new_empty(*q.shape[:-1], k.shape[-2])
    return found, found.new_empty(found.shape[:-1])


SCORES = "b q d, b k d, b k 1, k -> b q k, b q; whole k d q"


@torch.library.custom_op("autopar_tests::gated", mutates_args=())
def gated(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None, power: int) -> tuple[Tensor, Tensor]:
    """(x weight^T + bias) * gate^power, and the gate's square."""
    y = x @ weight.T if bias is None else x @ weight.T + bias
    return y * gate**power, gate.square()


@gated.register_fake
def _(x: Tensor, weight: Tensor, gate: Tensor, bias: Any, power: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), torch.empty_like(gate)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, gate, bias, ctx.power = inputs
    ctx.save_for_backward(x, weight, gate, bias)


def _backward(ctx: Any, grad: Tensor, grad_square: Tensor) -> tuple[Any, ...]:
    x, weight, gate, bias = ctx.saved_tensors
    y = x @ weight.T if bias is None else x @ weight.T + bias
    below = grad * gate**ctx.power
    rows = below.flatten(0, -2)
    to_gate = grad * y * ctx.power * gate ** (ctx.power - 1) + 2 * gate * grad_square
    return below @ weight, rows.T @ x.flatten(0, -2), to_gate, None if bias is None else rows.sum(0), None


gated.register_autograd(_backward, setup_context=_remember)
GATED = "... k, n k, ... n, n -> ... n, ... n; whole k; contraction"


@pytest.fixture(autouse=True)
def rules() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


# ---------------------------------------------------------------- operators and lines


@torch.library.custom_op("autopar_tests::doubled_", mutates_args={"x"})
def doubled_(x: Tensor) -> None:
    x.mul_(2)


@pytest.mark.parametrize(
    ("operator", "line", "message"),
    [
        ("nolib::nothing", "a -> a", "torch knows no operator 'nolib::nothing'"),
        ("cosh", "a -> a", "torch knows no operator 'cosh'"),
        ("aten::add.Tenser", "a, a -> a", "'aten::add' has no overload 'Tenser'; there are Tensor, Scalar"),
        ("aten::add", "a, a -> a", "aten.add has the overloads Tensor, .*; name one, as '::op.Tensor'"),
        (torch.cosh, "a -> a", "is no operator of a graph; give a name such as 'aten::cosh'"),
        (doubled_, "a -> a", "(?s)autopar_tests.doubled_.default writes into 'x'.*Way out: .*mutates_args"),
        ("aten::as_strided", "a -> a", "(?s)aten.as_strided.default returns a view.*Way out: return a copy"),
        ("aten::mm", "a b -> a b", "has 1 inputs, aten.mm.default takes 2 tensors: self, mat2"),
        (
            gated,
            "k, n k -> n, n",
            "has 2 inputs, autopar_tests.gated.default takes 3 to 4 tensors: x, weight, gate, bias",
        ),
        (gated, "... k, n k, ... n, n -> ... n", "has 1 outputs, autopar_tests.gated.default returns 2"),
        (gated, "... k, n k, ... n, n -> ... n n, ... n", "factor 'n' stands twice in '... n n'"),
    ],
)
def test_what_cannot_be_registered(operator: Any, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autopar.register_rule(operator, line)


@pytest.mark.parametrize("name", ["aten::cosh", "aten::cosh.default", torch.ops.aten.cosh, torch.ops.aten.cosh.default])
def test_a_rule_replaces_the_one_before(name: Any) -> None:
    before = rule_for(torch.ops.aten.cosh.default)
    autopar.register_rule(name, "a b -> a b", check=[(x(6, 4),)])
    assert rule_for(torch.ops.aten.cosh.default) is not before


def test_optional_operands_are_told_by_their_names() -> None:
    """A line names all of them; in a call some are missing, or stand in another order."""
    graph = torch.fx.Graph()
    q, k, bias = (graph.placeholder(name) for name in ("q", "k", "bias"))
    shapes = ((6, 4, 3), (6, 2, 3), (2,))
    target = torch.ops.autopar_tests.scores.default
    given = Call(target, (q, k), {"scale": 2.0, "bias": bias}, (q, k, bias), shapes, ((6, 4, 2), (6, 4)))
    assert factoring_of(SCORES, given).inputs == ((("b",), ("q",), ("d",)), (("b",), ("k",), ("d",)), (("k",),))
    clauses = "b q d, b k d, b k 1, k -> b q k, b q; whole k d; linear 0 3, 2; added 3"
    assert factoring_of(clauses, given).linear == (frozenset({0, 2}),)
    assert factoring_of(clauses, given).added == {2}


def test_a_factor_of_outputs_alone_stays_whole() -> None:
    call = Call(torch.ops.aten.one_hot.default, (), {}, (), ((6,),), ((6, 4),))
    assert factoring_of("b -> b classes", call).factors == ("b",)


# ---------------------------------------------------------------- checked by numbers


def test_keywords_optional_tensors_and_several_outputs_are_checked() -> None:
    examples = [
        (x(6, 4, 3), x(6, 2, 3)),
        (x(6, 4, 3), x(6, 2, 3), x(6, 2, 1).transpose(1, 2), {"scale": 0.5}),
        (x(4, 4, 3), x(4, 2, 3), None, {"bias": x(2), "scale": 0.5}),
    ]
    autopar.register_rule("autopar_tests::scores", SCORES.replace("b k 1", "b 1 k"), check=examples)
    autopar.register_rule("autopar_tests::gated", GATED, check=[(x(2, 6, 4), x(6, 4), x(2, 6, 6), None, 2)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "b q d, b k d, b 1 k, k -> b q k, b q; whole q k",
            r"'d' over 3 ranks.*S\(2\), S\(2\) -> P, P.*output 1: off by",
        ),
        ("b q d, b k d, b 1 k, k -> b q k, b q; whole q d", r"'k' over 2 ranks.*S\(1\) -> S\(2\), P.*output 1: off by"),
        ("b q d, b k d, b 1 k, k -> b q k, b q; whole q d; max k", "an output has 'k'"),
    ],
)
def test_a_wrong_rule_is_not_registered(line: str, message: str) -> None:
    with pytest.raises((autopar.WrongRuleError, ValueError), match=f"(?s){message}"):
        autopar.register_rule("autopar_tests::scores", line, check=[(x(6, 4, 3), x(6, 2, 3))])
    assert torch.ops.autopar_tests.scores.default not in RULES


def test_a_wrong_gradient_names_the_operand() -> None:
    """Forward is right: only the gradient of the second operand tells that the sum must not be pending."""

    def rule(call: Call) -> Factoring:
        return (
            Factoring((("b",),), (("b",),), {"b": call.inputs[0][0]})
            if len(call.inputs) == 1
            else Factoring(((("b",),), ()), ((("b",),),), {"b": call.inputs[0][0]})
        )

    @torch.library.custom_op("autopar_tests::biased", mutates_args=())
    def biased(x: Tensor, shift: Tensor) -> Tensor:
        return x + shift

    biased.register_fake(lambda x, shift: torch.empty_like(x))

    def formula(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.mean()  # of a part it is another mean, and the ranks' means are no summands

    biased.register_autograd(formula)
    with pytest.raises(autopar.WrongRuleError, match=r"(?s)'b' over 2 ranks.*gradient of operand 1: off by \d"):
        autopar.register_rule(biased, rule, check=[(x(6), x())])


def test_an_example_that_splits_nothing_proves_nothing() -> None:
    with pytest.raises(ValueError, match="no example splits factor 'b' of .*gated.*divides by 2 or 3"):
        autopar.register_rule(
            "autopar_tests::gated", GATED.replace("...", "b"), check=[(x(5, 4), x(6, 4), x(5, 6), None, 1)]
        )


def test_single_precision_has_its_own_tolerance() -> None:
    rows = x(6, 4).float()
    autopar.register_rule("aten::linear", "b k, n k -> b n; linear 0, 1", check=[(rows, x(6, 4).float())])
    with pytest.raises(autopar.WrongRuleError, match="'k' over 2 ranks"):
        autopar.register_rule("aten::linear", "b k, n k, n -> b n", check=[(rows, x(6, 4).float(), x(6).float())])


# ---------------------------------------------------------------- in a model


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 16)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.embedding(tokens)
        y, square = torch.ops.autopar_tests.gated(h, self.up.weight, self.gate(h), self.up.bias, 2)
        z, _ = torch.ops.autopar_tests.gated(h, self.up.weight, square.tanh(), None, 1)
        logits = self.down(torch.relu(y) + z)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("mesh", ["dp=2", "tp=2", "dp=2,tp=2", "tp=4", "dp=3,tp=3"])
def test_a_model_with_an_operator_of_the_users(mesh: str) -> None:
    autopar.register_rule(gated, GATED, check=[(x(2, 6, 4), x(6, 4), x(2, 6, 6), x(6), 2)])
    torch.manual_seed(0)
    labels = ints(16, 6, 5)
    labels[0, 2:] = -100
    labels[3, 1] = -100
    report = check(Gates(), {"tokens": ints(16, 6, 5), "labels": labels}, autopar.Mesh.parse(mesh))
    assert len(report.grads) == 7 and report.worst <= TOLERANCE, report
    text = str(report.program).split("\n\n")[0]
    if "tp" in mesh:
        assert "up.weight" in text and ": f64[12@tp,8]" in text, text
    if "dp" in mesh:
        assert "(f64[6@dp,5,12" in text, text


def test_without_a_rule_the_error_says_where_to_read() -> None:
    batch = {"tokens": ints(16, 4, 3), "labels": ints(16, 4, 3)}
    with pytest.raises(autopar.UnknownOperatorError, match=r'(?s)register_rule\("autopar_tests::gated.*docs/rules.md'):
        check(Gates(), batch, autopar.Mesh(dp=2))
