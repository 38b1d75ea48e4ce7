"""Documents in one row that do not see each other: the loss is that of each document by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from autopar import Mesh
from autopar.check import check
from autopar.commands.trained_model import refuse_model
from autopar.data.token_stream import Tokens, TokenStream
from autopar.zoo.named import named_model


def test_the_loss_is_that_of_each_document_alone() -> None:
    pytest.importorskip("transformers")
    numbers = np.random.default_rng(1).integers(1, 250, 48)
    numbers[[5, 6, 20, 23, 30]] = 0  # documents of many lengths, one of the end alone
    stream = TokenStream(Tokens(numbers, 256, end=0), 2, 24, "separate")
    model = named_model("hf:llama").model.double().eval()
    refuse_model("hf:llama", model, stream)
    batch = stream(0)
    together = model(**batch)
    losses: list[torch.Tensor] = []
    for row, logits in zip(batch["input_ids"], together.logits.detach()):
        ends = [-1, *(place for place in range(23) if row[place] == 0), 23]
        for start, end in zip(ends, ends[1:]):
            alone = model(input_ids=row[None, start + 1 : end + 1]).logits.detach()[0]
            torch.testing.assert_close(logits[start + 1 : end + 1], alone, rtol=0, atol=1e-12)
            losses += functional.cross_entropy(alone[:-1], row[start + 2 : end + 1], reduction="none")
    torch.testing.assert_close(together.loss.item(), torch.stack(losses).mean().item(), rtol=0, atol=1e-6)
    assert check(model, batch, Mesh(dp=2, sp=2)).passed


def test_models_that_cannot_tell_documents_apart() -> None:
    stream = TokenStream(Tokens(np.zeros(100, int), 1, end=0), 2, 8, "separate")
    model = named_model("llama").model
    with pytest.raises(ValueError, match="llama takes no position_ids.*\nWay out: --documents joined"):
        refuse_model("llama", model, stream)
    refuse_model("llama", model, TokenStream(stream.tokens, 2, 8))
    with pytest.raises(ValueError, match="--config vocab=70048"):
        refuse_model("llama", model, TokenStream(Tokens(np.zeros(100, int), 70_000), 2, 8))
