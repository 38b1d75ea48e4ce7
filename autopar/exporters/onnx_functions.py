"""Operators of autopar as ONNX functions: one node of the domain ``autopar.operators``, its body standard operators.

Who reads the file sees one node for a layer of experts; who runs it has its body. The body of an operator is its plain
form (:mod:`autopar.exporters.plain_operators`) for the sizes and options of a call, by torch's exporter, or a text
(:mod:`autopar.exporters.function_texts`). A function's name is that of the operator and a digest of what its body
depends on, so that equal calls, of all ranks too, share one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx
import onnx.inliner
import onnx_ir
import torch
from onnx import helper
from onnx_ir.passes import common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from autopar.exporters import function_texts
from autopar.exporters.onnx_notes import without_notes
from autopar.exporters.onnx_numbers import exact_numbers
from autopar.exporters.plain_operators import PLAIN
from autopar.exporters.rank_module import Kind
from autopar.ir.torch_export import export_as_run
from autopar.operators.attention_tile import MERGE, TILE
from autopar.operators.bags import EMBEDDING_BAGS
from autopar.operators.capacity import PICK_ROWS, SEAT_ROWS
from autopar.operators.experts import EXPERT_LINEAR
from autopar.operators.masked_attention import masked_attention
from autopar.operators.recurrent import RECURRENT_LAYER
from autopar.operators.routing import ROUTE_ROWS

aten = torch.ops.aten

DOMAIN, VERSION = "autopar.operators", 1
DIGITS = 8
TRACED = {  # operators whose bodies are their plain forms -> their names in ONNX
    TILE: "AttentionTile",
    MERGE: "MergeTiles",
    masked_attention: "MaskedAttention",
    EMBEDDING_BAGS: "EmbeddingBags",
    ROUTE_ROWS: "RouteRows",
    SEAT_ROWS: "SeatRows",
    PICK_ROWS: "PickRows",
}
FITTING = (torch.float32, torch.float16)  # the dtypes of ONNX Runtime's own recurrent layers

Body = Callable[[int], onnx.FunctionProto]  # of an opset of ONNX


@dataclass(frozen=True)
class _Like:
    """Stands for a tensor among the arguments of a call."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Functions:
    """The functions that a model calls; :attr:`forms` makes the calls while the model is traced."""

    def __init__(self) -> None:
        self._bodies: dict[str, Body] = {}

    @property
    def forms(self) -> dict[Any, Callable[..., Any]]:
        """Operator -> what stands for it: called with the types of its results, then with its arguments."""
        return {
            EXPERT_LINEAR: self._expert_linear,
            RECURRENT_LAYER: self._recurrent_layer,
            **{target: partial(self._traced, target) for target in TRACED},
            aten.searchsorted.Tensor: searched,
            aten.histc.default: counted,
            **{target: partial(parted, target) for target in (aten.split.Tensor, aten.split_with_sizes.default)},
        }

    def add_to(self, model: onnx.ModelProto, opset: int) -> None:
        """Give ``model`` the functions that it calls."""
        model.functions.extend(body(opset) for body in self._bodies.values())
        if self._bodies and all(entry.domain != DOMAIN for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))

    # ------------------------------------------------------------ calls

    def _expert_linear(self, kinds: Sequence[Kind], rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        self._bodies["ExpertLinear"] = partial(_parsed, function_texts.EXPERT_LINEAR)
        result = rows.dtype, (ids.shape[0], weight.shape[2])  # how many rows may be known at run time only
        return _call("ExpertLinear", [rows, weight, ids], [result])[0]

    def _recurrent_layer(
        self, kinds: Sequence[Kind], x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str
    ) -> tuple[Tensor, ...]:
        own = x.dtype in FITTING and len(weights) in (2, 4)
        options = (cell, len(states), len(weights), states[-1].shape[1], own)
        name = _name("RecurrentLayer", repr(options))
        self._bodies[name] = partial(_parsed, function_texts.recurrent_layer(name, *options))
        return tuple(_call(name, [x, *states, *weights], kinds))

    def _traced(self, target: Any, kinds: Sequence[Kind], *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not all(isinstance(size, int) for tensor in tensors for size in tensor.shape):
            return PLAIN[target](*args, **kwargs)  # a body is for sizes that are known
        like = [_Like(leaf.dtype, tuple(leaf.shape)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        name = _name(TRACED[target], repr((like, str(spec))))
        self._bodies[name] = partial(_plain_body, name, PLAIN[target], like, spec)
        found = _call(name, tensors, kinds)
        return found[0] if len(found) == 1 else tuple(found)


def _name(operator: str, options: str) -> str:
    return f"{operator}_{hashlib.sha256(options.encode()).hexdigest()[:DIGITS]}"


def _call(name: str, inputs: Sequence[Tensor], kinds: Sequence[Kind]) -> list[Tensor]:
    """A node in the trace, with results of ``kinds``."""
    found = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}", inputs, dtypes=[dtype for dtype, _ in kinds], shapes=[shape for _, shape in kinds],
        version=VERSION,
    )  # fmt: skip
    return list(found)


# ---------------------------------------------------------------- operators that torch.onnx does not know


def searched(
    kinds: Sequence[Kind], ordered: Tensor, x: Tensor, *, out_int32: bool = False, right: bool = False,
    side: str | None = None, sorter: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As ``torch.searchsorted``: before each element of x are so many of ``ordered``."""
    if sorter is not None:
        ordered = ordered.gather(-1, sorter)
    here, there = x.unsqueeze(-1), ordered.unsqueeze(-2)
    before = here >= there if right or side == "right" else here > there
    return before.sum(-1).to(torch.int32 if out_int32 else torch.int64)


def counted(kinds: Sequence[Kind], x: Tensor, bins: int = 100, least: float = 0, most: float = 0) -> Tensor:
    """As ``torch.histc`` between two bounds that differ; the last bin has what is at the upper one too."""
    place = ((x - least) * (bins / (most - least))).floor().clamp(max=bins - 1)
    inside = (x >= least) & (x <= most)
    hits = (place.unsqueeze(-1) == torch.arange(bins, dtype=x.dtype)) & inside.unsqueeze(-1)
    return hits.flatten(0, -2).sum(0).to(x.dtype)


def parted(target: Any, kinds: Sequence[Kind], x: Tensor, sizes: Any, dim: int = 0) -> list[Tensor]:
    """As ``torch.split``, by slices: a sequence of tensors in bfloat16 is no type of ONNX."""
    if not isinstance(x.shape[dim], int):
        return list(target(x, sizes, dim))
    found, start = [], 0
    for _, shape in kinds:
        found.append(x.narrow(dim, start, shape[dim]))
        start += shape[dim]
    return found


# ---------------------------------------------------------------- bodies


def _parsed(text: str, opset: int) -> onnx.FunctionProto:
    return onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{text}')


class _Plain(nn.Module):
    """A call of ``form`` with all arguments but tensors, which ``forward`` takes."""

    def __init__(self, form: Callable[..., Any], leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self._form, self._leaves, self._spec = form, leaves, spec

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, _Like) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return tuple(pytree.tree_leaves(self._form(*args, **kwargs)))


def _plain_body(
    name: str, form: Callable[..., Any], leaves: Sequence[Any], spec: pytree.TreeSpec, opset: int
) -> onnx.FunctionProto:
    mode = FakeTensorMode()
    with mode:
        tensors = tuple(torch.empty(leaf.shape, dtype=leaf.dtype) for leaf in leaves if isinstance(leaf, _Like))
    with torch.no_grad(), without_notes():
        exported = export_as_run(_Plain(form, leaves, spec), tensors)
        made = torch.onnx.export(
            exported, dynamo=True, optimize=False, opset_version=opset, verbose=False,
            custom_translation_table=exact_numbers(opset),
        )  # fmt: skip
    assert made is not None
    model = common.NameFixPass()(common.RemoveUnusedNodesPass()(made.model).model).model
    return _function(name, onnx.inliner.inline_local_functions(onnx_ir.to_proto(model)), opset)


def _function(name: str, model: onnx.ModelProto, opset: int) -> onnx.FunctionProto:
    """The graph of ``model`` as a function: its tensors are constants, its results are results of nodes."""
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    results = [helper.make_node("Identity", [x.name], [f"result_{i}"]) for i, x in enumerate(model.graph.output)]
    return helper.make_function(
        DOMAIN,
        name,
        [value.name for value in model.graph.input],
        [node.output[0] for node in results],
        [*constants, *model.graph.node, *results],
        [helper.make_opsetid("", opset)],
    )
