"""Fine-tune a Hugging Face model, from a folder to a folder, on your own JSON lines ({"text": "..."}).

torchrun --nproc-per-node 4 examples/finetune.py ./my-model data.jsonl -o ./tuned --mesh dp=2,tp=2 --zero 1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

import autopar

IGNORED = -100  # the label of what counts in no loss


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder with config.json and safetensors files")
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--mesh", type=autopar.Mesh.parse, default=autopar.Mesh(dp=1))
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row; longer texts are cut")
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args(arguments)


def encoder(folder: Path) -> Callable[[str], list[int]]:
    """The tokenizer of the folder, or the bytes of the text where it has none."""
    if not list(folder.glob("tokenizer*")):
        return lambda text: list(text.encode())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: list(tokenizer(text)["input_ids"])


def row(tokens: list[int], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and labels, padded on the right: padding is masked and has no label."""
    tokens = tokens[:length]
    rest = length - len(tokens)
    mask = torch.tensor([1] * len(tokens) + [0] * rest)
    return torch.tensor(tokens + [0] * rest), mask, torch.tensor(tokens + [IGNORED] * rest)


def batches(given: argparse.Namespace, epoch: int) -> Iterator[dict[str, Tensor]]:
    """In the same order on every rank. The last one may have fewer rows."""
    encoded = encoder(given.model)
    lines = given.data.read_text(encoding="utf-8").splitlines()
    rows = [row(encoded(json.loads(line)["text"]), given.length) for line in lines if line.strip()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch)).split(given.batch)
    for places in order:
        columns = [torch.stack(column) for column in zip(*(rows[place] for place in places.tolist()))]
        yield dict(zip(("input_ids", "attention_mask", "labels"), columns))


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The losses of all steps."""
    given = parsed(arguments)
    first = next(batches(given, 0))
    model = autopar.from_pretrained(given.model, given.mesh, autopar.Plan(zero=given.zero), example_inputs=first)
    model.train()  # as with transformers, what from_pretrained gives is in evaluation mode
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr)
    losses = []
    for epoch in range(given.epochs):
        for batch in batches(given, epoch):
            losses.append(float(model.train_step(**batch)))
            model.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            if torch.distributed.get_rank() == 0:
                print(f"epoch {epoch} loss {losses[-1]:.4f}", flush=True)
    autopar.save_pretrained(model, given.output)  # for transformers' own from_pretrained, and other tools
    return losses


if __name__ == "__main__":
    main()
