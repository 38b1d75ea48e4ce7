"""Outputs of a split sequence on gloo processes: parts in plain order, their gradients, and never the whole."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
from autopar import Mesh, Plan, part_of_batch
from autopar.frontend.numerics import promote_float32
from tests import hugging_face
from tests.against_one_process import difference, worst
from tests.launch import run_ranks
from tests.selection import slow_but

EXACT = 1e-12
Found = tuple[dict[str, float], list[tuple[str, list[int], list[int]]]]


def gradients(parallel: Any, reference: Any) -> dict[str, float]:
    expected = {key: p.grad for key, p in reference.named_parameters() if p.grad is not None}
    found, largest = parallel.full_grads(), max(float(grad.abs().max()) for grad in expected.values())
    return {f"grad {key}": float((found[key] - grad).abs().max()) / largest for key, grad in expected.items()}


def run(mesh: Mesh, inputs: str, choices: dict[str, Any]) -> Found:
    """A loss of the user's own, over logits and hidden states of a Llama that is given no labels."""
    warnings.simplefilter("ignore")
    model, batch = hugging_face.build("llama", output_hidden_states=True)
    batch.pop("labels")
    reference = copy.deepcopy(model)
    plan = Plan(**{"inputs": inputs, "outputs": "sharded", "attention": "ring", "check_numerics": False, **choices})
    with promote_float32():
        parallel = autopar.parallelize(model, mesh, plan)
        given = part_of_batch(batch, mesh, plan) if inputs == "local" else batch
        found, expected = parallel(**given), reference(**batch)
        pairs = [(found.logits, expected.logits), *zip(found.hidden_states, expected.hidden_states)]
        weights = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3)) for _, x in pairs]
        sum((x * w).sum() for (_, x), w in zip(pairs, weights)).backward()
        own = [distributed(w, x) if isinstance(x, DTensor) else w for (x, _), w in zip(pairs, weights)]
        loss = sum((x * w).sum() for (x, _), w in zip(pairs, own))
        (loss.full_tensor() if isinstance(loss, DTensor) else loss).backward()
    errors = {str(place): difference(*pair) for place, pair in enumerate(pairs)}
    held = [(repr(x.placements), list(x.to_local().shape), list(x.shape)) for x, _ in pairs if isinstance(x, DTensor)]
    return errors | gradients(parallel, reference), held


def distributed(whole: Tensor, like: DTensor) -> DTensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("sp=2", "global", {}),
    ("dp=2,sp=2", "local", {"zero": 3}),
    ("sp=2,tp=2", "local", {}),
    ("sp=2,tp=2", "global", {"sequence": "megatron"}),
    ("sp=4", "local", {}),
]


@pytest.mark.parametrize(
    ("mesh", "inputs", "choices"), slow_but([1], CASES), ids=[f"{m}-{i}-{n}" for n, (m, i, _) in enumerate(CASES)]
)
def test_parts_in_plain_order_and_their_gradients(mesh: str, inputs: str, choices: dict[str, Any]) -> None:
    parsed = Mesh.parse(mesh)
    ways = parsed.size("sp")
    for errors, held in run_ranks(run, parsed.world_size, parsed, inputs, choices):
        assert worst(errors) < (EXACT, ""), sorted(errors.items(), key=lambda item: -item[1])[:5]
        assert len(held) == 4, "logits and three hidden states"
        for placements, local, shape in held:
            assert "Shard(dim=1)" in placements and "Strided" not in placements and local[1] <= shape[1] // ways


def test_gathered_outputs() -> None:
    for errors, held in run_ranks(run, 2, Mesh(sp=2), "local", {"outputs": "full"}):
        assert worst(errors) < (EXACT, "") and not held


class Largest(TorchDispatchMode):
    """The most bytes of one tensor that any operator gave."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor) and not isinstance(x, DTensor):
                self.most = max(self.most, x.untyped_storage().nbytes())
        return result


def largest(ways: int, outputs: str) -> int:
    """Bytes, in one step without labels whose logits get a gradient."""
    model, _ = hugging_face.build("llama", vocab_size=1024)
    plan = Plan(inputs="local", outputs=outputs, attention="ring", check_numerics=False)
    parallel = autopar.parallelize(model, Mesh(sp=ways), plan)
    part = part_of_batch({"input_ids": torch.arange(8 * 256).view(8, 256) % 1000}, Mesh(sp=ways))
    parallel(**part)
    with Largest() as found:
        logits = parallel(**part).logits
        logits = logits.to_local() if isinstance(logits, DTensor) else logits
        logits.backward(torch.ones_like(logits))
    return found.most


@pytest.mark.slow
@pytest.mark.parametrize("ways", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_rank_has_the_whole(ways: int) -> None:
    """Logits are the largest tensor: (8, 256, 1024) of 8 bytes. Messages of them are as large as a rank's part."""
    whole = 8 * 256 * 1024 * 8
    assert run_ranks(largest, ways, ways, "sharded") == [whole // ways] * ways
    for most in run_ranks(largest, ways, ways, "full"):
        assert most >= whole
