"""The key of a program: what is known of a call before it is traced, as a table of facts.

It holds all that a trace and the passes take from outside of the model's Python: the model's tensors and settings, the
call, mesh and plan, versions and files of what is installed, and the modes in which torch is. What the model's Python
reads beside that is compared later (:mod:`autopar.cache.state`).
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.cache.code_digests import digest
from autopar.cache.torch_state import modes_of_torch
from autopar.cache.value_digests import Digests
from autopar.frontend.fingerprint import fingerprint
from autopar.ir.layout import Layout
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.observation.trace_record import OF_TORCH
from autopar.plan import Plan

FORMAT = 7  # of entries
WITHOUT_EFFECT = ("seed", "initial", "timeout", "lengths", "compile")  # choices that no program depends on
# of the compiler's own, and of libraries, which read them where no trace sees it
PREFIXES = (*OF_TORCH, "TRANSFORMERS_", "HF_")
SET_BY_TORCH = ("TORCHINDUCTOR_CACHE_DIR",)  # once it has compiled something, for other processes


@dataclass(frozen=True)
class Request:
    """One call to be compiled, as :func:`autopar.compiler.compile_program` takes it."""

    model: nn.Module
    mesh: Mesh
    plan: Plan
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    layouts: Mapping[str, Layout] | None = None
    homes: Mapping[str, Any] | None = None
    like: AnyProgram | None = None

    @property
    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((tuple(self.args), dict(self.kwargs)))


def facts_of(request: Request) -> dict[str, str]:
    """Name -> fact. Raises Unstorable for a call that has no such table."""
    return {
        "format": str(FORMAT),
        **dict(_of_installation()),
        **modes_of_torch(),
        **dict(_of_model(request.model)),
        **dict(_of_call(request)),
    }


def key_of(facts: Mapping[str, str]) -> str:
    return digest(*(part for pair in sorted(facts.items()) for part in pair))


def _of_installation() -> Iterator[tuple[str, str]]:
    yield "python", f"{sys.version} {sys.implementation.cache_tag} -O{sys.flags.optimize}"
    yield "machine", platform.machine()
    yield "torch", f"{torch.__version__} {torch.version.git_version}"
    yield "installed packages", _installed(tuple(sys.path))
    for name in sorted(os.environ):
        if name.startswith(PREFIXES) and name not in SET_BY_TORCH:
            yield f"environment variable {name}", digest(os.environ[name])
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield f"device {number}", torch.cuda.get_device_name(number)
    yield "process groups", str(dist.is_available() and dist.is_initialized())
    digests = Digests(lambda _: None)
    rules = sys.modules.get("autopar.rules")  # that compile; where they were never loaded, nobody has added any
    for target, rule in (rules.ADDED if rules is not None else {}).items():
        yield f"rule of {target}", digests.of(rule)


@cache
def _installed(path: tuple[str, ...]) -> str:
    """Of the names of what is installed, which have versions."""
    folders = [Path(folder) for folder in path if folder.endswith(("site-packages", "dist-packages"))]
    names = [name for folder in folders if folder.is_dir() for name in os.listdir(folder)]
    return digest(*sorted(name for name in names if name.endswith((".dist-info", ".egg-info", ".egg-link", ".pth"))))


def _of_model(model: nn.Module) -> Iterator[tuple[str, str]]:
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            yield f"{kind} {name}", _of_tensor(tensor)


def _of_tensor(tensor: Tensor) -> str:
    stride = tuple(tensor.stride()) if tensor.layout is torch.strided else ()
    kind = type(tensor)
    return (
        f"{kind.__module__}.{kind.__qualname__} {tuple(tensor.shape)} {stride} {tensor.dtype} {tensor.device.type} "
        f"{tensor.layout} {tensor.requires_grad}"
    )


def _of_input(tensor: Tensor) -> str:
    return f"{_of_tensor(tensor)} {sorted(vars(tensor))}"


def _of_call(request: Request) -> Iterator[tuple[str, str]]:
    known = fingerprint(request.model, request.args, request.kwargs)
    for title, table in (("code", known.code), ("module", known.modules), ("tensor", known.tensors)):
        for name, fact in table.items():
            yield f"{title} {name}", fact
    yield "mode", known.call.mode
    digests = Digests(lambda _: None)
    leaves, spec = pytree.tree_flatten((tuple(request.args), dict(request.kwargs)))
    yield "structure of the inputs", str(spec)
    for place, leaf in enumerate(leaves):
        yield f"input {place}", _of_input(leaf) if isinstance(leaf, Tensor) else digests.of(leaf)
    yield "mesh", f"{request.mesh} in nodes of {request.mesh.node_size}"
    for name, choice in request.plan.to_json().items():
        if name not in WITHOUT_EFFECT:
            yield f"plan {name}", repr(choice)
    for name, layout in sorted((request.layouts or {}).items()):
        yield f"layout of {name}", repr(layout)
    for name, stages in sorted((request.homes or {}).items()):
        yield f"stages of {name}", repr(stages)
    if request.like is not None:
        for axis, made in request.like.decisions.items():
            choices = (part for name, decision in made.items() for part in (name, decision.chosen, str(decision.stage)))
            yield f"decisions on {axis} that are kept", digest(*choices)
