"""What torch's DTensor makes of a call whose operands lie on two ranks in a given way: nothing runs, nothing is sent.

The only file that uses DTensor's private parts (its sharding propagator, torch 2.13): a composite operator is taken
apart by torch, and each operator below it is put to the propagator, as DTensor's own decompositions are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._decompositions import DecompShardingStrategy
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.ir import layout
from autopar.ir.layout import REPLICATED, Placement, Split
from autopar.verification.rule_check import Sample

WAYS = 2
MESH = DeviceMesh("cpu", torch.arange(WAYS), _init_backend=False, _rank=0)
MASKED = "_MaskPartial"  # a sum of rows of a table, with zeros where a rank lacks the row: nothing is sent for it
PROPAGATOR = DTensor._op_dispatcher.sharding_propagator
TABLES = (PROPAGATOR.op_to_rules, PROPAGATOR.op_strategy_funcs, PROPAGATOR.op_single_dim_strategy_funcs)
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class NoRule(Exception):
    """DTensor has no rule for an operator."""


class Redistributes(Exception):
    """DTensor would first move operands, or refuses these placements."""


@dataclass(frozen=True)
class Answer:
    """``outputs``: a placement for each output tensor; ``level``: the operators that DTensor was asked about."""

    outputs: tuple[Placement | str, ...]
    level: tuple[str, ...]


def ask(target: Any, sample: Sample, placements: Sequence[Placement]) -> Answer:
    """What comes out when each operand lies as ``placements`` says. Raises NoRule or Redistributes."""
    waiting = iter(placements)
    with FakeTensorMode(), torch.no_grad():
        tracking = _Tracking()

        def operand(tensor: Tensor) -> Tensor:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            tracking.bind(fake, _theirs(next(waiting)))
            return fake

        args, kwargs = pytree.tree_map_only(Tensor, operand, (sample.args, sample.kwargs))
        with tracking:
            result = _kernel_of(target, args, kwargs)(*args, **kwargs)
    outputs = [item for item in pytree.tree_leaves(result) if isinstance(item, Tensor)]
    outputs = outputs[:1] if target is ATTENTION else outputs  # the kernel's others are for its backward
    return Answer(tuple(_ours(tracking.specs[id(item)].placements[0]) for item in outputs), tuple(tracking.level))


def _kernel_of(target: Any, args: Any, kwargs: Any) -> Any:
    """Attention without a mask is put to DTensor as a kernel that it knows: on a CPU, torch takes it apart."""
    plain = target is ATTENTION and len(args) == 3 and not kwargs and all(tensor.dim() == 4 for tensor in args)
    return torch.ops.aten._scaled_dot_product_flash_attention.default if plain else target


def known() -> Iterator[Any]:
    """Every functional operator that DTensor has a rule for."""
    for target in {target for table in TABLES for target in table}:
        if not target._schema.is_mutable and not any(argument.is_out for argument in target._schema.arguments):
            yield target


class _Tracking(TorchDispatchMode):
    """Notes how the result of each operator lies on the mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[int, DTensorSpec] = {}
        self.alive: list[Tensor] = []  # keeps the ids unique
        self.level: dict[str, None] = {}

    def bind(self, tensor: Tensor, placement: Any) -> None:
        meta = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)
        self.specs[id(tensor)] = DTensorSpec(MESH, (placement,), meta)
        self.alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a question about a device or a layout
            return func(*args, **(kwargs or {}))
        if not any(func in table for table in TABLES) and DecompShardingStrategy.has_decomp(func):
            with self:  # what it would do too, after trying every placement
                return decomposition_table.get(func, func.decompose)(*args, **(kwargs or {}))
        given = pytree.tree_map_only(Tensor, self._spec, (tuple(args), dict(kwargs or {})))
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (list, tuple)) else [result]
        specs: list[DTensorSpec | None] = [None] * len(results)
        if any(isinstance(leaf, DTensorSpec) for leaf in pytree.tree_leaves(given, is_leaf=_is_spec)):
            self.level[str(func)] = None
            specs = self._propagated(func, *given)
        for item, spec in zip(results, specs, strict=True):
            if isinstance(item, Tensor):
                self.bind(item, spec.placements[0] if spec else Replicate())
        return result

    def _spec(self, tensor: Tensor) -> DTensorSpec:
        if id(tensor) not in self.specs:  # a number that the operator made into a tensor
            self.bind(tensor, Replicate())
        return self.specs[id(tensor)]

    def _propagated(self, func: Any, args: Any, kwargs: Any) -> list[DTensorSpec | None]:
        infos = (PROPAGATOR.op_to_schema_info, PROPAGATOR.op_to_schema_info_for_single_dim_strategy)
        schema = OpSchema(func, args, kwargs, next((info[func] for info in infos if func in info), None))
        try:
            found = PROPAGATOR.propagate_op_sharding_non_cached(schema)
        except NotImplementedError as problem:
            raise NoRule(str(func)) from problem
        except Exception as problem:  # it says no in many ways
            raise Redistributes(f"{func}: {str(problem).splitlines()[0] if str(problem) else problem!r}") from problem
        wanted = found.redistribute_schema
        if wanted is not None:  # it is there too where only sizes among the arguments are cut
            before, after = ([spec.placements[0] for spec in each.args_spec] for each in (schema, wanted))
            if any(a != b and type(b).__name__ != MASKED for a, b in zip(before, after, strict=True)):
                raise Redistributes(f"{func}: {before} become {after}")
        specs = found.output_spec
        return list(specs) if isinstance(specs, (list, tuple)) else [specs]


def _is_spec(item: Any) -> bool:
    return isinstance(item, DTensorSpec)


def _theirs(placement: Placement) -> Any:
    if isinstance(placement, Split):
        assert placement.contiguous, placement
        return Shard(placement.dim)
    return Partial(placement.op) if isinstance(placement, layout.Partial) else Replicate()


def _ours(placement: Any) -> Placement | str:
    if type(placement) is Shard:
        return Split(placement.dim)
    if isinstance(placement, Replicate):
        return REPLICATED
    if type(placement) is Partial or type(placement).__name__ == MASKED:
        return layout.Partial(placement.reduce_op)
    return type(placement).__name__
