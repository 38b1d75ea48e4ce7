"""``autopar.from_pretrained``: from the files of a Hugging Face model to the parallel module, each rank its part."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from autopar.api import parallelize
from autopar.checkpoint.peers import Peers
from autopar.checkpoint.weights import load_safetensors
from autopar.mesh import Mesh
from autopar.module import ParallelModule
from autopar.plan import Plan
from autopar.pretrained.example_batch import example_batch
from autopar.pretrained.hub_models import folder_of, meta_model, settle_problem_type

logger = logging.getLogger("autopar")


def from_pretrained(
    folder_or_id: str | Path,
    mesh: Mesh | DeviceMesh | None = None,
    plan: Plan | None = None,
    *,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    task: str | type | None = None,
    config: Mapping[str, Any] | None = None,
    program: Any = None,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ParallelModule:
    """The Hugging Face model of a folder, or of the Hub, as one rank of ``mesh`` has it; all ranks call this.

    No rank has the whole model at any time: it is built on the meta device and split, then each rank reads its own
    slices of the safetensors files, which are converted as ``transformers`` does. Buffers that are in no file get the
    numbers of the model's own initialisation. The module is in evaluation mode, as that of ``transformers``.

    Args:
        dtype: of the parameters; without it that of the config, else float32.
        strict: a tensor without an entry in the files, and an entry without a tensor, is an error. With False the first
            (a new head) is initialised, the same on any mesh, and the second left out.
        example_inputs: arguments of a call like those that follow. Without them it is split for a batch of its task, of
            512 tokens a row; a call with other sizes then makes its own program, with parameters split as they are.
        task: which model, where the config does not say, or another one than it says: ``"causal-lm"``,
            ``"seq-classification"``, ... as ``--task`` of the command line (``zoo/tasks.py``), or a class.
        config: fields of the config to change, e.g. ``{"num_labels": 3}``.
        program: of ``autopar compile``, as :func:`autopar.parallelize` takes it.
        seed: of the initialisation of what is in no file.
        revision, trust_remote_code: as of ``transformers``.

    Raises CheckpointError for files that do not fit, with near names; what :func:`autopar.parallelize` raises.
    """
    if mesh is None and program is None:
        raise ValueError("from_pretrained needs a mesh, e.g. autopar.Mesh(dp=2, tp=2), or program=, which has one")
    folder = folder_of(folder_or_id, revision)
    model = meta_model(folder, task, dtype, config, trust_remote_code)
    model.train()  # the program is that of training; evaluation has its own, as parameters are split by now
    if example_inputs is None and program is None:
        on = Mesh.from_device_mesh(mesh) if isinstance(mesh, DeviceMesh) else mesh
        assert on is not None
        example_inputs = example_batch(model, on, plan or Plan())
    settle_problem_type(model, example_inputs)
    parallel = parallelize(model, mesh, plan, example_inputs=example_inputs, program=program)
    with Peers(parallel).agreed("loading weights"):
        found = load_safetensors(parallel, folder, seed=seed, strict=strict)
    kind = type(model).__name__
    logger.info("%s: %d tensors from '%s', %d bytes read", kind, len(found.loaded), folder, found.bytes_read)
    return parallel.eval()
