"""A region of a rank program, compiled by Inductor at its first call, or run as the Python that it was written in.

Strides are known at the first call only: those of parameters are the user's, those of activations the kernels'. For
tensors with other strides a region is compiled once more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from autopar.codegen.python import RankFunction
from autopar.codegen.regions import Region
from autopar.errors import AutoparError
from autopar.inductor.one_at_a_time import one_at_a_time
from autopar.inductor.torch_inductor import Check, Pure, check_of, compiled, takes, traced
from autopar.ir.node import origin
from autopar.notes import warn

Seen = tuple[Any, ...]  # sizes and strides of the operands
CHECKED = 4  # kinds of operands that are told at a glance


class CompiledRegion:
    """The function of a region: ``(comm, operands) -> results``, where the list of operands is emptied.

    ``python``: the same function as it is written, which also runs where Inductor cannot compile it.
    """

    def __init__(self, region: Region, python: RankFunction) -> None:
        self.region, self.python = region, python
        self._variants: dict[tuple[torch.device, Seen], Pure] = {}
        self._latest: list[tuple[Check, Pure]] = []

    def __call__(self, comm: Any, operands: list[Tensor]) -> Sequence[Tensor]:
        for fits, pure in self._latest:
            if fits(*operands):
                return pure(operands)
        return self._variant(comm, operands)(operands)

    def _variant(self, comm: Any, operands: Sequence[Tensor]) -> Pure:
        key = comm.device, tuple([(x.shape, x.stride()) for x in operands])
        if key not in self._variants:
            self._variants[key] = self._compiled(comm, operands)
        if operands:
            self._latest = [(check_of(operands), self._variants[key]), *self._latest[: CHECKED - 1]]
        return self._variants[key]

    def _compiled(self, comm: Any, operands: Sequence[Tensor]) -> Pure:
        """Raises AutoparError where the machine is to blame: another rank may be able to, and would round otherwise."""
        python: Pure = partial(self.python, comm)
        number = hashlib.sha256(self.region.key.encode()).hexdigest()
        try:
            with one_at_a_time(number):
                found = _undisturbed(partial(self.made, comm, [tensor.detach() for tensor in operands]))
        except (OSError, MemoryError) as problem:
            raise AutoparError(
                f'Plan(compile="inductor"): compiling {self._place} failed: {type(problem).__name__}: {problem}\n'
                'Way out: free what is missing, set TORCHINDUCTOR_CACHE_DIR to another disk, or Plan(compile="python").'
            ) from problem
        except Exception as problem:  # Inductor's own, of any kind: the region is right as it is written
            warn(
                f'Plan(compile="inductor"): {_blamed(problem) or self._place} runs as generated Python: {_why(problem)}'
            )
            for counts in _COUNTING:
                counts.left.append(_blamed(problem))
            return python
        for counts in _COUNTING:
            counts.compiled += 1
        return found

    def made(self, comm: Any, operands: Sequence[Tensor]) -> Pure:
        """What Inductor makes of it for ``operands``. Raises whatever Inductor does."""
        return _compile(partial(self.python, comm), operands, comm.device)

    @property
    def _place(self) -> str:
        modules = [origin(node).module for node in self.region.graph.nodes]
        return f"what belongs to '{next(filter(None, modules), 'the model')}'"


@dataclass
class Counts:
    """Regions that were compiled, or taken from the cache on disk; and for each that was not, the operator to blame."""

    compiled: int = 0
    left: list[str] = field(default_factory=list)


_COUNTING: list[Counts] = []


@contextmanager
def counted() -> Iterator[Counts]:
    """What is compiled within this context."""
    counts = Counts()
    _COUNTING.append(counts)
    try:
        yield counts
    finally:
        _COUNTING.remove(counts)


_REGIONS: WeakValueDictionary[str, CompiledRegion] = WeakValueDictionary()


def compiled_region(region: Region, python: RankFunction) -> CompiledRegion:
    """The one of this process: programs share regions that do the same."""
    found = _REGIONS.get(region.key)
    if found is None:
        found = _REGIONS[region.key] = CompiledRegion(region, python)
    return found


class _NoKernel(Exception):
    """Of an operator that Inductor would only call."""


def _compile(python: Pure, operands: Sequence[Tensor], device: torch.device) -> Pure:
    if device.type == "cuda":  # a new thread is on the first
        torch.cuda.set_device(device)
    graph = traced(python, operands)
    refuse_calls(graph)
    return compiled(graph, operands)


def refuse_calls(graph: fx.GraphModule, but: Sequence[Any] = ()) -> None:
    """Raise for a graph with an operator, ``but`` those, that Inductor would only call."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target not in but and not takes(node.target):
            raise _NoKernel(f"target: {node.target}\nInductor has no kernel for it")


def _undisturbed(work: Callable[[], Pure]) -> Pure:
    """What ``work`` gives in a thread of its own, outside of the modes of this one (autograd, autocast, profilers)."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def _blamed(problem: BaseException) -> str:
    """The operator that an error of Inductor's is about, or ``""``."""
    found = re.search(r"target: ([\w.:]+)", str(problem))
    return found.group(1) if found else ""


def _why(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip() and "target: " not in line]
    return lines[0] if lines else type(problem).__name__
