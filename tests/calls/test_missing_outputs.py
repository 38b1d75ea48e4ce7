"""A cache of keys and values, which a program does not return, is not passed on as None."""

from __future__ import annotations

import pytest
import torch

import autopar
from autopar import Mesh, Plan
from autopar.errors import InvariantError
from tests.launch import run_ranks

hugging_face = pytest.importorskip("tests.hugging_face")


def decode() -> bool:
    model, batch = hugging_face.build("llama", torch.float32, use_cache=True)
    parallel = autopar.parallelize(model, Mesh(dp=1), Plan(timeout=30.0))
    tokens = batch["input_ids"][:, :4]
    for _ in range(2):
        parallel(input_ids=tokens, labels=tokens, past_key_values=None).loss.backward()  # who learns asks for none
    with torch.no_grad():
        found = parallel(input_ids=tokens)
        assert found.past_key_values is None
        with pytest.raises(InvariantError, match=r"(?s)past_key_values=None is passed on .*Way out: .*use_cache=False"):
            parallel(input_ids=tokens[:, :1], past_key_values=found.past_key_values)
        assert parallel(input_ids=tokens).logits is not None
    return True


@pytest.mark.filterwarnings("ignore")
def test_a_loop_that_decodes_by_hand_is_refused() -> None:
    assert run_ranks(decode, 1) == [True]
