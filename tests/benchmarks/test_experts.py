"""The peer of the expert benchmark computes what the model computes; what the benchmarks count."""

from __future__ import annotations

import copy
import gc
import json
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import expert_step
from benchmarks.contenders import Contender
from benchmarks.expert_compile import DENSE_LAYERS, deepseek_v3
from benchmarks.subjects import SUBJECTS, Batch, hugging_face_mixtral
from benchmarks.torch_experts import HandWritten
from tests.launch import run_ranks

EXPERTS, LAYERS, WIDTH, TOKENS = 4, 2, 64, 8 * 16
EXPERT_WEIGHTS = ".experts."


def batches(number: int) -> Batch:
    return SUBJECTS["hf-mixtral-256"].batch(number, 8, 16)


def step_of_peer() -> tuple[tuple[float, dict[str, Tensor]], tuple[float, dict[str, Tensor]], int, int]:
    """The whole loss and the gradients, by hand and of the model alone; bytes this rank sends, and of what DDP sums."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = hugging_face_mixtral(WIDTH, LAYERS, EXPERTS).double()
    model.set_experts_implementation("eager")  # torch's grouped product takes no doubles
    alone = Contender(copy.deepcopy(model), False)
    peer = HandWritten(model, False)
    found, sent = _step(peer), peer.sent()
    expected = _step(alone)
    reduced = peer.reduced
    del peer, model
    gc.collect()  # DistributedDataParallel has to go before its group, or the process may never end
    dist.barrier()
    dist.destroy_process_group()
    return found, expected, sent, reduced


def _step(side: Contender) -> tuple[float, dict[str, Tensor]]:
    loss = side.forward(side.part(batches(0)))
    side.backward(loss)
    named = side.module.named_parameters()
    gradients = {name.removeprefix("module."): p.grad.clone() for name, p in named if p.grad is not None}
    return side.whole_loss(loss.detach().clone()), gradients


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_peer_computes_what_the_model_computes(ranks: int) -> None:
    results = run_ranks(step_of_peer, ranks)
    for rank, ((loss, found), (expected_loss, expected), _, _) in enumerate(results):
        assert abs(loss - expected_loss) < 1e-5  # Hugging Face's norms, tables and loss are float32 within
        assert found.keys() == expected.keys() and expected
        for name, gradient in expected.items():
            own = gradient.chunk(ranks)[rank] if EXPERT_WEIGHTS in name else gradient
            torch.testing.assert_close(found[name], own, rtol=1e-4, atol=1e-6, msg=name)
    rows = sum(sent - 2 * reduced * (ranks - 1) // ranks for *_, sent, reduced in results)
    row = WIDTH * torch.float64.itemsize
    chosen = 2 * TOKENS * LAYERS  # rows that are sent somewhere, and come back, forward and backward
    assert rows % row == 0
    assert 0 < rows < 4 * chosen * row if ranks > 1 else rows == 0


# ---------------------------------------------------------------- DeepSpeed


def step_of_deepspeed(name: str) -> tuple[tuple[float, dict[str, Tensor]], tuple[float, dict[str, Tensor]], int]:
    """The whole loss and the gradients, of DeepSpeed and of the model alone; bytes this rank sends."""
    from benchmarks.deepspeed_experts import Automatic, Layers

    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = hugging_face_mixtral(WIDTH, LAYERS, EXPERTS)
    alone = Contender(copy.deepcopy(model), False)
    peer = {"deepspeed": Layers, "autoep": Automatic}[name](model, False)
    (loss, _), expected = _step(peer), _step(alone)
    module = peer.engine.module
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    sent = peer.sent()
    dist.barrier()
    dist.destroy_process_group()
    return (loss, found), expected, sent


def as_the_model_has_them(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a rank's experts stacked, of fused weights put together, under the names of the model."""
    named: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for name, gradient in found.items():
        layer, _, last = name.partition(".mlp.")
        if "deepspeed_experts" in last:
            key = f"{layer}.mlp.experts.{'gate_up_proj' if '.both.' in last else 'down_proj'}"
            stacks.setdefault(key, []).append(gradient)
        elif last in ("experts.w1", "experts.w3"):
            stacks.setdefault(f"{layer}.mlp.experts.gate_up_proj", []).append(gradient)
        elif last == "experts.w2":
            named[f"{layer}.mlp.experts.down_proj"] = gradient
        elif last:
            named[f"{layer}.mlp.gate.weight"] = gradient
        else:
            named[name] = gradient
    joined = {key: torch.cat(parts, 1) if parts[0].dim() == 3 else torch.stack(parts) for key, parts in stacks.items()}
    return {**named, **joined}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed", "autoep"])
def test_deepspeed_computes_what_the_model_computes(name: str) -> None:
    pytest.importorskip("deepspeed")
    for rank, ((loss, found), (expected_loss, expected), sent) in enumerate(run_ranks(step_of_deepspeed, 2, name)):
        assert abs(loss - expected_loss) < 1e-5
        gradients = as_the_model_has_them(found)
        assert gradients.keys() == expected.keys() and expected
        for key, gradient in expected.items():
            own = gradient.chunk(2)[rank] if EXPERT_WEIGHTS in key else gradient
            torch.testing.assert_close(gradients[key], own, rtol=1e-3, atol=1e-6, msg=key)
        assert sent > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_short_run(capfd: pytest.CaptureFixture[str]) -> None:
    """Every peer is measured, or its row says why it is not."""
    assert expert_step.main(["--ranks", "2", "--rounds", "2", "--warm-up", "1", "--json"]) == 0
    out = capfd.readouterr().out
    rows = json.loads(out[out.index("[\n") :])
    assert [row["peer"] for row in rows] == list(expert_step.PEERS)
    for row in rows:
        if row["peer"] in (expert_step.LAYERS, expert_step.AUTOMATIC) and "why" in row:
            assert "DeepSpeed is not installed" in row["why"]
            continue
        assert row["loss_difference"] <= 1e-4 and 0 < row["ours_sent"] <= row["peer_sent"], row
        assert all(0 < row[side]["between"] < row[side]["peak"] for side in ("ours_memory", "peer_memory")), row


def test_the_compiled_model_has_the_published_size() -> None:
    dense, mixed = (
        sum(p.numel() for p in deepseek_v3(count).parameters()) for count in (DENSE_LAYERS, DENSE_LAYERS + 1)
    )
    assert (dense + 58 * (mixed - dense)) / 1e9 == pytest.approx(671, abs=1)
