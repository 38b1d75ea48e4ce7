"""The loss and perplexity of a model on a held-out text, on any mesh; the last batch may have any number of rows.

torchrun --nproc-per-node 2 examples/evaluate.py ./my-model held_out.txt --mesh dp=2
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

import autopar


def tokens_of(folder: Path, text: str) -> list[int]:
    """By the tokenizer of the folder, or the bytes where it has none."""
    if not list(folder.glob("tokenizer*")):
        return list(text.encode())
    return list(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])


def main(arguments: Sequence[str] | None = None) -> float:
    """The mean loss of a token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--mesh", type=autopar.Mesh.parse, default=autopar.Mesh(dp=1))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    given = parser.parse_args(arguments)

    tokens = torch.tensor(tokens_of(given.model, given.text.read_text(encoding="utf-8")))
    rows = tokens[: len(tokens) // given.length * given.length].view(-1, given.length)
    first = {"input_ids": rows[: given.batch], "labels": rows[: given.batch].clone()}
    model = autopar.from_pretrained(given.model, given.mesh, example_inputs=first)  # in evaluation mode

    total, count = 0.0, 0
    with torch.no_grad():
        for part in rows.split(given.batch):
            loss = float(model(input_ids=part, labels=part.clone()).loss)  # of all rows, on every rank
            predicted = len(part) * (given.length - 1)
            total, count = total + loss * predicted, count + predicted
    if torch.distributed.get_rank() == 0:
        print(f"{count} tokens, loss {total / count:.4f}, perplexity {math.exp(total / count):.2f}")
    return total / count


if __name__ == "__main__":
    main()
