"""Masks: which formulas they are, which stay, and the same numbers either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autopar.check import check
from autopar.frontend.numerics import input_tensors, promote_float32, run_graph
from autopar.frontend.trace import trace
from autopar.ir.node import values
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.operators import masked_attention
from autopar.operators.predicates import parse
from autopar.passes.recognise_masks import MASK
from tests.hugging_face import build, errors
from tests.passes.canonical import Function, attentions, canonical, counts, traced
from tests.selection import slow_but

S = 8
TRIANGLE = torch.ones(S, S, dtype=torch.bool).tril()
WINDOW = TRIANGLE & ~TRIANGLE.tril(-4)
INFINITE, LEAST = -torch.inf, torch.finfo(torch.float32).min


def attend(mask: Callable[..., Tensor], *given: Tensor, queries: int = S, keys: int = S) -> Program:
    """The program of attention under ``mask(*given)``; it computes what torch does."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask(*given))

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 16, dtype=torch.float64) for length in (queries, keys, keys))
    program = canonical(traced(Function(attention), q, k, v, *given))
    (found,) = run_graph(program.graph, input_tensors(program, Function(attention), (q, k, v, *given), {}))
    torch.testing.assert_close(found, attention(q, k, v, *given), atol=1e-13, rtol=0)
    return program


def formulas(program: Program) -> list[str]:
    """The formula of each attention; "tensor" for a mask that stays, and whatever bias there is."""
    found = []
    for node in program.graph.nodes:
        if node.target is masked_attention:
            found.append(("bias: " if node.args[3] else "") + node.args[5])
        elif node.target is torch.ops.aten.scaled_dot_product_attention.default:
            mask, _, causal = node.args[3:]
            found.append("tensor" if mask is not None else "j<=i" if causal else "")
    return found


def additive(keep: Tensor, hidden: float) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, hidden)


def constant(mask: Tensor) -> Callable[[], Tensor]:
    """Not a constant of the model, but computed."""
    return lambda: (torch.arange(mask.numel()).reshape(mask.shape) * 0 + mask).to(mask.dtype).double()


@pytest.mark.parametrize("hidden", [INFINITE, LEAST])
@pytest.mark.parametrize("dims", [2, 4])
def test_a_causal_constant_becomes_is_causal(hidden: float, dims: int) -> None:
    mask = additive(TRIANGLE, hidden)
    program = attend(constant(mask if dims == 2 else mask.expand(2, 1, S, S)))
    assert attentions(program) == [(None, 0.0, True)] and not program.constants


def test_a_mask_that_hides_nothing_is_dropped() -> None:
    assert attentions(attend(constant(torch.zeros(2, 1, S, S)))) == [(None, 0.0, False)]


@pytest.mark.parametrize(
    ("mask", "formula"),
    [
        (additive(WINDOW, INFINITE), "j<=i & i-j<4"),
        (additive(TRIANGLE.T, INFINITE), "i-j<1"),
        (additive(TRIANGLE[-4:], INFINITE), "j<=i+4"),  # fewer queries than keys
        (additive(TRIANGLE.tril(-1), INFINITE), "j<=i-1"),  # a row without keys
        (additive(torch.block_diag(*[torch.ones(2, 2)] * 4).bool(), INFINITE), "i//2==j//2"),
        (additive(TRIANGLE | (torch.arange(S) < 3), INFINITE), "j<=i | j<3"),
        (additive(TRIANGLE, -1.0), "tensor"),
        (torch.where(TRIANGLE, 0.5, INFINITE), "tensor"),
        (additive(torch.rand(S, S, generator=torch.Generator().manual_seed(0)) > 0.5, INFINITE), "tensor"),
    ],
    ids=["window", "anti-causal", "rectangle", "earlier", "chunks", "prefix", "soft", "biased", "random"],
)
def test_constants(mask: Tensor, formula: str) -> None:
    assert formulas(attend(constant(mask), queries=len(mask))) == [formula]


# ---------------------------------------------------------------- computed masks


def rows() -> Tensor:
    return torch.arange(S)[:, None]


def columns() -> Tensor:
    return torch.arange(S)[None]


COMPUTED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "less or equal": (lambda: columns() <= rows(), "j<=i"),
    "not greater": (lambda: ~(columns() > rows()), "j<=i"),
    "turned around": (lambda: rows() >= columns(), "j<=i"),
    "difference": (lambda: (rows() - columns()) >= 0, "j<=i"),
    "negative difference": (lambda: (columns() - rows()).neg() > -1, "j<=i"),
    "tril": (lambda: torch.ones(S, S, dtype=torch.bool).tril(), "j<=i"),
    "triu of infinities": (lambda: torch.full((S, S), INFINITE, dtype=torch.float64).triu(1), "j<=i"),
    "tril of ones": (lambda: torch.ones(S, S).tril(1) == 1, "j<=i+1"),
    "filled": (lambda: torch.zeros(S, S, dtype=torch.float64).masked_fill(columns() > rows(), LEAST), "j<=i"),
    "one minus": (lambda: (1.0 - (columns() <= rows()).double()) * LEAST, "j<=i"),
    "window": (lambda: (columns() <= rows()) & (rows() - columns() < 3), "j<=i & i-j<3"),
    "two-sided window": (lambda: (rows() - columns()).abs() <= 2, "j<=i+2 & i-j<3"),
    "outside a window": (lambda: (rows() - columns()).abs() > 2, "j<=i-3 | i-j<-2"),
    "equal": (lambda: rows() == columns(), "j<=i & i-j<1"),
    "different": (lambda: rows() != columns(), "j<=i-1 | i-j<0"),
    "chunks": (lambda: (rows() // 3 == columns() // 3) & (columns() <= rows()), "j<=i & i//3==j//3"),
    "prefix": (lambda: (columns() <= rows()) | (columns() < 3), "j<=i | j<3"),
    "sum of two": (
        lambda: torch.where(columns() <= rows(), 0.0, INFINITE) + torch.where(rows() - columns() < 3, 0.0, INFINITE),
        "j<=i & i-j<3",
    ),
    "product of two": (lambda: ((columns() <= rows()).long() * (rows() - columns() < 3).long()) == 1, "j<=i & i-j<3"),
    "of a batch": (lambda: (columns() <= rows()).expand(2, 1, S, S), "j<=i"),
    "transposed": (lambda: (columns() >= rows()).transpose(0, 1), "j<=i"),
    "a part": (lambda: (torch.arange(2 * S)[None] <= torch.arange(2 * S)[:, None])[S:, S:], "j<=i"),
    "later part": (lambda: (torch.arange(S + 2)[None] <= torch.arange(S + 2)[:, None])[2:, :S], "j<=i+2"),
    "looked up": (lambda: torch.arange(S)[columns()] <= torch.arange(S)[rows()], "j<=i"),
    "nothing": (lambda: (rows() >= 0) & (columns() < S), ""),
    "exclusive or": (lambda: (columns() > rows()) ^ torch.tensor(True), "j<=i"),
    "choice": (lambda: torch.where(columns() < 3, rows() >= 0, columns() <= rows()), "j<=i | j<3"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_masks(name: str) -> None:
    mask, formula = COMPUTED[name]
    program = attend(lambda: mask().double() if mask().is_floating_point() else mask())
    assert formulas(program) == [formula]
    assert not any(tensor.numel() >= S * S for tensor in program.constants.values())


def _valid() -> Tensor:
    return torch.arange(S) < torch.tensor([[5], [S]])


INPUTS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, str, list[tuple[int, ...]]]] = {
    "keys": (lambda v: v[:, None, None, :], _valid(), "v0[j]", [(2, S)]),
    "spread": (lambda v: v[:, None, None, :].expand(2, 1, S, S), _valid(), "v0[j]", [(2, S)]),
    "keys, causal": (lambda v: v[:, None, None, :] & (columns() <= rows()), _valid(), "j<=i & v0[j]", [(2, S)]),
    "left": (lambda v: v.flip(1)[:, None, None] & (columns() <= rows()), _valid(), "j<=i & v0[j]", [(2, S)]),
    "rows and keys": (lambda v: v[:, None, None, :] & v[:, None, :, None], _valid(), "v0[i] & v0[j]", [(2, S)]),
    "numbers": (lambda v: (v == 1)[:, None, None], _valid().long(), "v0[j]", [(2, S)]),
    "documents": (lambda d: d[:, None, :, None] == d[:, None, None], torch.arange(S).expand(2, S) // 3, "v0[i]==v0[j]",
                  [(2, S)]),
    "positions": (lambda p: p[:, None, :, None] >= p[:, None, None], torch.randint(9, (2, S)), "v0[i]>=v0[j]",
                  [(2, S)]),
    "positions turned": (lambda p: p[:, None, None] < p[:, None, :, None], torch.randint(9, (2, S)), "v0[i]>v0[j]",
                         [(2, S)]),
    "lengths": (lambda n: columns() < n[:, None, None, None], torch.tensor([3, 6]), "v0[j]", [(2, S)]),
    "images": (
        lambda t: (columns() <= rows()) | ((t[:, None, :, None] == t[:, None, None]) & (t[:, None, None] > 0)),
        torch.tensor([[0, 1, 1, 1, 0, 0, 2, 2], [0, 0, 0, 0, 1, 1, 1, 0]]),
        "(j<=i | v0[i]==v0[j]) & (j<=i | v1[j])",
        [(2, S), (2, S)],
    ),
    "looked up": (lambda v: v[torch.arange(2)[:, None, None, None], columns()[None, None]], _valid(), "v0[j]",
                  [(2, S)]),
    "shifted": (lambda d: d[:, None, 1:, None] == d[:, None, None, :-1], torch.randint(3, (2, S + 1)), "v0[i]==v1[j]",
                [(2, S), (2, S)]),
    "adding -inf": (lambda v: torch.where(v, 0.0, INFINITE).double()[:, None, None].expand(2, 1, S, S), _valid(),
                    "v0[j]", [(2, S)]),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_masks_of_inputs(name: str) -> None:
    mask, given, formula, shapes = INPUTS[name]
    program = attend(mask, given)
    assert formulas(program) == [formula]
    (node,) = (node for node in program.graph.nodes if node.target is masked_attention)
    assert [values(vector)[0].shape for vector in node.args[4]] == shapes


STAYING: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, str]] = {
    "an input of rows and columns": (lambda m: m, TRIANGLE.expand(2, 1, S, S).clone(), "depends on row and column"),
    "heads": (lambda m: m[:, :, None].expand(2, 4, S, S), torch.rand(2, 4, S) > -1, "depends on row and column"),
    "a product": (lambda x: x[:, None, :, None] * x[:, None, None] > 0, torch.randn(2, S), "no form as a formula"),
    "rows that are hidden as a whole": (
        lambda v: additive(v[:, None, None] & (columns() <= rows()), LEAST).double(), _valid().flip(1),
        "attends evenly",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYING)
def test_masks_that_stay_say_why(name: str) -> None:
    mask, given, reason = STAYING[name]
    program = attend(mask, given)
    assert formulas(program) == ["tensor"]
    ((node, decision),) = program.decisions[MASK].items()
    assert decision.chosen.startswith("a tensor of 2 x") and reason in str(decision.alternatives["a formula"])
    assert f"not a formula: {decision.alternatives['a formula']}" in program.explain(node)


def test_keys_hidden_by_a_finite_number_are_a_row_of_a_bias() -> None:
    """A row of the batch without any key attends evenly to all of them, as torch computes it."""
    valid = _valid() & torch.tensor([[True], [False]])
    program = attend(lambda v: additive(v, LEAST).double()[:, None, None].expand(2, 1, S, S), valid)
    ((mask, _, causal),) = attentions(program)
    assert values(mask)[0].shape == (2, 1, 1, S) and not causal


def test_a_bias_with_a_gradient_keeps_it() -> None:
    table = torch.randn(4, S, S, dtype=torch.float64, requires_grad=True)
    program = attend(lambda t: torch.where(columns() <= rows(), t, LEAST), table)
    assert formulas(program) == ["bias: j<=i"]
    program = attend(lambda t: t + torch.where(rows() - columns() < 3, 0.0, INFINITE).double(), table)
    assert formulas(program) == ["bias: i-j<3"]


def test_attention_with_dropout_keeps_a_tensor() -> None:
    def attention(q: Tensor, causal: bool) -> Tensor:
        window = (columns() <= rows()) & (rows() - columns() < (99 if causal else 3))
        return F.scaled_dot_product_attention(q, q, q, window, 0.5)

    q = torch.randn(2, 4, S, 16)
    assert formulas(canonical(traced(Function(lambda q: attention(q, True)), q))) == ["j<=i"]
    program = canonical(traced(Function(lambda q: attention(q, False)), q))
    assert formulas(program) == ["tensor"] and "dropout" in str(program.decisions[MASK])


def test_both_a_mask_and_is_causal() -> None:
    def attention(q: Tensor) -> Tensor:
        return torch.ops.aten.scaled_dot_product_attention.default(q, q, q, rows() - columns() < 3, 0.0, True)

    assert formulas(canonical(traced(Function(attention), torch.randn(2, 4, S, 16)))) == ["j<=i & i-j<3"]


def test_layers_share_vectors() -> None:
    model, batch = build("llama")
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with promote_float32():
        program = canonical(trace(model, (), batch))
    first, second = (node.args[4] for node in program.graph.nodes if node.target is masked_attention)
    assert first == second and counts(program)["aten.index_select"] == 0


# ---------------------------------------------------------------- models


def padded(batch: dict[str, Any], left: bool) -> dict[str, Any]:
    valid = torch.ones_like(batch["input_ids"])
    valid[1, slice(0, 4) if left else slice(12, None)] = 0
    return {**batch, "attention_mask": valid}


def packed(batch: dict[str, Any]) -> dict[str, Any]:
    positions = torch.stack(
        [torch.cat([torch.arange(10), torch.arange(6)]), torch.cat([torch.arange(3), torch.arange(13)])]
    )
    return {**batch, "position_ids": positions}


BATCHES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "": lambda batch: batch,
    "padded": lambda batch: padded(batch, left=False),
    "padded left": lambda batch: padded(batch, left=True),
    "packed": packed,
}
MODELS = [
    ("llama", "", {"j<=i"}),
    ("llama", "padded", {"j<=i & v0[j]"}),
    ("llama", "padded left", {"j<=i & v0[j]"}),
    ("llama", "packed", {"j<=i & v0[i]==v0[j]"}),
    ("mistral", "", {"j<=i & i-j<8"}),
    ("mistral", "padded left", {"j<=i & i-j<8 & v0[j]"}),
    ("mistral", "packed", {"j<=i & i-j<8 & v0[i]==v0[j]"}),
    ("gpt2", "padded", {"j<=i & v0[j]"}),
    ("bert", "", {""}),
    ("bert", "padded", {"v0[j]"}),
    ("bart", "padded", {"v0[j]", "j<=i"}),
    ("t5", "", {"tensor", "bias: j<=i", ""}),
    ("t5", "padded", {"tensor", "bias: j<=i"}),
    ("vit", "", {""}),
]


@pytest.mark.parametrize(
    ("name", "form", "expected"),
    slow_but([0, 2, 5, 6, 7, 9, 10], MODELS),
    ids=[f"{name} {form}".strip() for name, form, _ in MODELS],
)
def test_models(name: str, form: str, expected: set[str]) -> None:
    model, batch = build(name)
    batch = BATCHES[form](batch)
    with promote_float32():
        program = canonical(trace(model, (), batch))
    assert set(formulas(program)) == expected
    assert max(errors(program, model, batch)) <= 1e-12
    large = [
        node
        for node in program.graph.nodes
        for kind in values(node)
        if kind.shape[-2:] == (16, 16) and kind.dtype is torch.bool
    ]
    assert name == "t5" or not large


@pytest.mark.parametrize("axes", slow_but([2], ({"dp": 2}, {"tp": 2}, {"dp": 2, "tp": 2})), ids=("dp", "tp", "dp tp"))
@pytest.mark.parametrize(
    ("name", "form"),
    slow_but([0, 1, 3], [("llama", "padded left"), ("mistral", "packed"), ("bart", "padded"), ("t5", "padded")]),
)
def test_models_on_a_mesh(name: str, form: str, axes: dict[str, int]) -> None:
    model, batch = build(name)
    assert check(model, BATCHES[form](batch), Mesh(**axes)).worst <= 1e-12


def test_formulas_are_read_back() -> None:
    """Every formula of this file is one that the kernels read."""
    for text in [formula for _, formula in COMPUTED.values()] + [formula for _, _, formula, _ in INPUTS.values()]:
        assert str(parse(text)) == text
