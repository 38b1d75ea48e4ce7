"""Every model trains, exports to the same numbers in float64, keeps its promises on shapes, and has its real size."""

from __future__ import annotations

import copy
import functools
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from autopar.models import bert, cnn, dlrm, gpt, llama, lstm, mlp, moe, t5, transformer, unet, vit
from tests.selection import slow_but

ALL = (gpt, llama, moe, bert, t5, transformer, lstm, vit, cnn, unet, dlrm, mlp)
MODELS = {m.__name__.split(".")[-1]: m for m in ALL}
LANGUAGE = {name: MODELS[name] for name in ("gpt", "llama", "moe", "bert", "t5", "transformer", "lstm")}
DECODERS = {name: MODELS[name] for name in ("gpt", "llama", "moe", "lstm")}
# Non-default options, each a program of its own: (model, overrides of the tiny preset, arguments of example_batch).
VARIANTS: dict[str, tuple[ModuleType, dict[str, object], dict[str, object]]] = {
    **{name: (module, {}, {}) for name, module in MODELS.items()},
    "moe-balanced": (moe, {"balance": 0.1}, {}),
    "bert-padded": (bert, {}, {"padding": True}),
    "t5-padded-untied": (t5, {"tied": False}, {"padding": True}),
    "transformer-classifier": (transformer, {"classes": 12, "norm_first": True, "batch_first": False}, {}),
    "lstm-gru": (lstm, {"cell": "gru", "batch_first": False}, {}),
    "dlrm-ragged": (dlrm, {"ragged": True, "mode": "mean"}, {}),
    "mlp-mse-residual": (mlp, {"loss": "mse", "residual": True}, {}),
}
SIZES = [  # exact, and within 2% of what the papers print
    (gpt, "gpt2", 124_439_808, 124e6),
    (gpt, "gpt_175b", 174_604_259_328, 175e9),
    (llama, "llama_8b", 8_030_261_248, 8.03e9),
    (llama, "llama_70b", 70_553_706_496, 70.6e9),
    (llama, "llama_405b", 405_853_388_800, 405e9),
    (moe, "mixtral_8x7b", 46_702_792_704, 46.7e9),
    (bert, "bert_base", 109_514_298, 110e6),
    (bert, "bert_large", 335_174_458, 340e6),
    (t5, "t5_large", 737_668_096, 737e6),
    (t5, "t5_11b", 11_307_321_344, 11.3e9),
    (vit, "vit_base", 86_567_656, 86e6),
    (vit, "vit_huge", 632_045_800, 632e6),
    (cnn, "resnet18", 11_689_512, 11.7e6),
    (cnn, "resnet34", 21_797_672, 21.8e6),
    (unet, "ddpm_cifar10", 35_746_307, 35.7e6),
    (lstm, "ptb_large", 66_034_000, 66e6),
    (dlrm, "criteo_kaggle", 540_677_217, 540e6),
]

variants = pytest.mark.parametrize("name", VARIANTS)
each_model = pytest.mark.parametrize("module", MODELS.values(), ids=MODELS)
each_decoder = pytest.mark.parametrize("module", DECODERS.values(), ids=DECODERS)


def tiny(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    """A variant's model and batch, the parameters moved off their zeros and ones so that a lost bias shows."""
    module, overrides, arguments = VARIANTS[name]
    torch.manual_seed(0)
    model = module.build(**overrides).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, module.example_batch(model, **arguments)


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    out = model(**batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {**out, **dict(zip(names, torch.autograd.grad(out["loss"], parameters), strict=True))}


@variants
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    model, batch = tiny(name)
    for key, value in loss_and_gradients(model, batch).items():
        assert value.isfinite().all(), key
        assert value.abs().max() > 0 or value.dim() == 1, key  # a key bias has none: softmax ignores a shift


@variants
def test_training_lowers_the_loss(name: str) -> None:
    model, batch = tiny(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(**batch)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


@variants
def test_the_export_equals_the_model_in_float64(name: str) -> None:
    model, batch = tiny(name, torch.float64)
    exported = torch.export.export(copy.deepcopy(model), (), batch, strict=False).module()
    expected, actual = loss_and_gradients(model, batch), loss_and_gradients(exported, batch)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert value.dtype == torch.float64
        assert (value - actual[key]).abs().max() < 1e-12, key


@each_model
def test_without_labels_there_is_no_loss(module: ModuleType) -> None:
    model = module.build().eval()
    batch = module.example_batch(model)
    full = model(**batch)
    labels = batch.pop("labels")
    if module is t5:
        with pytest.raises(ValueError, match="decoder_input_ids"):
            model(**batch)
        batch["decoder_input_ids"] = model.shift_right(labels)
    out = model(**batch)
    assert list(out) == ["logits"]
    assert torch.equal(out["logits"], full["logits"])
    assert full["loss"].shape == ()


@each_model
def test_builds_on_meta_and_under_fake_tensors(module: ModuleType) -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in module.build().parameters())
    if module is transformer:  # nn.Transformer copies its layers, and copies of fake tensors have a mode of their own
        return
    with FakeTensorMode():
        model = module.build()
    program = torch.export.export(model, (), module.example_batch(model), strict=False)
    names = {str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("aten.")}
    in_place = {name for name in names if name.endswith("_")}
    assert in_place == ({"add_"} if module is cnn else set())  # batch norm counts its batches


@pytest.mark.parametrize(
    ("module", "preset", "count", "published"), slow_but([0, 3, 7, 11, 15], SIZES), ids=[size[1] for size in SIZES]
)
def test_real_presets_have_the_published_size(module: ModuleType, preset: str, count: int, published: float) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in module.build(preset).parameters()) == count
    assert count == pytest.approx(published, rel=0.02)


@each_model
def test_tiny_divides_by_2_3_and_4(module: ModuleType) -> None:
    """Every matrix dimension, so that each way of splitting can be tried, but for three colours and single scores."""
    model = module.build()
    for name, parameter in model.named_parameters():
        if name not in ("cls", "positions", "segments.weight"):
            assert all(size % 12 == 0 or size in (1, 3) for size in parameter.shape[:2]), name
    assert all(value.shape[0] == 12 for value in pytree.tree_leaves(module.example_batch(model)))


@pytest.mark.parametrize("name", LANGUAGE)
def test_rows_of_a_batch_count_different_numbers_of_labels(name: str) -> None:
    module = LANGUAGE[name]
    batch = module.example_batch(module.PRESETS["tiny"])
    labels = batch["labels"][:, 1:] if module in DECODERS.values() else batch["labels"]
    counts = (labels != -100).sum(dim=1)
    assert len(set(counts.tolist())) == len(counts) == 12
    assert counts.min() > 0
    for n in (2, 3, 4):
        assert len(set(counts.view(n, -1).sum(dim=1).tolist())) == n
    again = module.example_batch(module.PRESETS["tiny"])
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert not torch.equal(batch["labels"], module.example_batch(module.PRESETS["tiny"], seed=1)["labels"])


@each_decoder
def test_a_later_token_changes_no_earlier_logit(module: ModuleType) -> None:
    model = module.build().double()
    tokens = module.example_batch(model)["input_ids"]
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % model.config.vocab
    before, after = model(tokens)["logits"], model(changed)["logits"]
    assert (before[:, :9] - after[:, :9]).abs().max() < 1e-12
    assert ((before[:, 9:] - after[:, 9:]).abs().amax(dim=-1) > 1e-12).all()


def test_t5_decoder_is_causal_and_its_encoder_is_not() -> None:
    model = t5.build().double()
    batch = t5.example_batch(model)
    source, target = batch["input_ids"], model.shift_right(batch["labels"])
    run = functools.partial(model, labels=None)
    before = run(source, decoder_input_ids=target)["logits"]
    changed = target.clone()
    changed[:, 6] = (changed[:, 6] + 1) % model.config.vocab
    after = run(source, decoder_input_ids=changed)["logits"]
    assert (before[:, :6] - after[:, :6]).abs().max() < 1e-12
    changed = source.clone()
    changed[:, -1] = (changed[:, -1] + 1) % model.config.vocab
    after = run(changed, decoder_input_ids=target)["logits"]
    assert ((before - after).abs().amax(dim=-1) > 1e-12).all()


@each_decoder
def test_the_loss_is_the_mean_over_predicted_tokens(module: ModuleType) -> None:
    model = module.build().double()
    batch = module.example_batch(model)
    out = model(**batch)
    logits, labels = out["logits"][:, :-1], batch["labels"][:, 1:]
    total, count = 0.0, 0
    for row, target in zip(logits.log_softmax(-1), labels, strict=True):
        kept = target != -100
        total, count = total - row[kept].gather(1, target[kept, None]).sum(), count + int(kept.sum())
    assert abs(out["loss"] - total / count) < 1e-12


@pytest.mark.parametrize("module", [bert, t5], ids=["bert", "t5"])
def test_padding_is_not_seen(module: ModuleType) -> None:
    model = module.build().double()
    batch = module.example_batch(model, padding=True)
    padding = batch["attention_mask"] == 0
    noise = batch | {"input_ids": torch.where(padding, 5, batch["input_ids"])}
    assert not torch.equal(noise["input_ids"], batch["input_ids"])
    assert abs(model(**batch)["loss"] - model(**noise)["loss"]) < 1e-12


def test_dense_experts_equal_a_loop_over_chosen_experts() -> None:
    torch.manual_seed(0)
    block = moe.build().double().blocks[0]
    assert isinstance(block, moe.Block)
    layer, experts = block.moe, block.moe.experts
    x = torch.randn(3, 8, 96, dtype=torch.float64)
    flat = x.view(-1, 96)
    top, chosen = layer.router(flat).softmax(-1).topk(2, dim=-1)
    expected = torch.zeros_like(flat)
    for n in range(len(flat)):
        for weight, e in zip(top[n] / top[n].sum(), chosen[n], strict=True):
            gate = nn.functional.silu(flat[n] @ experts.gate[e])
            expected[n] += weight * ((gate * (flat[n] @ experts.up[e])) @ experts.down[e])
    y, balance = layer(x)
    assert (y.view(-1, 96) - expected).abs().max() < 1e-12
    assert balance.item() == pytest.approx(1.0, abs=0.2)


def test_balance_adds_its_weight_to_the_loss() -> None:
    plain = moe.build().double()
    batch = moe.example_batch(plain)
    balanced = moe.build(balance=0.5).double()
    balanced.load_state_dict(plain.state_dict())
    difference = balanced(**batch)["loss"] - plain(**batch)["loss"]
    assert difference.item() == pytest.approx(0.5 * plain.config.layers, rel=0.2)


def test_heads_are_tied_where_the_papers_tie_them() -> None:
    for module in (gpt, bert, t5):
        model = module.build()
        assert model.head.weight is model.tokens.weight, module.__name__
    for model in (llama.build(), moe.build(), t5.build(tied=False)):
        assert model.head.weight is not model.tokens.weight


def test_dropout_acts_in_training_only() -> None:
    model = gpt.build(dropout=0.5)
    batch = gpt.example_batch(model)
    assert model(**batch)["loss"] != model(**batch)["loss"]
    model.eval()
    assert model(**batch)["loss"] == model(**batch)["loss"]
