"""What a Llama really sends: torch's own counter under real processes, against what the graphs say."""

from __future__ import annotations

from collections import Counter

import pytest

from autopar.mesh import Mesh
from autopar.plan import Plan
from tests.launch import run_ranks

LAYERS = 2


def of_buckets(*bucket_mb: float) -> list[dict[str, int]]:
    return [counted("none", size) for size in bucket_mb]


def counted(sequence: str, bucket_mb: float) -> dict[str, int]:
    """Collectives of one training step by kind, counted by torch's CommDebugMode."""
    from torch.distributed.tensor.debug import CommDebugMode

    from autopar.api import parallelize
    from autopar.zoo.named import named_model

    example = named_model("hf:llama", {"num_hidden_layers": LAYERS})
    plan = Plan(sequence=sequence, bucket_mb=bucket_mb, check_numerics=False)
    model = parallelize(example.model, Mesh(dp=2, tp=2), plan, example_inputs=example.batch)
    model(**example.batch).loss.backward()  # the first step also compares the programs of the ranks
    with CommDebugMode() as counter:
        model(**example.batch).loss.backward()
    found: Counter[str] = Counter()
    for operator, times in counter.get_comm_counts().items():
        kind = str(operator).rpartition(".")[2]
        kind = {"_allgather_base_": "all_gather", "allreduce_": "all_reduce"}.get(kind, kind)  # in place
        found[kind.replace("_into_tensor", "").replace("_tensor", "").replace("_single", "")] += times
    return dict(found)


def test_a_llama_sends_what_megatron_sends() -> None:
    pytest.importorskip("transformers")
    parameters = 9 * LAYERS + 3
    on_tp = 4 * LAYERS + 5  # 2 a layer each way; embedding, maximum, sum and target of the loss, entry of the head
    for alone, in_one in run_ranks(of_buckets, 4, 0, 25):
        assert alone == {"all_reduce": on_tp + parameters + 2}  # and on dp every gradient, the loss, its count
        assert in_one == {"all_reduce": on_tp + 1 + 2}


@pytest.mark.slow
def test_a_llama_with_its_sequence_split() -> None:
    pytest.importorskip("transformers")
    for found in run_ranks(counted, 4, "megatron", 25):
        # a layer: 2 gathers and 2 scatters each way; embedding and head: one of each, each way
        assert found["all_to_all"] == found["alltoall_base_"] == 4 * LAYERS + 2  # as gloo does them (direct_exchange)
        # the loss; the norm weights over tp and then dp; the other gradients over dp; the loss and its count
        assert found["all_reduce"] == 3 + 2 + 1 + 2
