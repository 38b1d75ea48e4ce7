"""Bytes that a rank sends in a training step with ZeRO, against the formulas and torch's own data parallelism.

    python -m benchmarks.zero_traffic
    python -m benchmarks.zero_traffic --ranks 2 --model hf-llama-512

Both sides are counted in the same way: every operator of c10d is seen as it is dispatched, and counted by the usual
accounting of ring algorithms, so that N ranks send (N - 1)/N times a small multiple of the parameters' bytes P: 2 P in
plain data parallelism and with ZeRO-1 and 2, 3 P with ZeRO-3 (Rajbhandari et al. 2020, section 7). DDP reduces its
buckets through a hook that calls ``all_reduce``, since its own call is not dispatched. Beyond the formula each step of
ours sends the loss.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autopar
from benchmarks.contenders import Autopar, Contender
from benchmarks.launch import launched
from benchmarks.subjects import SUBJECTS, Batch, Subject
from benchmarks.torch_parallel import TorchParallel
from benchmarks.zero_step import PEERS

MODULE = "benchmarks.zero_traffic"
MULTIPLES = (2, 2, 2, 3)  # of the parameters, by stage
WARM_UP = 2
COLLECTIVES = {
    "all_reduce": ("all_reduce", "allreduce_", "all_reduce_"),
    "all_gather": ("all_gather_into_tensor", "all_gather_single", "_allgather_base_", "allgather_"),
    "reduce_scatter": ("reduce_scatter_tensor", "reduce_scatter_single", "_reduce_scatter_base_", "reduce_scatter_"),
    "all_to_all": ("all_to_all_single", "alltoall_base_"),
    "broadcast": ("broadcast", "broadcast_"),
    "send": ("send",),  # on gloo in place of gathers, scatters, and small sums
}
SILENT = ("wait_tensor", "barrier", "monitored_barrier_", "recv_")


class Counted(TorchDispatchMode):
    """Bytes sent by one of ``ranks`` ranks in what runs inside, by collective."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.sent = ranks, Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.__name__.partition(".")[0], args, found)
        return found

    def _count(self, name: str, args: tuple[Any, ...], found: Any) -> None:
        if name in SILENT:
            return
        kind = next(kind for kind, names in COLLECTIVES.items() if name in names)
        tensors = [leaf.nbytes for leaf in tree_leaves((args, found)) if isinstance(leaf, Tensor)]
        if kind == "send":
            self.sent[kind] += sum(tensors)
            return
        whole = max(tensors)  # what is reduced, gathered, scattered or handed on, in one piece
        self.sent[kind] += (2 if kind == "all_reduce" else 1) * whole * (self.ranks - 1) // self.ranks


@dataclass(frozen=True)
class Sent:
    """Bytes of one step, by collective; ``own`` is what autopar itself says that it has sent."""

    zero: int
    parameters: int
    ours: dict[str, int]
    own: int
    peer: dict[str, int]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, default="hf-llama-256")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is a rank; rank 0 writes there
    options = parser.parse_args(arguments)
    if options.worker:
        _work(SUBJECTS[options.model], options.worker)
        return 0
    rows = {n: [Sent(**entry) for entry in launched(MODULE, n, ["--model", options.model])] for n in options.ranks}
    if options.json:
        print(json.dumps({ranks: [*map(asdict, found)] for ranks, found in rows.items()}, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 150).print(_table(rows))
    return 0


# ---------------------------------------------------------------- ranks


def _work(subject: Subject, found: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [asdict(_sent(subject, zero)) for zero in range(4)]
    if dist.get_rank() == 0:
        found.write_text(json.dumps(rows))
    dist.destroy_process_group()


def _sent(subject: Subject, zero: int) -> Sent:
    ranks, batch = dist.get_world_size(), subject.batch(0)
    torch.manual_seed(0)
    model = subject.build()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("dp", "tp"))
    peer = TorchParallel(subject, copy.deepcopy(model), mesh, False, PEERS[zero], False)
    if isinstance(peer.module, DistributedDataParallel):
        peer.module.register_comm_hook(None, allreduce_hook)
    ours = Autopar(model, autopar.Mesh(dp=ranks), autopar.Plan(zero=zero), batch, False)
    found = _counted(ours, batch)
    before = ours.sent()
    _step(ours, batch)
    own = (ours.sent() - before).total()
    return Sent(zero, parameters, found, own, _counted(peer, batch))


def _counted(contender: Contender, batch: Batch) -> dict[str, int]:
    for _ in range(WARM_UP):
        _step(contender, batch)
    with Counted(dist.get_world_size()) as counted:
        _step(contender, batch)
    return dict(counted.sent)


def _step(contender: Contender, batch: Batch) -> None:
    contender.backward(contender.forward(contender.part(batch)))
    contender.optimizer.step()
    contender.optimizer.zero_grad()


# ---------------------------------------------------------------- the table


def _table(rows: Mapping[int, Sequence[Sent]]) -> Table:
    """MB; ``beyond`` are the bytes that the formula does not have."""
    table = Table("N", "zero", title="sent by a rank in a step, float32, MB", title_justify="left")
    for name in ("formula", "", "autopar", "beyond, bytes", "own count", "peer sends", "peer / formula"):
        table.add_column(name, justify="right")
    table.add_column("peer")
    for ranks, found in rows.items():
        for row in found:
            expected = MULTIPLES[row.zero] * row.parameters * (ranks - 1) // ranks
            ours, theirs = sum(row.ours.values()), sum(row.peer.values())
            parts = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in sorted(row.peer.items()))
            table.add_row(
                str(ranks),
                str(row.zero),
                f"{MULTIPLES[row.zero]}P x {ranks - 1}/{ranks}",
                f"{expected / 1e6:.3f}",
                f"{ours / 1e6:.3f}",
                str(ours - expected),
                f"{row.own / 1e6:.3f}",
                f"{theirs / 1e6:.3f}",
                f"{theirs / expected:.3f}",
                f"{PEERS[row.zero]}: {parts}",
            )
    return table


if __name__ == "__main__":
    sys.exit(main())
