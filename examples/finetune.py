"""Fine-tune a Hugging Face model, from a folder to a folder, on your own JSON lines.

A line is {"text": "..."}, or {"prompt": "...", "completion": "..."}, of which the completion is learned. The folder
that is written has the tokenizer too. Started again with the same --checkpoint, a run goes on where it was.

torchrun --nproc-per-node 4 examples/finetune.py ./my-model data.jsonl -o ./tuned --mesh dp=2,tp=2 --zero 1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    parser.add_argument("--precision", help="what is computed in, e.g. bf16; parameters keep their dtype")
    parser.add_argument("--checkpoint", type=Path, help="a folder to save to, and to go on from")
    parser.add_argument("--every", type=int, default=100, help="steps from one checkpoint to the next")
    given = parser.parse_args(arguments)
    if list(given.output.glob("*.safetensors")):  # told now, and not after the training
        parser.error(f"{given.output} has weights already: another -o, or remove it")
    return given


def tokenizer_of(folder: Path) -> Any:
    """None where the folder has none: the tokens are then the bytes of the text."""
    return AutoTokenizer.from_pretrained(folder) if list(folder.glob("tokenizer*")) else None


def encoded(tokenizer: Any, text: str) -> list[int]:
    return list(text.encode()) if tokenizer is None else list(tokenizer(text)["input_ids"])


def row(tokenizer: Any, line: dict[str, str], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and labels, padded on the right: padding is masked and has no label, as a prompt has none.

    All rows are of one length: a program is made for each shape of the inputs.
    """
    asked = encoded(tokenizer, line["prompt"]) if "prompt" in line else []
    told = encoded(tokenizer, line["completion" if "prompt" in line else "text"])
    tokens = (asked + told)[:length]
    labels = ([IGNORED] * len(asked) + told)[:length]
    rest = length - len(tokens)
    mask = torch.tensor([1] * len(tokens) + [0] * rest)
    return torch.tensor(tokens + [0] * rest), mask, torch.tensor(labels + [IGNORED] * rest)


def batches(given: argparse.Namespace, epoch: int, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """In the same order on every rank. The last one may have fewer rows."""
    lines = given.data.read_text(encoding="utf-8").splitlines()
    rows = [row(tokenizer, json.loads(line), given.length) for line in lines if line.strip()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch)).split(given.batch)
    for places in order:
        columns = [torch.stack(column) for column in zip(*(rows[place] for place in places.tolist()))]
        yield dict(zip(("input_ids", "attention_mask", "labels"), columns))


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The losses of the steps that were done."""
    given = parsed(arguments)
    tokenizer = tokenizer_of(given.model)
    plan = autopar.Plan(zero=given.zero, precision=autopar.Precision(param=given.precision))
    first = next(batches(given, 0, tokenizer))
    model = autopar.from_pretrained(given.model, given.mesh, plan, example_inputs=first)
    model.train()  # as with transformers, what from_pretrained gives is in evaluation mode
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr)
    checkpoints = autopar.Checkpoints(given.checkpoint) if given.checkpoint else None
    resumed = checkpoints.load(model, optimizer) if checkpoints else None
    done, step, losses = resumed.step if resumed else 0, 0, list[float]()
    for epoch in range(given.epochs):
        for batch in batches(given, epoch, tokenizer):
            step += 1
            if step <= done:
                continue
            losses.append(float(model.train_step(**batch)))
            model.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            if torch.distributed.get_rank() == 0:
                print(f"epoch {epoch} step {step} loss {losses[-1]:.4f}", flush=True)
            if checkpoints and step % given.every == 0:
                checkpoints.save(step, model, optimizer)
    autopar.save_pretrained(model, given.output, tokenizer=tokenizer)  # for transformers' from_pretrained
    return losses


if __name__ == "__main__":
    main()
