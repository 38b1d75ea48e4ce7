"""What this machine can run: whether it has the devices, the cores and the backends for a number of ranks."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

RANKS_OF_A_CORE = 8
FEW = 32  # ranks that any machine may try


def device_of_rank(name: str, ranks: int) -> torch.device:
    """Where a rank computes: ``name`` is cpu, cuda, or auto, which is cuda if each of the ``ranks`` here has one.

    Makes it the present CUDA device of a rank. Raises ValueError where the devices are not there.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: it is one of auto, cpu, cuda")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here\nWay out: --device cpu.")
    if torch.cuda.device_count() < ranks:
        raise ValueError(
            f"--device cuda: {ranks} ranks on this machine, and it has {torch.cuda.device_count()} CUDA devices\n"
            "Way out: a smaller --mesh; torchrun on more machines; or --device cpu."
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def refuse_ranks(ranks: int, device: torch.device) -> None:
    """Raise ValueError where so many processes could not work together here."""
    if not dist.is_available():
        raise ValueError(
            f"{ranks} ranks need torch.distributed, which this build of torch lacks\nWay out: another build; --mesh 1."
        )
    if device.type == "cuda" and not dist.is_nccl_available():
        raise ValueError(
            f"{ranks} ranks on CUDA devices need NCCL, which this build of torch lacks\n"
            "Way out: a build of torch with NCCL (Linux has it); or --device cpu."
        )
    if device.type == "cpu" and not dist.is_gloo_available():
        raise ValueError(f"{ranks} ranks on CPUs need gloo, which this build of torch lacks\nWay out: another build.")
    cores = _cores()
    most = max(FEW, RANKS_OF_A_CORE * cores)
    if device.type == "cpu" and ranks > most:
        raise ValueError(
            f"{ranks} ranks are {ranks} processes, and this machine has {cores} cores: more than {most} would hardly "
            "come to an end\n"
            "Way out: a smaller --mesh; torchrun on more machines; or autopar check, all ranks in one process."
        )


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
