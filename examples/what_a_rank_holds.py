"""Bytes that a rank holds after one training step, counted on its own tensors, beside the formula.

torchrun --nproc-per-node 4 examples/what_a_rank_holds.py --mesh dp=4 --zero 3
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar

WIDTH, LAYERS = 64, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory of these tensors, or of the parts of them that this rank has; shared memory counts once."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    found = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(found.values())


def alive() -> int:
    """Bytes of all floats of this process."""
    gc.collect()
    tensors = (entry for entry in gc.get_objects() if type(entry) in (Tensor, nn.Parameter, DTensor))
    return storages(tensor for tensor in tensors if tensor.is_floating_point())


def formula(whole: int, mesh: autopar.Mesh, zero: int) -> tuple[float, float, float]:
    """Parameters, gradients and AdamW's states of one rank, where all weights divide: ZeRO's stages over dp."""
    own = whole / (mesh.size("tp") * mesh.size("pp"))
    share = [1 / mesh.size("dp") if zero >= stage else 1.0 for stage in (3, 2, 1)]
    return own * share[0], own * share[1], 2 * own * share[2]


def measured(mesh: autopar.Mesh, zero: int) -> tuple[int, int, int]:
    """The same, counted; gradients while batches accumulate (of a single batch ZeRO-1 scatters them at once)."""
    torch.manual_seed(0)
    x = torch.randn(8, WIDTH)
    before = alive()
    model = autopar.parallelize(Model(), mesh, autopar.Plan(zero=zero))
    model.prepare(x=x)
    optimizer = torch.optim.AdamW(model.parameters())
    model.train_step(x=x)
    optimizer.step()
    optimizer.zero_grad()
    states = storages(value for state in optimizer.state.values() for value in state.values())
    settled = alive()
    with model.no_sync():
        model.train_step(x=x)
    return settled - before - states, alive() - settled, states


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", type=autopar.Mesh.parse, default=autopar.Mesh(dp=4))
    parser.add_argument("--zero", type=int, default=0)
    given = parser.parse_args(arguments)
    whole = sum(p.numel() * p.element_size() for p in Model().parameters())
    counted, expected = measured(given.mesh, given.zero), formula(whole, given.mesh, given.zero)
    if dist.get_rank() == 0:
        print(f"{given.mesh} zero={given.zero}, a model of {whole:,} bytes; rank 0 holds")
        for what, bytes_, by_formula in zip(("parameters", "gradients", "AdamW states"), counted, expected):
            print(f"  {what:12} {bytes_:>9,} bytes, by formula {by_formula:>9,.0f}")


if __name__ == "__main__":
    main()
