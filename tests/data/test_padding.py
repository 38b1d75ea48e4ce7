"""Padding that a mesh needs changes nothing: loss, outputs and gradients are those of the batch without it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan, SequenceError, pad_batch
from autopar.compiler import compile_program
from autopar.data.padding import PaddedBatch, multiple_of
from autopar.errors import IndivisibleError
from autopar.frontend.numerics import gradient_error, promote_float32
from autopar.ir.loss import loss_of
from autopar.models import gpt
from autopar.simulate import simulate
from tests import hugging_face
from tests.launch import run_ranks
from tests.selection import slow_but

EXACT = 1e-12
LENGTHS = {"llama": (13, 13), "bert": (13, 13), "t5": (13, 10), "gpt2": (13, 13), "bart": (11, 14)}  # ids, labels


def batch_of(name: str, **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model, batch = hugging_face.build(name, **changes)
    lengths = dict(zip(("input_ids", "labels"), LENGTHS[name]))
    return model, {key: tensor[:, : lengths[key]].contiguous() for key, tensor in batch.items()}


@pytest.mark.parametrize(
    ("name", "mesh"),
    slow_but([1, 2, 3, 5], [*((name, "sp=2") for name in LENGTHS), ("llama", "sp=4"), ("t5", "dp=2,sp=2")]),
)
def test_results_are_those_without_padding(name: str, mesh: str) -> None:
    model, batch = batch_of(name)
    padded = pad_batch(batch, model, Mesh.parse(mesh))
    assert all(new > old and new % 4 == 0 for old, new in padded.lengths.values())
    with promote_float32():
        expected = model(**batch)
        loss_of(expected).backward()
        program = compile_program(model, Mesh.parse(mesh), Plan(check_numerics=False), (), padded)
        state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        step = simulate(program, state, (), padded)
    assert abs(float((step.loss / loss_of(expected)).detach()) - 1) <= EXACT
    logits = padded.unpad(step.output["logits"], like="labels")
    assert logits.shape == expected.logits.shape
    assert float((logits - expected.logits).abs().max() / expected.logits.abs().max()) <= EXACT
    wanted = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert max(gradient_error(step.grads, wanted).values()) <= EXACT


def test_packed_documents() -> None:
    model, batch = batch_of("llama")
    batch["position_ids"] = torch.tensor([[*range(6), *range(7)], [*range(11), *range(2)]])
    with pytest.raises(SequenceError, match="several documents"):
        pad_batch(batch, model, Mesh(sp=2))
    padded = pad_batch(batch, model, Mesh(sp=2), causal=True)
    assert padded["position_ids"][1].tolist() == [*range(11), *range(5)] and "attention_mask" not in padded
    with promote_float32():
        assert torch.allclose(model(**padded).loss, model(**batch).loss, rtol=EXACT, atol=0)


def test_what_is_filled_in() -> None:
    model, batch = batch_of("llama", pad_token_id=7)
    batch |= {"token_type_ids": torch.ones_like(batch["labels"]), "speed": torch.ones(2, 13, 4), "scale": torch.ones(2)}
    with pytest.raises(SequenceError, match=r"'speed' \[2, 13, 4\] lacks 3 positions") as found:
        pad_batch(batch, model, Mesh(sp=4))
    assert "fills={'speed': 0}" in str(found.value) and len(str(found.value).splitlines()) < 15
    padded = pad_batch(batch, model, Mesh(sp=4), fills={"speed": -1.0})
    ends = {key: padded[key][:, 13:].unique().tolist() for key in padded if key != "scale"}
    assert ends == {"input_ids": [7], "labels": [-100], "token_type_ids": [0], "speed": [-1.0], "attention_mask": [0]}
    assert padded["scale"] is batch["scale"] and padded["attention_mask"][:, :13].all()
    given = pad_batch(
        {**batch, "attention_mask": torch.ones(2, 13)},
        model,
        Mesh(sp=2),
        Plan(sequence_dims={"speed": None, "attention_mask": 1}),
    )
    assert given["attention_mask"][0].tolist() == [1.0] * 13 + [0.0] * 3 and given["speed"].shape == (2, 13, 4)
    assert pad_batch(batch, model, Mesh(sp=4), pad_id=9, fills={"speed": 0})["input_ids"][0, -1] == 9


def test_nothing_to_do() -> None:
    model, batch = hugging_face.build("llama")
    padded = pad_batch(batch, model, Mesh(sp=4))
    assert list(padded) == list(batch) and all(padded[key] is batch[key] for key in batch)
    assert padded.unpad(torch.ones(2, 16)).shape == (2, 16)
    assert (multiple_of(Mesh(dp=4)), multiple_of(Mesh(sp=3)), multiple_of(Mesh(sp=2, tp=3))) == (1, 6, 4)
    assert multiple_of(Mesh(sp=2, tp=3), Plan(sequence="megatron")) == 12


def test_a_model_that_would_look_at_padding() -> None:
    model = gpt.build()
    batch = gpt.example_batch(model, 2, 7)
    with pytest.raises(SequenceError, match="takes no 'attention_mask'") as found:
        pad_batch(batch, model, Mesh(sp=2))
    assert "causal=True" in str(found.value) and len(str(found.value).splitlines()) < 15
    padded = pad_batch(batch, model, Mesh(sp=2), causal=True)
    assert torch.allclose(model(**padded)["loss"], model(**batch)["loss"])
    bert, batch = batch_of("bert")
    square = torch.zeros(2, 1, 13, 13, dtype=torch.float64)
    with pytest.raises(SequenceError, match=r"'attention_mask' \[2, 1, 13, 13\] has no dim of positions"):
        pad_batch({**batch, "attention_mask": square}, bert, Mesh(sp=2))


def test_two_lengths_that_become_one() -> None:
    model, batch = batch_of("t5")
    padded = pad_batch(batch, model, Mesh(sp=2, tp=2), Plan(sequence="megatron"))
    assert padded.lengths == {"input_ids": (13, 16), "labels": (10, 16)}
    outputs = {"logits": torch.ones(2, 16, 4), "loss": torch.ones(())}
    with pytest.raises(SequenceError, match="'input_ids' 13, 'labels' 10"):
        padded.unpad(outputs)
    found = padded.unpad(outputs, like="labels")
    assert found["logits"].shape == (2, 10, 4) and found["loss"].shape == ()


def test_the_error_for_a_length_that_does_not_divide_names_it() -> None:
    model, batch = batch_of("llama")
    with pytest.raises(IndivisibleError, match=r"by 1 to 14 positions.*autopar.pad_batch"):
        compile_program(model, Mesh(sp=2), Plan(check_numerics=False), (), batch)


def of_ranks(length: int) -> tuple[list[int], list[int], str]:
    """Shapes of this rank's part and of the whole logits without padding, and the error where parts do not allow it."""
    torch.set_default_dtype(torch.float64)
    model, batch = hugging_face.build("llama")
    batch = {key: tensor[:, :length].contiguous() for key, tensor in batch.items()}
    reference, mesh = copy.deepcopy(model), Mesh(sp=2)
    parallel = autopar.parallelize(model, mesh, Plan(inputs="local", check_numerics=False))
    padded = pad_batch(batch, model, mesh)
    part = autopar.part_of_batch(padded, mesh)
    logits = parallel(**part).logits
    whole = padded.unpad(logits.full_tensor())
    assert torch.allclose(whole, reference(**batch).logits, atol=1e-6)
    try:
        own = padded.unpad(logits)
    except SequenceError as problem:
        return [], list(whole.shape), str(problem)
    assert torch.equal(own.full_tensor(), whole)
    return list(own.to_local().shape), list(whole.shape), ""


def test_parts_of_outputs_without_padding() -> None:
    found = run_ranks(of_ranks, 2, 15)
    assert [part for part, _, _ in found] == [[2, 8, 256], [2, 7, 256]] and all(w == [2, 15, 256] for _, w, _ in found)
    for part, _, text in run_ranks(of_ranks, 2, 13):
        assert not part and "13 positions" in text and "full_tensor()" in text


def test_it_is_a_dict() -> None:
    padded = PaddedBatch({"x": torch.ones(1, 4)}, {"x": (3, 4)})
    assert isinstance(padded, dict) and padded.unpad((padded["x"], [torch.ones(1, 5)]))[0].shape == (1, 3)
