"""What the benchmarks of sequence parallelism count, and that their peers compute what the model computes."""

from __future__ import annotations

import copy
import gc
import warnings
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.models import llama
from benchmarks.contenders import Contender
from benchmarks.sequence_figure import Curve, Panel, figure, short
from benchmarks.sequence_memory import Activations, counted, longest_that
from benchmarks.subjects import SUBJECTS, Batch, Subject, hugging_face_llama
from benchmarks.torch_sequence import Alone, HandWritten
from tests.launch import run_ranks
from tests.selection import slow_but

# ---------------------------------------------------------------- the longest sequence


@pytest.mark.parametrize("most", [0, 7, 8, 9, 64, 1000, 1023])
@pytest.mark.parametrize("step", [1, 8, 24])
@pytest.mark.parametrize("guess", [0, 60, 1000, 5000])
def test_the_longest_that_fits(most: int, step: int, guess: int) -> None:
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= most

    assert longest_that(fits, step, guess) == most // step * step
    assert all(length > 0 and length % step == 0 for length in tried)
    assert len(tried) <= 2 * (abs(most - guess) // step + 1).bit_length() + 2, tried


# ---------------------------------------------------------------- bytes


def small() -> Subject:
    def build() -> nn.Module:
        return llama.build("tiny", vocab=64, width=64, layers=2, heads=8, kv_heads=4, ff=128)

    return Subject("small", build, SUBJECTS["our-llama-256"].sites, vocabulary=64)


def test_activations_grow_with_the_part_of_a_rank() -> None:
    one, two = counted(small(), "ring", 1, 512), counted(small(), "ring", 2, 1024)
    for phase in ("forward", "backward"):
        returned = 512 * 64 * 4 if phase == "forward" else 0  # logits in plain order, beside those in zig-zag order
        sizes = getattr(one, phase), getattr(two, phase) - returned
        assert sizes[1] == pytest.approx(sizes[0], rel=0.02), phase
    assert two.a_token(two.most) == two.most * 2 / 1024


def test_the_peak_is_that_of_either_phase() -> None:
    assert Activations(1, 8, 3, 5).most == Activations(1, 8, 5, 3).most == 5


# ---------------------------------------------------------------- peers


def batches(number: int) -> Batch:
    return SUBJECTS["hf-llama-256"].batch(number, 1, 32)


def model_in_double() -> nn.Module:
    torch.manual_seed(0)
    return hugging_face_llama(64, 2, head_width=8).double()


def gradients_of_peer(kind: str) -> list[tuple[float, dict[str, Tensor]]]:
    """The whole loss and the gradients, by hand and of the model alone."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    model = model_in_double()
    found = [_step(HandWritten(copy.deepcopy(model), kind, False)), _step(Alone(copy.deepcopy(model), False))]
    gc.collect()  # DistributedDataParallel has to go before its group, or the process may never end
    dist.barrier()
    dist.destroy_process_group()
    return found


def _step(side: Contender) -> tuple[float, dict[str, Tensor]]:
    loss = side.forward(side.part(batches(0)))
    side.backward(loss)
    named = side.module.named_parameters()
    gradients = {name.removeprefix("module."): p.grad.clone() for name, p in named if p.grad is not None}
    return side.whole_loss(loss.detach().clone()), gradients


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
@pytest.mark.parametrize("ranks", slow_but([0], [2, 4]))
def test_peers_compute_what_the_model_computes(kind: str, ranks: int) -> None:
    (loss, found), (expected_loss, expected) = run_ranks(gradients_of_peer, ranks, kind)[0]
    assert abs(loss - expected_loss) < 1e-5  # Hugging Face's norms, tables and loss are float32 within
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


# ---------------------------------------------------------------- figure


def test_figure() -> None:
    curve = Curve("n = 1", {1024.0: 10.0, 4096.0: 40.0}, measured={1024.0: 12.0})
    panel = Panel("MB", "tokens", [curve, Curve("ideal", {1024.0: 10.0, 4096.0: 20.0}, dashed=True)], {10.0: "10"})
    document = ElementTree.fromstring(figure([panel, panel], "title"))
    tags = [element.tag.rpartition("}")[2] for element in document.iter()]
    assert (tags.count("polyline"), tags.count("circle")) == (4, 2)
    texts = [element.text for element in document.iter() if element.text]
    assert {"1k", "4k", "10", "tokens"} <= set(texts)
    assert [short(size) for size in (1, 8, 1024, 1536)] == ["1", "8", "1k", "1.5k"]
