"""Torch's own layers: every form of ``nn.MultiheadAttention``, and the encoder's fast path of inference."""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.analysis.footprint import held, sent
from autopar.check import TOLERANCE, check
from autopar.frontend.trace import trace
from autopar.models import transformer
from autopar.observation.observation import guards_of_traces
from tests.selection import one_each

WIDTH, HEADS, ROWS = 24, 12, 12


class Attends(nn.Module):
    """Attention behind a linear layer, with a loss over its output and its weights."""

    def __init__(self, need_weights: bool, batch_first: bool, causal: bool = False, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options)
        self.need_weights, self.causal = need_weights, causal

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None, **masks: Tensor) -> dict[str, Tensor]:
        q = self.first(x)
        k, v = (q, q) if memory is None else memory
        if self.causal:
            masks["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        if not self.attention.batch_first:
            q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        y, weights = self.attention(q, k, v, need_weights=self.need_weights, is_causal=self.causal, **masks)
        loss = y.square().mean()
        if weights is not None:
            loss = loss + (weights * weights.cos()).sum() / len(x)
        return {"loss": loss, "y": y if self.attention.batch_first else y.transpose(0, 1)}


FORMS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "padded": ({}, ("padding",)),
    "masked": ({}, ("mask",)),
    "masked-padded": ({"add_zero_attn": True}, ("mask", "padding")),
    "causal": ({"causal": True}, ()),
    "other-widths": ({"kdim": 12, "vdim": 36}, ("memory",)),
    "bias-kv": ({"add_bias_kv": True}, ("padding",)),
    "no-bias": ({"bias": False}, ()),
}
# every form with and without weights, and on two meshes; batch_first both ways; without all of their products
CASES = [
    (form, ("dp=2,tp=2", "tp=4", "dp=3")[(i + j) % 3], j == 0, (i // 2 + j) % 2 == 0)
    for (i, form), j in itertools.product(enumerate(FORMS), range(2))
]


def batch_of(form: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    queries, keys = 6, 8 if "memory" in FORMS[form][1] else 6
    batch: dict[str, Any] = {"x": torch.randn(ROWS, queries, WIDTH, generator=generator)}
    if "memory" in FORMS[form][1]:
        batch["memory"] = tuple(torch.randn(ROWS, keys, width, generator=generator) for width in (12, 36))
    if "padding" in FORMS[form][1]:
        batch["key_padding_mask"] = torch.arange(keys) >= keys - torch.arange(ROWS)[:, None] % 3
    if "mask" in FORMS[form][1]:
        batch["attn_mask"] = torch.randn(queries, keys, generator=generator)
    return batch


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(("form", "mesh", "need_weights", "batch_first"), CASES)
def test_attention(form: str, mesh: str, need_weights: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Attends(need_weights, batch_first, **FORMS[form][0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    report = check(model, batch_of(form), Mesh.parse(mesh), Plan(check_numerics=False))
    assert report.worst <= TOLERANCE
    assert {transfer.name for transfer in sent(report.program) if transfer.axis == "dp"} <= {"all_reduce"}
    if "tp" in mesh:
        share = held(report.program)
        assert share.split["tp"] >= 0.95 * share.whole


@pytest.mark.parametrize(
    "options, mesh",
    one_each([{}, {"classes": 12}, {"classes": 12, "norm_first": True}], ["dp=3", "tp=4", "dp=2,tp=2"]),
    ids=str,
)
def test_inference_by_the_fast_path(options: dict[str, Any], mesh: str) -> None:
    """Eager runs fused kernels and nested tensors here; the program has neither, and the same numbers."""
    model = transformer.build(**options).double().eval()
    batch = transformer.example_batch(model)
    del batch["labels"]
    with torch.no_grad():
        parallel = autopar.parallelize(model, Mesh.parse(mesh))
        step = parallel.simulate(**batch)
        expected = model(**batch)["logits"]
    assert step.loss is None and step.grads == {}
    assert (step.output["logits"] - expected).abs().max() < 1e-12
    assert "_fwd" not in parallel.program.rank(0).code and "nested" not in str(parallel.program)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "padding, norm",
    one_each(["right", "left"], [False, True]),
    ids=["right-plain", "right-normed", "left-plain", "left-normed"],
)
def test_padding_comes_out_as_eager_gives_it(padding: str, norm: bool) -> None:
    """Zeros without gradients and with padding at the end; else what the layers make of it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH) if norm else None).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(4, 6, WIDTH, dtype=torch.float64)
    hidden = torch.arange(6) >= torch.tensor([6, 5, 4, 6])[:, None]
    hidden = hidden if padding == "right" else hidden.flip(1)
    parallel = autopar.parallelize(encoder, Mesh(dp=2, tp=2), Plan(outputs="full"))
    for gradients in (True, False):  # two programs: padding is seen outside
        with torch.set_grad_enabled(gradients):
            found, expected = parallel.simulate(x, src_key_padding_mask=hidden).output, encoder(x, None, hidden)
        assert (found - expected).abs().max() < 1e-12
        zeros = not gradients and padding == "right" and not norm
        assert bool((expected[hidden] == 0).all()) is zeros
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_causal_mask_is_recognised() -> None:
    """The encoder compares the mask with the causal one by value; here a pass does."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1)

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            out: Tensor = self.encoder(x, mask=mask)
            return out.square().mean()

    report = check(Causal(), {"x": torch.randn(4, 6, WIDTH)}, Mesh(tp=2))
    assert report.worst <= TOLERANCE
    attention = torch.ops.aten.scaled_dot_product_attention.default
    (arguments,) = [node.args[3:] for node in report.program.graph.nodes if node.target is attention]
    assert arguments == (None, 0.0, True)


class Averaged(nn.Module):
    """Batch normalisation whose running statistics are averages over all batches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.tanh(self.up(x)))).square().mean()


def test_averages_over_batches_are_one_program() -> None:
    model = Averaged().double()
    with guards_of_traces() as guards:
        trace(model, (torch.randn(7, 6, dtype=torch.float64),))
    assert not guards.values and model.norm.num_batches_tracked == 0
    for mesh in (Mesh(dp=2), Mesh(dp=3), Mesh(tp=2)):
        for steps in (0, 3):
            model.norm.num_batches_tracked.fill_(steps)
            x = torch.randn(7, 6, dtype=torch.float64)
            step = autopar.parallelize(deepcopy(model), mesh, example_inputs=(x,)).simulate(x)
            reference = deepcopy(model)
            reference(x).backward()
            assert all((step.grads[n] - p.grad).abs().max() < TOLERANCE for n, p in reference.named_parameters())  # type: ignore[operator]
            assert all((step.buffers[n] - b).abs().max() < TOLERANCE for n, b in reference.named_buffers())
