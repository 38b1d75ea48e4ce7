"""Tiles of an attention, merged over the steps of a ring or whole, against a softmax under the evaluated mask; fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from autopar.operators import MERGE, TILE, TILE_BACKWARD, attention, masked_attention
from autopar.operators.attention_blocks import blocks, joined, spans, tile_pairs
from autopar.operators.predicates import parse

S, B = 24, 2
KINDS = {
    "nothing": "",
    "causal": "j<=i",
    "causal, later": "j<=i+3",
    "causal, earlier": "j<=i-2",  # the first rows have no key
    "window": "j<=i & i-j<5",
    "two-sided window": "j<=i+4 & i-j<5",
    "chunks": "j<=i & i//6==j//6",
    "prefix": "j<5 | j<=i",
    "documents": "j<=i & v0[i]==v0[j]",
    "documents, both ways": "v0[i]==v0[j]",
    "right padding": "j<=i & v1[j]",
    "left padding": "j<=i & !v1[j]",  # the first rows of each batch row have no key
    "padding alone": "v1[j]",
    "rows": "v1[i] & v1[j]",
    "everything": "j<=i & i-j<7 & (j<2 | v0[i]==v0[j]) & v1[j]",
}
SHAPES = {
    "four": ((B, 4), (B, 4), 8, 8),
    "grouped": ((B, 4), (B, 2), 8, 6),
    "three": ((B,), (B,), 8, 8),
    "five": ((3, B, 2), (3, B, 2), 4, 6),
}


def _vectors(shape: str, length: int = S) -> list[Tensor]:
    torch.manual_seed(2)
    documents = torch.randint(0, 4, (B, length)).sort(-1).values
    valid = torch.arange(length) < torch.tensor([[length - 5], [length]])
    return [documents, valid]


def _inputs(shape: str, queries: int = S, keys: int = S, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    lead, key_lead, width, wide = SHAPES[shape]
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(*some, length, size, dtype=dtype, requires_grad=True)
        for some, length, size in ((lead, queries, width), (key_lead, keys, width), (key_lead, keys, wide))
    )
    return q, k, v


def _shown(where: str, vectors: list[Tensor], q: Tensor, keys: int) -> Tensor:
    shown = parse(where).evaluate(torch.arange(q.shape[-2]), torch.arange(keys), vectors)
    return shown.unsqueeze(-3) if q.dim() > 3 and shown.dim() > 2 else shown


def _expected(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, shown: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """A plain masked softmax, and its log-sum-exp."""
    if q.dim() > 3:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * scale
    if bias is not None:
        scores = scores.masked_fill(bias.logical_not(), -math.inf) if bias.dtype is torch.bool else scores + bias
    scores = scores.masked_fill(shown.logical_not(), -math.inf)
    some = (scores > -math.inf).any(-1, keepdim=True)
    weights = torch.softmax(torch.where(some, scores, 0.0), -1) * some
    return weights @ v, torch.logsumexp(scores.detach(), -1)


def _part(x: Tensor, rank: int, ways: int, mirrored: bool, dim: int = -2) -> Tensor:
    """What a rank holds of a whole tensor, written down apart from the operator."""
    chunks = x.chunk(2 * ways if mirrored else ways, dim)
    return torch.cat([chunks[rank], chunks[2 * ways - 1 - rank]], dim) if mirrored else chunks[rank]


def _whole(parts: list[Tensor], mirrored: bool, dim: int = -2) -> Tensor:
    if not mirrored:
        return torch.cat(parts, dim)
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)


def _error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    both = (found == expected) | (found.isinf() & expected.isinf() & (found == expected))
    return float(torch.where(both, 0.0, found - expected).detach().abs().max())


def _ring(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, vectors: list[Tensor], where: str,
    ways: int, mirrored: bool, steps: bool, bias_grad: bool = False,
) -> list[Tensor]:  # fmt: skip
    """out, logsumexp and gradients of the whole, computed as ``ways`` ranks would."""
    outs, sums, dqs, dbiases = [], [], [], []
    dk, dv = [torch.zeros_like(_part(k, 0, ways, mirrored)) for _ in range(ways)], []
    dv = [torch.zeros_like(_part(v, 0, ways, mirrored)) for _ in range(ways)]
    whole_dk, whole_dv = torch.zeros_like(k), torch.zeros_like(v)
    for r in range(ways):
        rank, mine = torch.tensor(r), _part(q, r, ways, mirrored)
        some = bias if bias is None or bias.shape[-2] == 1 else _part(bias, r, ways, mirrored)
        schedule = range(ways) if steps else (-1,)
        tail = [(where, step, ways, mirrored, 0.3) for step in schedule]
        held = [
            (_part(k, (r - t) % ways, ways, mirrored), _part(v, (r - t) % ways, ways, mirrored)) if steps else (k, v)
            for t in schedule
        ]
        out, total = TILE(mine, *held[0], some, vectors, rank, *tail[0])
        for step in range(1, len(held)):
            out, total = MERGE(out, total, *TILE(mine, *held[step], some, vectors, rank, *tail[step]))
        outs.append(out)
        sums.append(total)
        dq, dbias = torch.zeros_like(mine), torch.zeros_like(some) if some is not None and bias_grad else None
        for step, (keys, values) in enumerate(held):
            grads = TILE_BACKWARD(
                _part(grad, r, ways, mirrored),
                mine,
                keys,
                values,
                some,
                vectors,
                out,
                total,
                rank,
                *tail[step],
                bias_grad,
            )
            dq = dq + grads[0]
            if steps:
                dk[(r - step) % ways] += grads[1]
                dv[(r - step) % ways] += grads[2]
            else:
                whole_dk += grads[1]
                whole_dv += grads[2]
            if dbias is not None:
                dbias = dbias + grads[3]
        dqs.append(dq)
        dbiases.append(dbias)
    found = [_whole(outs, mirrored), _whole(sums, mirrored, -1), _whole(dqs, mirrored)]
    found += [_whole(dk, mirrored), _whole(dv, mirrored)] if steps else [whole_dk, whole_dv]
    if bias_grad:
        assert bias is not None
        found.append(sum(dbiases) if bias.shape[-2] == 1 else _whole(dbiases, mirrored))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("ways", (1, 2, 3, 4))
@pytest.mark.parametrize("kind", KINDS)
def test_ring_and_rows_are_the_whole_attention(kind: str, ways: int, mirrored: bool) -> None:
    for shape, steps in itertools.product(SHAPES, (True, False)):
        q, k, v = _inputs(shape)
        vectors = _vectors(shape)
        out, total = _expected(q, k, v, None, _shown(KINDS[kind], vectors, q, S), 0.3)
        grad = torch.randn_like(out)
        expected = (out, total, *torch.autograd.grad(out, (q, k, v), grad))
        with torch.no_grad():
            found = _ring(grad, q, k, v, None, vectors, KINDS[kind], ways, mirrored, steps)
        assert max(map(_error, found, expected)) < 1e-12, (shape, steps)


BIASES = {
    "float": lambda: torch.randn(B, 4, S, S, dtype=torch.float64),
    "heads": lambda: torch.randn(1, 4, S, S, dtype=torch.float64),
    "columns": lambda: torch.randn(B, 1, 1, S, dtype=torch.float64),
    "rows": lambda: torch.randn(4, S, 1, dtype=torch.float64),
    "bool": lambda: torch.rand(B, 1, S, S) > 0.3,
    "bool columns": lambda: torch.rand(B, 1, 1, S) > 0.3,
}


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("ways", (1, 2, 3))
@pytest.mark.parametrize("kind", ("nothing", "causal", "causal, earlier", "window", "left padding"))
@pytest.mark.parametrize("bias", BIASES)
def test_bias(bias: str, kind: str, ways: int, mirrored: bool) -> None:
    q, k, v = _inputs("grouped")
    vectors, given = _vectors("grouped"), BIASES[bias]()
    wanted = given.is_floating_point()
    given.requires_grad_(wanted)
    out, total = _expected(q, k, v, given, _shown(KINDS[kind], vectors, q, S), 0.3)
    grad = torch.randn_like(out)
    leaves = (q, k, v, given) if wanted else (q, k, v)
    expected = (out, total, *torch.autograd.grad(out, leaves, grad))
    for steps in (True, False):
        with torch.no_grad():
            found = _ring(grad, q, k, v, given, vectors, KINDS[kind], ways, mirrored, steps, wanted)
        assert len(found) == len(expected) and max(map(_error, found, expected)) < 1e-12


@pytest.mark.parametrize("where", ("", "v0[j]", "j<=i", "j<=i+6 & i-j<5", "v1[i]==v2[j]"))
def test_queries_and_keys_of_other_lengths(where: str) -> None:
    """Rows and columns are counted each in its own sequence, from 0."""
    for queries, keys in ((12, 24), (24, 12)):
        q, k, v = _inputs("four", queries, keys)
        vectors = [torch.rand(B, keys) > 0.3, torch.randint(0, 2, (B, queries)), torch.randint(0, 2, (keys,))]
        out, total = _expected(q, k, v, None, _shown(where, vectors, q, keys), 0.3)
        grad = torch.randn_like(out)
        expected = (out, total, *torch.autograd.grad(out, (q, k, v), grad))
        for ways, mirrored, steps in itertools.product((1, 2, 3), (False, True), (True, False)):
            with torch.no_grad():
                found = _ring(grad, q, k, v, None, vectors, where, ways, mirrored, steps)
            assert max(map(_error, found, expected)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_masked_attention_is_differentiated(kind: str) -> None:
    q, k, v = _inputs("grouped")
    vectors, bias = _vectors("grouped"), torch.randn(4, S, S, dtype=torch.float64, requires_grad=True)
    out, _ = _expected(q, k, v, bias, _shown(KINDS[kind], vectors, q, S), 0.3)
    found = masked_attention(q, k, v, bias, vectors, KINDS[kind], 0.3)
    grad, leaves = torch.randn_like(out), (q, k, v, bias)
    pairs = zip((found, *torch.autograd.grad(found, leaves, grad)), (out, *torch.autograd.grad(out, leaves, grad)))
    assert max(_error(a, b) for a, b in pairs) < 1e-12


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", ("window", "documents", "left padding"))
def test_lower_precision(kind: str, dtype: torch.dtype) -> None:
    """Merging blocks costs no more precision than one call of the kernel."""
    rounded = tuple(x.detach().to(dtype) for x in _inputs("grouped"))
    exact = tuple(x.double().requires_grad_() for x in rounded)
    vectors = _vectors("grouped")
    out, total = _expected(*exact, None, _shown(KINDS[kind], vectors, rounded[0], S), 0.3)
    grad = torch.randn_like(out).to(dtype)
    expected = (out, total, *torch.autograd.grad(out, exact, grad.double()))
    found = _ring(grad, *rounded, None, vectors, KINDS[kind], 1, False, True)
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype, dtype]
    bound = 1e-5 if dtype is torch.float32 else 0.03
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isinf(), b.isinf())
        error = torch.where(b.isinf(), 0.0, a.double() - b).detach().abs().max()
        assert float(error) < bound * max(1.0, float(torch.where(b.isinf(), 0.0, b).detach().abs().max()))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kernel", ("CPU", "CompositeExplicitAutograd"))
def test_rows_without_keys_have_no_sum(kernel: str, dtype: torch.dtype) -> None:
    """torch's kernel writes 0 for them, and its backward makes nan of -inf."""
    forward, backward = attention.KERNELS[kernel]
    q, k, v = (x.detach().to(dtype) for x in _inputs("grouped"))
    mask = torch.ones(S, S, dtype=torch.bool).tril(-2)
    for given in (mask, torch.zeros(B, 1, S, S, dtype=dtype).masked_fill(~mask, -math.inf)):
        out, total = forward(q, k, v, given, False, None)
        assert bool((total[..., :2] == -math.inf).all()) and bool(total[..., 2:].isfinite().all())
        assert not bool(out[..., :2, :].any())
        grads = backward(torch.ones_like(out), q, k, v, given, out, total, False, None)
        assert all(bool(grad.isfinite().all()) for grad in grads) and not bool(grads[0][..., :2, :].any())


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_strides_are_those_announced(shape: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = (x.detach() for x in _inputs(shape))
    bias = torch.randn(S, S, dtype=torch.float64)
    for where in ("", "j<=i", "j<=i & i-j<5"):
        rest = (None, where, 0, 1, False, None)
        out, total = TILE(q, k, v, bias, [], *rest)
        real = (
            out,
            total,
            *TILE_BACKWARD(out, q, k, v, bias, [], out, total, *rest, True),
            *MERGE(out, total, out, total),
        )
        with FakeTensorMode() as mode:
            fq, fk, fv, fb = (mode.from_tensor(x) for x in (q, k, v, bias))
            pair = TILE(fq, fk, fv, fb, [], *rest)
            fake = (*pair, *TILE_BACKWARD(pair[0], fq, fk, fv, fb, [], *pair, *rest, True), *MERGE(*pair, *pair))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert [x for n, x in zip(a.shape, a.stride()) if n > 1] == [
                x for n, x in zip(b.shape, b.stride()) if n > 1
            ]


# ---------------------------------------------------------------- work


def _computed(where: str, length: int) -> int:
    whole = spans(length, 0, 1, False)
    return sum(block.scores for block in blocks(parse(where), whole, whole))


@pytest.mark.parametrize("ways", (2, 4, 8))
def test_zig_zag_balances_causal_work(ways: int) -> None:
    length = 8192
    work = [
        [
            sum(tile_pairs("j<=i", rank, step, ways, mirrored, length, length) for step in range(ways))
            for rank in range(ways)
        ]
        for mirrored in (False, True)
    ]
    assert all(sum(ranks) == length * (length + 1) // 2 for ranks in work)  # each pair once, on one rank
    contiguous, mirrored = (max(ranks) * ways / sum(ranks) for ranks in work)
    assert mirrored == 1.0 and contiguous > 1.4
    for step in range(ways):  # also in each step of the ring, which waits for the slowest
        ranks = [tile_pairs("j<=i", rank, step, ways, True, length, length) for rank in range(ways)]
        assert max(ranks) - min(ranks) == 0


def test_windows_and_chunks_cost_their_width() -> None:
    for where in ("j<=i & i-j<512", "j<=i & i//512==j//512", "j<=i+511 & i-j<512"):
        short, long = _computed(where, 8192), _computed(where, 32768)
        assert 3.9 < long / short < 4.2  # the first rows see less than a window
        assert long < 32768 * 3 * 512


def test_hidden_tiles_are_not_computed() -> None:
    assert [tile_pairs("j<=i & i-j<64", 3, step, 4, False, 1024, 1024) > 0 for step in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    assert [tile_pairs("j<=i", 0, step, 4, False, 1024, 1024) > 0 for step in range(4)] == [True, False, False, False]


def test_vectors_that_can_be_read_skip_documents() -> None:
    """Four documents of 2048 tokens: the blocks between two of them are not computed; nor is padding."""
    length, formula = 8192, parse("v0[i]==v0[j] & j<=i")
    documents, whole = (torch.arange(length) // 2048).expand(2, -1), spans(length, 0, 1, False)
    found = list(blocks(formula, whole, whole, [documents]))
    assert sum(block.scores for block in found) == 4 * 2048 * 2049 // 2
    assert not any(block.rest.clauses for block in found)
    short = torch.arange(length).expand(2, -1) < 3000
    found = list(blocks(parse("v0[j]"), whole, whole, [short]))
    assert sum(block.scores for block in found) == length * 3072
    assert list(blocks(parse("v0[j] & j<=i"), whole, whole, [short | True]))[-1].causal


def test_no_block_holds_a_large_mask() -> None:
    length = 2**17
    whole = spans(length, 0, 1, False)
    for where in (
        "j<=i & v0[i]==v0[j]",
        "v0[i]==v0[j]",
        "j<=i & v1[j] & i-j<4096",
        "i-j<4096 & (j<4 | i//1024==j//1024)",
    ):
        for block in blocks(parse(where), whole, whole):
            assert not block.rest.clauses or block.scores <= 1024 * 4096


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = (x.detach() for x in _inputs("four"))
    with pytest.raises(ValueError, match="no v0"):
        TILE(q, k, v, None, [], None, "v0[j]", 0, 1, False, None)
    with pytest.raises(ValueError, match="12 of 24"):
        TILE(q, k, v, None, [torch.ones(12, dtype=torch.bool)], None, "v0[j]", 0, 1, False, None)
    with pytest.raises(ValueError, match="not even"):
        TILE(q[..., :7, :], k[..., :7, :], v[..., :7, :], None, [], torch.tensor(0), "", 0, 2, True, None)


@pytest.mark.parametrize("ways", [2, 3, 4])
def test_a_causal_ring_in_zig_zag_order_is_one_call_a_tile(ways: int) -> None:
    """Blocks that are neighbours in the part are one, and cover the same scores."""
    part = 8
    for rank, step in itertools.product(range(ways), range(ways)):
        rows, columns = (spans(part, place, ways, True) for place in (rank, (rank - step) % ways))
        (block,) = joined(blocks(parse("j<=i"), rows, columns))
        assert block.scores == tile_pairs("j<=i", rank, step, ways, True, part * ways, part * ways)
        assert block.causal == (step == 0)


def test_blocks_that_hide_something_stay_apart() -> None:
    """A window's corners are masked by position, and positions jump where the part goes on elsewhere."""
    rows = spans(8, 0, 2, True)
    found = list(blocks(parse("j<=i & i-j<3"), rows, rows))
    assert len(found) > 1 and joined(found) == found
