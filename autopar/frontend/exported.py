"""The exported graph of a model, and what is tried where its sizes or branches depend on the values in tensors.

In this order, until a graph becomes a program: the model as it is; with an answer for "was any row selected", which one
graph serves whatever it is; with the branches of the example, guarded; with the sizes of the example, guarded too.
"""

from __future__ import annotations

import io
import operator
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopar.errors import TraceError
from autopar.frontend.block_copies import leave_out_partners, write_out_blocks, writes_within_blocks
from autopar.frontend.capture import fake_like, gradients_kept, inline_no_grad, is_data_dependent, only_plain_outputs
from autopar.frontend.equal_blocks import EqualBlocks, Seen
from autopar.frontend.grouped_products import GroupedProducts
from autopar.frontend.kept_composites import decomposed
from autopar.frontend.last_trace import forget_last_trace
from autopar.frontend.looked_at import Replayed, looks_of, value_guard
from autopar.frontend.short_decomposition import decomposed_without_copies
from autopar.frontend.stack_frames import frames_made_once
from autopar.frontend.torch_layers import without_fast_paths
from autopar.frontend.uncompiled_graphs import compiled_when_called
from autopar.ir.operator_facts import is_composite, is_overload, writes
from autopar.ir.program import Program
from autopar.ir.torch_export import export_as_run
from autopar.ir.value_guards import Look
from autopar.observation.observation import add_value_guard
from autopar.observation.source_lines import user_line
from autopar.selections.any_branches import AnyBranches
from autopar.selections.empty_selections import Selections, differ_by_selections_only, leave_out_rounds
from autopar.selections.equal_conditions import EqualConditions
from autopar.selections.hit_loops import HitLoops
from autopar.selections.ragged import UnknownSize

aten = torch.ops.aten

Build = Callable[[ExportedProgram], Program]
Found = tuple[Program, list[str]]  # with notes
Call = tuple[tuple[Any, ...], dict[str, Any]]

WHOLE = {  # composite operators that decomposing would keep, or that canonicalize brings into the same form
    aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default, aten.layer_norm.default,
    aten.rms_norm.default, aten.cross_entropy_loss.default, aten.softmax.int, aten.log_softmax.int, aten.pad.default,
    aten.conv2d.default, aten.reshape.default, aten.contiguous.default, aten.dropout.default, aten.to.dtype,
    aten.to.dtype_layout, aten.to.device, aten.type_as.default, aten.__and__.Tensor, aten.diff.default,
}  # fmt: skip


def traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: FakeTensorMode | None, seen: Seen,
    build: Build,
) -> Found:  # fmt: skip
    """What ``build`` makes of the exported graph of ``model(*args, **kwargs)``, and notes; ``mode``: with fake inputs.

    ``seen``: what forward has read and changed so far, for blocks that need not be traced.

    Raises TraceError, or whatever torch raises where the model is no single graph.
    """
    given = args, kwargs
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if mode is not None:
        leaves = [fake_like(mode, leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(_distinct(leaves), spec)
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):  # torch prints the graph so far, and it may only be the first try
            found = _first_try(model, (args, kwargs), seen, build)
    except Exception as problem:
        if not _depends_on_values(problem):
            raise
        with redirect_stderr(printed):
            return _of_values(model, (args, kwargs), given, problem, build)
    sys.stderr.write(printed.getvalue())
    return found


def _first_try(model: nn.Module, call: Call, seen: Seen, build: Build) -> Found:
    """With two of the blocks that are alike traced, if there are such; else, or where that fails, with all of them."""
    blocks = EqualBlocks(model, seen)
    try:
        exported, notes = _functional(model, *call, nullcontext(), blocks)
        return build(exported), notes
    except Exception as problem:
        if not blocks.marked or _depends_on_values(problem):
            raise
        return _built(model, call, nullcontext(), build)


def _depends_on_values(problem: Exception) -> bool:
    return isinstance(problem, UnknownSize) or is_data_dependent(problem)


def _of_values(model: nn.Module, call: Call, given: Call, problem: Exception, build: Build) -> Found:
    """The program of a model whose branches or sizes depend on values; ``given``: the call as the user passed it."""
    refusal = problem
    if is_data_dependent(problem):
        try:
            return _without_branches(model, call, problem, build)
        except Exception as other:
            refusal = other
    for sizes in (False, True):
        looks = looks_of(model, *given, refusal, sizes=sizes)
        if not looks:
            continue
        try:
            found = _of_looks(model, call, looks, sizes, build)
        except Exception as other:
            if sizes or not _depends_on_values(other):
                raise
            refusal = other
            continue
        add_value_guard(value_guard(model, *call, looks, sizes=sizes))
        return found
    raise refusal


def _of_looks(model: nn.Module, call: Call, looks: Sequence[Look], sizes: bool, build: Build) -> Found:
    """The program of a model whose Python sees what it has seen on the example."""
    try:
        return _built(model, call, Replayed(looks, sizes=sizes), build)
    except Exception as problem:
        if sizes or not is_data_dependent(problem):
            raise
        return _without_branches(model, call, problem, build, looks)


def _without_branches(
    model: nn.Module, call: Call, problem: Exception, build: Build, looks: Sequence[Look] = ()
) -> Found:
    """The program of a model that asks whether rows were selected; ``problem`` is raised for one that asks more."""
    found = []
    runs = [(Selections(empty=empty), HitLoops(empty=empty), AnyBranches(empty=empty)) for empty in (False, True)]
    for modes in runs:
        try:
            found.append(_functional(model, *call, _all_of(*modes, Replayed(looks, sizes=False))))
        except Exception as other:
            raise problem if is_data_dependent(other) else other from None
    (some, notes), (none, _) = found
    (selections, _, asked), (empty, _, asked_of_empty) = runs
    alike = asked.questions == asked_of_empty.questions and leave_out_rounds(selections, empty)
    if not alike or not differ_by_selections_only(some.graph, none.graph):
        raise TraceError(
            f"{type(model).__name__} cannot be traced: where a condition selects no row, it does more than leave out "
            f"what it would do with them\n  at {user_line(traceback.extract_tb(problem.__traceback__))}\n"
            "Way out: where nothing is selected, do nothing; the same code with no rows adds nothing either."
        )
    return build(some), notes


@contextmanager
def _all_of(*modes: TorchFunctionMode) -> Iterator[None]:
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


def _built(model: nn.Module, call: Call, selections: AbstractContextManager[Any], build: Build) -> Found:
    exported, notes = _functional(model, *call, selections)
    return build(exported), notes


def _functional(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], selections: AbstractContextManager[Any],
    blocks: EqualBlocks | None = None,
) -> tuple[ExportedProgram, list[str]]:  # fmt: skip
    """The exported model, without operators that write into their arguments, and notes."""
    with blocks.known() if blocks else nullcontext(), frames_made_once(), compiled_when_called():
        with (
            without_fast_paths(), GroupedProducts(), gradients_kept() as notes, only_plain_outputs(model, notes),
            EqualConditions(), selections, blocks.stamping() if blocks else nullcontext(),
        ):  # fmt: skip
            exported = export_as_run(model, args, kwargs)
        inline_no_grad(exported.graph_module)
        is_short = blocks is not None and writes_within_blocks(exported.graph)
        proven = dict[int, int]()
        if is_short and not _is_decomposed(exported):
            proven = leave_out_partners(exported)
            exported = decomposed_without_copies(exported, decomposed, proven.values())
        if blocks:
            write_out_blocks(exported, proven)
        exported = exported if is_short or _is_decomposed(exported) else decomposed(exported)
    forget_last_trace()
    return exported, notes


def _is_decomposed(exported: ExportedProgram) -> bool:
    """Whether there is nothing to decompose, which saves half of the time."""
    return all(map(_is_plain, exported.graph.nodes))


def _is_plain(node: fx.Node) -> bool:
    """Whether ``node`` writes into nothing, holds no graph, and is no composite except those programs keep whole."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op != "get_attr" or not node.users
    if not is_overload(node.target) or writes(node.target):
        return False
    return node.target in WHOLE or not is_composite(node.target)


def _distinct(leaves: list[Any]) -> list[Any]:
    """Copies of tensors that are passed more than once: export would make them one input."""
    seen: set[int] = set()
    distinct = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().clone().requires_grad_(leaf.requires_grad) if id(leaf) in seen else leaf
            seen.add(id(leaf))
        distinct.append(leaf)
    return distinct
