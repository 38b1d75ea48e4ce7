"""Greedy generation with a model that is split over the mesh: each step, one forward pass of the rows so far.

torchrun --nproc-per-node 2 examples/generate.py ./my-model "Once upon a time" --mesh tp=2

There is no cache of keys and values, so a token costs a pass over all before it: this is for looking at what a model
has learned, not for serving. Rows have a fixed length, so that one program serves all steps. Where a model fits one
process, autopar.gather(model) is the plain one, with its own generate().
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

import autopar


def main(arguments: Sequence[str] | None = None) -> list[int]:
    """The tokens: those of the prompt, then the new ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--mesh", type=autopar.Mesh.parse, default=autopar.Mesh(tp=1))
    parser.add_argument("--tokens", type=int, default=8)
    given = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(given.model) if list(given.model.glob("tokenizer*")) else None
    tokens = list(tokenizer(given.prompt)["input_ids"]) if tokenizer else list(given.prompt.encode())
    length = len(tokens) + given.tokens
    first = {"input_ids": torch.zeros(1, length, dtype=torch.long), "use_cache": False}
    model = autopar.from_pretrained(given.model, given.mesh, autopar.Plan(outputs="full"), example_inputs=first)
    with torch.no_grad():
        while len(tokens) < length:
            padded = torch.tensor([tokens + [0] * (length - len(tokens))])  # causal: no token looks at what follows
            logits = model(input_ids=padded, use_cache=False).logits
            tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    if torch.distributed.get_rank() == 0:
        print(tokenizer.decode(tokens) if tokenizer else bytes(token % 256 for token in tokens))
    return tokens


if __name__ == "__main__":
    main()
