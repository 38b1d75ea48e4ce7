"""What a Llama really sends: counted where torch is asked for it, in real processes, against what the graphs say."""

from __future__ import annotations

import pytest

from autopar.mesh import Mesh
from autopar.plan import Plan
from tests.dispatched import Dispatched
from tests.launch import run_ranks

LAYERS = 2


def of_buckets(*bucket_mb: float) -> list[dict[str, int]]:
    return [counted("none", size) for size in bucket_mb]


def counted(sequence: str, bucket_mb: float) -> dict[str, int]:
    """Collectives of one training step, counted as torch is asked for them: rings, and messages to the other rank."""
    from autopar.api import parallelize
    from autopar.zoo.named import named_model

    example = named_model("hf:llama", {"num_hidden_layers": LAYERS})
    plan = Plan(sequence=sequence, bucket_mb=bucket_mb, check_numerics=False)
    model = parallelize(example.model, Mesh(dp=2, tp=2), plan, example_inputs=example.batch)
    model(**example.batch).loss.backward()  # the first step also compares the programs of the ranks
    with Dispatched() as counter:
        model(**example.batch).loss.backward()
    assert counter.times.keys() <= {"all_reduce", "send", "recv"} and counter.times["send"] == counter.times["recv"]
    return {"in all": counter.times["all_reduce"] + counter.times["send"], "rings": counter.times["all_reduce"]}


def test_a_llama_sends_what_megatron_sends() -> None:
    pytest.importorskip("transformers")
    parameters = 9 * LAYERS + 3
    on_tp = 4 * LAYERS + 5  # 2 a layer each way; embedding, maximum, sum and target of the loss, entry of the head
    for alone, in_one in run_ranks(of_buckets, 4, 0, 25):
        assert alone["in all"] == on_tp + parameters + 2  # and on dp every gradient, the loss, its count
        assert in_one["in all"] == on_tp + 1 + 2
        assert in_one["rings"] == 1, "of all gradients in one bucket"


@pytest.mark.slow
def test_a_llama_with_its_sequence_split() -> None:
    pytest.importorskip("transformers")
    for found in run_ranks(counted, 4, "megatron", 25):
        # a layer: 2 gathers and 2 scatters each way; embedding and head: one of each, each way
        moved = 2 * (4 * LAYERS + 2)
        # the loss; the norm weights over tp and then dp; the other gradients over dp; the loss and its count
        assert found["in all"] == moved + 3 + 2 + 1 + 2
