"""Smaller sizes of a model that keep what matters to how it is split: what divides by what, and what does not.

    llama:llama_70b on pp=8,dp=4,tp=8     heads=64 kv_heads=8 width=8192 ff=28672 vocab=128256 layers=80
    -->  on pp=2,dp=2,tp=2                heads=4  kv_heads=2 width=32   ff=32    vocab=64     layers=4

Each axis of the mesh becomes one of 2 ranks. A size that an axis divides is a multiple of 2, one that it does not
divide is odd; heads, and heads that share keys and values, keep their relation to the ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.ir.batch import data_ways
from autopar.mesh import PIPELINE, SEQUENCE, Mesh
from autopar.plan import Plan
from autopar.schedules.named import stages_per_rank

WAYS = 2  # ranks of each axis
HEAD = 8  # elements of a head
LENGTH = 8  # tokens of a rank
MOST_DENSE = 3  # layers without experts before those with: the first, one between others, the last

HEADS = ("heads", "num_attention_heads", "n_head", "n_heads", "num_heads")
KEYS = ("kv_heads", "num_key_value_heads")
WIDTHS = ("width", "hidden_size", "n_embd", "d_model")
HEAD_SIZES = ("d_kv", "v_head_dim", "qk_nope_head_dim")
TURNED = ("head_dim",)  # the elements of a head that positions turn: of latent attention, a part of it
ROTARY = ("qk_rope_head_dim",)
RANKS = ("q_lora_rank", "kv_lora_rank")
INNER = ("ff", "intermediate_size", "n_inner", "d_ff", "ffn_dim", "moe_intermediate_size")
SHARED = ("shared_expert_intermediate_size",)
VOCABULARIES = ("vocab", "vocab_size")
LAYERS = ("layers", "num_hidden_layers", "n_layer", "num_layers")
EXPERTS = ("experts", "num_experts", "n_routed_experts", "num_local_experts")
CHOICES = ("chosen", "num_experts_per_tok", "top_k")
GROUPS, CHOSEN_GROUPS = ("n_group",), ("topk_group",)
DENSE = ("first_k_dense_replace",)


@dataclass(frozen=True)
class Reduced:
    """The same model with smaller sizes, on a smaller mesh, for the layers that compute. ``words``: of its sizes."""

    model: nn.Module
    mesh: Mesh
    example_inputs: Mapping[str, Any] | Sequence[Any]
    words: str = ""


def reduced(
    model: nn.Module, mesh: Mesh, plan: Plan, example_inputs: Mapping[str, Any] | Sequence[Any]
) -> Reduced | None:
    """``model`` built anew from its ``config`` with smaller sizes, with random weights, and a part of its inputs.

    None for a model whose config has no sizes that are known here, or that cannot be built from such a one.
    """
    config = getattr(model, "config", None)
    stages = stages_per_rank(plan.schedule, plan.virtual_stages)
    sizes = reduced_sizes(config, mesh, stages) if config is not None else {}
    if not sizes:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            small = type(model)(_with_sizes(config, sizes)).train(model.training)
    except Exception:  # a class of its own mind: it is built in another way, or these sizes do not fit it
        return None
    _take_dtypes(small, model)
    on = reduced_mesh(mesh)
    words = " ".join(f"{name}={size}" for name, size in sizes.items())
    return Reduced(small, on, _part(example_inputs, mesh, on, plan, _first(sizes, VOCABULARIES)), words)


def _take_dtypes(small: nn.Module, model: nn.Module) -> None:
    """Give ``small`` the dtypes of ``model``, which may have been cast after it was built."""
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, tensor in (*small.named_parameters(), *small.named_buffers()):
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))


def _with_sizes(config: Any, sizes: Mapping[str, int]) -> Any:
    if not hasattr(config, "to_dict"):
        return replace(config, **sizes)
    found = copy.deepcopy(config)
    for name, size in sizes.items():
        setattr(found, name, size)
    return found


def _part(
    inputs: Mapping[str, Any] | Sequence[Any], mesh: Mesh, on: Mesh, plan: Plan, vocabulary: int | None
) -> Mapping[str, Any] | Sequence[Any]:
    """Rows and tokens for the reduced mesh; whole numbers below the reduced vocabulary."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    lengths = [leaf.shape[1] for leaf in tensors if leaf.dim() == 2 and not leaf.is_floating_point()]
    rows = reduced_rows(len(tensors[0]), mesh) * min(plan.microbatches, 2 * on.size(PIPELINE)) if tensors else 0
    tokens = LENGTH * on.size(SEQUENCE)

    def part(leaf: Tensor) -> Tensor:
        if not leaf.dim() or len(leaf) != len(tensors[0]):
            return leaf
        leaf = leaf[torch.arange(rows) % len(leaf)]
        for dim in range(1, leaf.dim()):
            if lengths and leaf.shape[dim] == lengths[0]:
                leaf = leaf.index_select(dim, torch.arange(tokens) % lengths[0])
        whole = not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype is torch.bool)
        return torch.where(leaf >= 0, leaf % vocabulary, leaf) if whole and vocabulary else leaf

    return pytree.tree_map_only(Tensor, part, inputs)  # type: ignore[no-any-return]


def reduced_mesh(mesh: Mesh) -> Mesh:
    """The same axes, each of at most ``WAYS`` ranks."""
    return Mesh(**{axis: min(size, WAYS) for axis, size in mesh.axes})


def reduced_sizes(config: Any, mesh: Mesh, stages: int = 1) -> dict[str, Any]:
    """Overrides for the fields of a model's ``config``, for :func:`reduced_mesh` of ``mesh``.

    ``stages``: of a rank of the pipeline. {} for a config without a field that is known here.
    """
    known = {name: size for name in _names(config) if isinstance(size := getattr(config, name), int)}
    tp = mesh.size("tp")
    heads, keys = _heads(_first(known, HEADS), _first(known, KEYS), tp)
    data = [axis for axis in mesh.names if axis not in (PIPELINE, "tp")]
    ways = WAYS if mesh.size(PIPELINE) > 1 else 1
    experts = _scaled(_first(known, EXPERTS) or 0, [mesh.size("ep")], 2 * WAYS)
    dense = min(_first(known, DENSE) or 0, MOST_DENSE)
    wanted: dict[tuple[str, ...], int] = {
        HEADS: heads,
        KEYS: keys,
        WIDTHS: heads * HEAD,
        HEAD_SIZES: HEAD,
        TURNED: HEAD // 2 if _first(known, ROTARY) else HEAD,
        ROTARY: HEAD // 2,
        RANKS: 2 * HEAD,
        INNER: _scaled(_first(known, INNER) or 0, [tp, *map(mesh.size, data)], 4 * HEAD),
        SHARED: 4 * HEAD,
        VOCABULARIES: _scaled(_first(known, VOCABULARIES) or 0, [tp], 6 * HEAD),
        EXPERTS: experts,
        CHOICES: min(_first(known, CHOICES) or 2, 2),
        GROUPS: min(_first(known, GROUPS) or 1, 2),
        CHOSEN_GROUPS: 1,
        DENSE: dense,
        LAYERS: min(max(2, ways * stages) + dense, _first(known, LAYERS) or 0),
    }
    return {name: size for names, size in wanted.items() for name in names if name in known}


def reduced_rows(rows: int, mesh: Mesh) -> int:
    """Rows of a batch for the reduced mesh: as many for a data rank as there are, at most 2 where they divide."""
    ways = data_ways(mesh)
    return data_ways(reduced_mesh(mesh)) * min(max(1, rows // ways), 2) + (1 if rows % ways else 0)


def _names(config: Any) -> Iterable[str]:
    found = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    assert isinstance(found, Mapping)
    return list(found)


def _first(known: Mapping[str, int], names: Iterable[str]) -> int | None:
    return next((known[name] for name in names if name in known), None)


def _heads(heads: int | None, keys: int | None, tp: int) -> tuple[int, int]:
    """(heads, heads of keys) for 2 ranks, as these are to ``tp`` ranks."""
    heads = heads or 2
    keys = keys or heads
    ways = min(tp, WAYS)
    if tp > 1 and keys % tp and tp % keys == 0:  # fewer than ranks: each is on several
        return ways, 1
    small = ways if keys % tp == 0 else ways + 1
    small = max(small, 1 if keys == 1 else 2)
    return small * (1 if heads == keys else 2), small


def _scaled(size: int, ways: Iterable[int], usual: int) -> int:
    """``usual``, which 2 divides, where all of ``ways`` divide ``size``; else the next odd number."""
    return usual if all(size % each == 0 for each in ways) else usual + 1
