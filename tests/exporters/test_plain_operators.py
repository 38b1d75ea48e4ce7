"""The plain forms of autopar's operators compute what their kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.exporters.rank_module import FORMS
from autopar.operators import losses
from autopar.operators.attention import ATTENTION, ATTENTION_BACKWARD
from autopar.operators.attention_tile import MERGE, TILE, TILE_BACKWARD
from autopar.operators.bags import EMBEDDING_BAGS
from autopar.operators.capacity import PICK_ROWS, SEAT_ROWS
from autopar.operators.experts import EXPERT_LINEAR, EXPERT_OUTER
from autopar.operators.masked_attention import masked_attention
from autopar.operators.recurrent import RECURRENT_LAYER
from autopar.operators.routing import COLUMNS, COLUMNS_BACKWARD, PERMUTE_ROWS, RECEIVED_IDS, ROUTE_ROWS, ROW_SIZES
from autopar.operators.straight_through import STRAIGHT_THROUGH

Samples = list[tuple[Any, ...]]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def heads(length: int, count: int = 4) -> Tensor:
    return numbers(2, count, length, 8)


def tiles() -> Samples:
    """Causal rings, zig-zag too, windows, documents, biases; queries that may attend to nothing."""
    documents = torch.tensor([[0] * 5 + [1] * 11, [0] * 9 + [1] * 7])
    shown = torch.rand(2, 1, 8, 16) > 0.3
    found: Samples = []
    for rank in (0, 1):
        here = torch.tensor(rank)
        for step in (0, 1):
            for mirrored in (False, True):
                found.append((heads(8), heads(8, 2), heads(8, 2), None, [], here, "j<=i", step, 2, mirrored, None))
        found.append((heads(8), heads(16), heads(16), shown, [], here, "i-j<4", -1, 2, False, 0.3))
        found.append((heads(8), heads(8), heads(8), numbers(1, 4, 8, 16), [], here, "", 1, 2, False, None))
        found.append((heads(8), heads(8), heads(8), None, [documents], here, "v0[i]==v0[j]", 1, 2, False, None))
    return found


def tile_gradients() -> Samples:
    found: Samples = []
    for q, k, v, bias, *rest in tiles():
        out, logsumexp = TILE(q, k, v, bias, *rest)
        vectors, rank, *options = rest
        wanted = bias is not None and bias.dtype is not torch.bool
        found.append((numbers(*out.shape), q, k, v, bias, vectors, out, logsumexp, rank, *options, wanted))
    return found


def attentions() -> Samples:
    mask = torch.rand(2, 1, 8, 8) > 0.2
    return [
        (heads(8), heads(8, 2), heads(8, 2), None, True, None),
        (heads(8), heads(8), heads(8), mask, False, 0.5),
        (numbers(2, 8, 8), numbers(2, 8, 8), numbers(2, 8, 8), None, False, None),
    ]


def attention_gradients() -> Samples:
    found: Samples = []
    for q, k, v, mask, causal, scale in attentions():
        out, logsumexp = ATTENTION(q, k, v, mask, causal, scale)
        found.append((numbers(*out.shape), q, k, v, mask, out, logsumexp, causal, scale))
    return found


def merges() -> Samples:
    nothing = torch.full((2, 4, 8), -torch.inf, dtype=torch.float64)
    partly = numbers(2, 4, 8)
    partly[:, :, ::2] = -torch.inf
    return [
        (heads(8), one, heads(8), other)
        for one, other in ((numbers(2, 4, 8), partly), (partly, numbers(2, 4, 8)), (nothing, partly), (partly, partly))
    ]


def ids(count: int, experts: int = 5) -> Tensor:
    """Also of no expert."""
    return torch.randint(experts + 1, (count,))


def routes() -> Samples:
    return [(ids(12), 5, ways, places) for ways in (1, 2, 3) for places in (None, [2, 0, 1, 4, 3])]


def received() -> Samples:
    counts = torch.tensor([[[2, 0, 1]], [[0, 3, 0]]])
    return [(counts, 6)]


def permutations() -> Samples:
    order, inverse, _ = ROUTE_ROWS(ids(12), 5, 2, None)
    return [(numbers(12, 3), order, inverse), (numbers(6, 3), order, inverse)]


def seats() -> Samples:
    return [(ids(12), 5, ways, capacity, 2, None) for ways in (1, 2) for capacity in (1, 3)]


def picks() -> Samples:
    found: Samples = []
    for given in seats():
        taken, seated, _ = SEAT_ROWS(*given)
        found += [
            (numbers(12, 3), seated, taken),
            (numbers(6, 3), seated, taken),
            (numbers(len(seated), 3), taken, seated),
        ]
    return found


def bags() -> Samples:
    table, offsets = numbers(7, 3), torch.tensor([0, 2, 2, 5])
    found: Samples = []
    for mode in ("sum", "mean", "max"):
        found.append((table, torch.randint(7, (4, 3)), None, None, None, None, mode, 2))
        found.append((table, torch.randint(7, (9,)), offsets, torch.tensor([0, 1, 2, 3]), None, None, mode, -1))
        found.append((table, torch.randint(7, (9,)), offsets, torch.tensor([1, 2]), None, None, mode, -1))
        found.append((table, torch.randint(14, (4, 3)), None, None, None, torch.tensor(1), mode, -1))
    found.append((table, torch.randint(7, (4, 3)), None, None, numbers(4, 3), None, "sum", -1))
    return found


def layers() -> Samples:
    found: Samples = []
    for cell, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
        states = [numbers(2, 5)] * (2 if cell == "lstm" else 1)
        weights = [numbers(gates * 5, 3), numbers(gates * 5, 5), numbers(gates * 5), numbers(gates * 5)]
        found.append((numbers(6, 2, 3), states, weights, cell))
    return found


def formulas() -> Samples:
    padding = torch.ones(2, 8, dtype=torch.bool)
    padding[0, 5:] = False
    return [
        (heads(8), heads(8, 2), heads(8, 2), None, [], "j<=i"),
        (heads(8), heads(8), heads(8), None, [padding], "j<=i & v0[j]", 0.2),
        (heads(8), heads(8), heads(8), numbers(1, 4, 8, 8), [], "i-j<3 & j<=i"),
    ]


def labelled_rows() -> Samples:
    """(logarithms, labels, weights of classes or None) of rows some of which do not count."""
    labels = torch.tensor([0, 1, -100, 3, 4, -100, 2])
    return [(numbers(7, 5), labels, None), (numbers(7, 5), labels, numbers(5).exp())]


SAMPLES: dict[Any, Callable[[], Samples]] = {
    ATTENTION: attentions,
    ATTENTION_BACKWARD: attention_gradients,
    TILE: tiles,
    TILE_BACKWARD: tile_gradients,
    MERGE: merges,
    masked_attention: formulas,
    EXPERT_LINEAR: lambda: [(numbers(6, 3), numbers(5, 3, 4), ids(12)), (numbers(12, 3), numbers(5, 3, 4), ids(12))],
    EXPERT_OUTER: lambda: [(numbers(6, 3), numbers(12, 4), ids(12), 5)],
    ROUTE_ROWS: routes,
    ROW_SIZES: lambda: [(torch.randint(4, (1, 2, 3)), torch.randint(4, (2, 1, 3)))],
    RECEIVED_IDS: received,
    PERMUTE_ROWS: permutations,
    COLUMNS: lambda: [(numbers(4, 9), 1, 2, 8, 3), (numbers(4, 9), 0, 1, 4, 1)],
    COLUMNS_BACKWARD: lambda: [(numbers(4, 2), 1, 9, 2, 3)],
    SEAT_ROWS: seats,
    PICK_ROWS: picks,
    EMBEDDING_BAGS: bags,
    RECURRENT_LAYER: layers,
    STRAIGHT_THROUGH: lambda: [(numbers(3), numbers(3))],
    losses.cross_entropy_sums: lambda: [
        (*rows, -100, smoothing) for rows in labelled_rows() for smoothing in (0.0, 0.1)
    ],
    torch.ops.aten.nll_loss_forward.default: lambda: [(*rows, 2, -100) for rows in labelled_rows()],
    torch.ops.aten.view.default: lambda: [(numbers(4, 6), [3, 8])],
}


def test_every_form_has_samples() -> None:
    assert FORMS.keys() == SAMPLES.keys()


@pytest.mark.parametrize("target", SAMPLES, ids=lambda target: getattr(target, "__name__", str(target)))
def test_a_plain_form_computes_what_the_kernel_does(target: Any) -> None:
    torch.manual_seed(0)
    for given in SAMPLES[target]():
        wanted, found = (pytree.tree_leaves(function(*given)) for function in (target, FORMS[target]))
        assert len(wanted) == len(found)
        for one, other in zip(wanted, found):
            assert one.shape == other.shape and one.dtype == other.dtype
            torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)
