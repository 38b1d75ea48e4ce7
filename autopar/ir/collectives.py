"""The collectives that appear in graphs, each with the collective of its backward pass (its dual).

They are torch operators in the namespace ``autopar`` with a shape function and an autograd formula, but no kernel: a
graph is traced with them for any mesh without a process group; the runtime (real processes) and the simulator (ranks
in lock-step) execute them. On one axis a value is I, R, S or P (see ``layout.py``):

    forward               name                  backward
    I -> R  (no-op)       enter                 all-reduce P -> I
    R -> I  (no-op)       release               keep on the first rank, I -> P
    P -> I                all_reduce            no-op
    S -> R                all_gather            reduce-scatter P -> S
    S -> I                all_gather_invariant  split I -> S
    P -> S                reduce_scatter        all-gather S -> whole
    I -> S                split                 all-gather S -> whole
    R -> S                split_replicated      pad with zeros S -> P
    S -> P                pad                   split
    I -> P                keep_first            no-op
    S(i) -> S(j)          all_to_all            all-to-all S(j) -> S(i)

``start_all_reduce``, ``start_all_gather`` and ``start_reduce_scatter`` do the same, but their result is there only when
``wait`` has given it on; they have no dual, since ``overlap_collectives`` makes them of the others in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.ir.layout import Split

_WHERE = "str axis, int ways, int dim, int outer, int[] ratio, int length"
_LIBRARY: Any = torch.library.Library("autopar", "DEF")  # type: ignore[no-untyped-call]
OPS = torch.ops.autopar


def _define(name: str, arguments: str, shape: Callable[..., Tensor]) -> None:
    _LIBRARY.define(f"{name}({arguments}) -> Tensor")
    torch.library.register_fake(f"autopar::{name}", shape, lib=_LIBRARY)


def _dual(name: str, backward: Callable[..., Tensor]) -> None:
    """``backward(grad, *arguments after the tensor)`` gives the gradient of the operator's tensor argument."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[1:]

    def formula(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (backward(grad, *ctx.arguments), *[None] * len(ctx.arguments))

    torch.library.register_autograd(f"autopar::{name}", formula, setup_context=setup_context, lib=_LIBRARY)


def _same(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty([size if d == dim else s for d, s in enumerate(x.shape)])


def _grown(x: Tensor, axis: str, ways: int, dim: int, outer: int, ratio: Sequence[int], length: int) -> Tensor:
    return _resized(x, dim, length)


def _cut(x: Tensor, axis: str, ways: int, dim: int, outer: int, ratio: Sequence[int], length: int) -> Tensor:
    return _resized(x, dim, -(-length // ways))


def _swapped(x: Tensor, axis: str, ways: int, source: Sequence[int], target: Sequence[int]) -> Tensor:
    return x.new_empty(
        [s * ways if d == source[0] else s // ways if d == target[0] else s for d, s in enumerate(x.shape)]
    )


for _name in ("enter", "release", "keep_first"):
    _define(_name, "Tensor x, str axis", _same)
_define("all_reduce", "Tensor x, str axis, str op", _same)
for _name in ("all_gather", "all_gather_invariant", "pad"):
    _define(_name, f"Tensor x, {_WHERE}", _grown)
for _name in ("reduce_scatter", "split", "split_replicated"):
    _define(_name, f"Tensor x, {_WHERE}", _cut)
_define("start_all_reduce", "Tensor x, str axis, str op", _same)
_define("start_all_gather", f"Tensor x, {_WHERE}", _grown)
_define("start_reduce_scatter", f"Tensor x, {_WHERE}", _cut)
_define("wait", "Tensor x, str axis", _same)
# source and target are (dim, outer, *ratio) of the two splits
_define("all_to_all", "Tensor x, str axis, int ways, int[] source, int[] target", _swapped)
_LIBRARY.define("axis_index(str axis) -> Tensor")
torch.library.register_fake("autopar::axis_index", lambda axis: torch.empty((), dtype=torch.int64), lib=_LIBRARY)
_dual("enter", lambda grad, axis: OPS.all_reduce(grad, axis, "sum"))
_dual("release", lambda grad, axis: OPS.keep_first(grad, axis))
_dual("keep_first", lambda grad, axis: grad)
_dual("all_reduce", lambda grad, axis, op: grad)
_dual("all_gather", lambda grad, *where: OPS.reduce_scatter(grad, *where))
_dual("all_gather_invariant", lambda grad, *where: OPS.split(grad, *where))
_dual("reduce_scatter", lambda grad, *where: OPS.all_gather(grad, *where))
_dual("split", lambda grad, *where: OPS.all_gather_invariant(grad, *where))
_dual("split_replicated", lambda grad, *where: OPS.pad(grad, *where))
_dual("pad", lambda grad, *where: OPS.split_replicated(grad, *where))
_dual("all_to_all", lambda grad, axis, ways, source, target: OPS.all_to_all(grad, axis, ways, target, source))

NAMES = (
    "enter",
    "release",
    "keep_first",
    "all_reduce",
    "all_gather",
    "all_gather_invariant",
    "pad",
    "reduce_scatter",
    "split",
    "split_replicated",
    "all_to_all",
    "axis_index",
    "start_all_reduce",
    "start_all_gather",
    "start_reduce_scatter",
    "wait",
)
TARGETS = {getattr(OPS, name).default: name for name in NAMES}  # operator -> its name
STARTED = {"start_all_reduce": "all_reduce", "start_all_gather": "all_gather", "start_reduce_scatter": "reduce_scatter"}
MOVING = ("all_reduce", "all_gather", "all_gather_invariant", "reduce_scatter", "all_to_all", *STARTED)  # send data


def moving(target: Any) -> str | None:
    """The collective that sends data in a node with this target, by the name that it has when it is not started early;
    None for everything else."""
    name = TARGETS.get(target)
    return STARTED.get(name, name) if name in MOVING else None  # type: ignore[arg-type]


def where(split: Split, axis: str, ways: int, length: int) -> tuple[str, int, int, int, list[int], int]:
    """The arguments behind the tensor of an operator that splits or joins a dim of ``length`` elements."""
    return (axis, ways, split.dim, split.outer, list(split.ratio), length)


def split_of(arguments: Sequence[Any]) -> Split:
    """The split in the ``where`` arguments (axis, ways, dim, outer, ratio, length) of a node."""
    return Split(arguments[2], arguments[3], tuple(arguments[4]))


def end_of(numbers: Sequence[int]) -> Split:
    """The split in ``source`` or ``target`` of an all_to_all."""
    return Split(numbers[0], numbers[1], tuple(numbers[2:]))
