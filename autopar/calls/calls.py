"""One call of a model: its arguments in one order, and the key that is equal for calls that run the same program."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.errors import TraceError
from autopar.ir.batch import input_dims
from autopar.mesh import Mesh
from autopar.plan import Plan

NOT_POSITIONAL = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


@dataclass(slots=True)
class Call:
    """Arguments by name in the order of the signature (``args`` is empty unless it takes ``*args``), and flat.

    Nobody changes one; to be frozen would cost 1 us of each call.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    key: tuple[Hashable, ...]
    rows_of_all: bool = False  # with ``Plan(inputs="local")``: the rows are those of all ranks

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def is_split(self) -> bool:
        """Whether a tensor is a DTensor, as another parallel module returns them."""
        return not _SIMPLE.issuperset(map(type, self.leaves)) and any(isinstance(leaf, DTensor) for leaf in self.leaves)

    @property
    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """:attr:`tensors`, each with the name of its argument; that of a positional one is ""."""
        arguments = [*(("", arg) for arg in self.args), *self.kwargs.items()]
        leaves = [(name, leaf) for name, arg in arguments for leaf in pytree.tree_leaves(arg)]
        return [(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor)]


_SIMPLE = frozenset((Tensor, int, float, bool, str, type(None)))  # leaves, and none is a DTensor


class Signature:
    """How ``forward`` may be called: ``model(x, y)``, ``model(x, labels=y)`` and ``model(labels=y, x=x)`` are one."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._signature = inspect.signature(forward)
        parameters = self._signature.parameters.values()
        self._named = not any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters)
        self._names = [p.name for p in parameters if p.kind not in NOT_POSITIONAL]
        self._rank = {name: position for position, name in enumerate(self._signature.parameters)}
        self._orders: dict[Hashable, _Order] = {}

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Raises TypeError where ``forward`` itself would."""
        given = (len(args), *kwargs)
        order = self._orders.get(given)
        if order is None:
            order = self._orders[given] = self._order(args, kwargs)
        leaves: list[Any] = [*args, *kwargs.values()]
        if not order.is_kept:
            leaves = [leaves[position] for position in order.positions]
        args, kwargs = tuple(leaves[: order.unnamed]), dict(zip(order.names, leaves[order.unnamed :]))
        spec: Hashable = order.spec
        if not _SIMPLE.issuperset(map(type, leaves)) and not all(map(_is_simple, leaves)):
            leaves, spec = pytree.tree_flatten((args, kwargs))
        return Call(args, kwargs, leaves, (spec, *[kind_of(leaf) for leaf in leaves]))

    def _order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Order:
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{error}\nWay out: the arguments of forward{self._signature}.") from None
        unnamed = 0 if self._named else len(args)
        places = [*zip([*self._names[: len(args)]] if self._named else (), range(len(args)))]
        places += zip(kwargs, range(len(args), len(args) + len(kwargs)))
        last = len(self._rank)
        places.sort(key=lambda pair: (self._rank.get(pair[0], last), pair[0]) if self._named else (0, pair[0]))
        positions = (*range(unnamed), *(position for _, position in places))
        return _Order(unnamed, tuple(name for name, _ in places), positions)


@dataclass
class _Order:
    """Where the arguments of one way to call stand: ``unnamed`` ones as they are, then those of ``names``, in order.

    ``positions``: of each, in the call.
    """

    unnamed: int
    names: tuple[str, ...]
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        self.is_kept = self.positions == tuple(range(len(self.positions)))
        self.spec = (self.unnamed, *self.names)


def _is_simple(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, (Tensor, int, float, str))


def kind_of(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        facts = leaf.shape, leaf.dtype, leaf.requires_grad
        return facts if type(leaf) is Tensor else (*facts, class_of(leaf))
    try:
        hash(leaf)
    except TypeError:
        raise TraceError(
            f"an argument of type {type(leaf).__name__} is neither a tensor nor a fixed value\n"
            "Way out: pass tensors, numbers, strings, or lists and dicts of them."
        ) from None
    return type(leaf), leaf


def class_of(tensor: Tensor) -> type | None:
    """What forward may ask for with ``isinstance``: of parameters and of users' classes."""
    kind = type(tensor)
    return kind if isinstance(tensor, nn.Parameter) or kind.__module__.partition(".")[0] != "torch" else None


def global_call(call: Call, mesh: Mesh, plan: Plan) -> Call:
    """The call of the unmodified model.

    With ``Plan(inputs="local")`` ``call`` has one rank's part of its batch and sequence dims, and these are as many
    times as long as there are parts; rows that are of all ranks already stay.
    """
    if plan.inputs != "local":
        return call
    dims = iter(input_dims(call.named_tensors, plan))

    def whole(leaf: Tensor) -> Tensor:
        found = leaf.detach()
        of = next(dims)
        for dim, ways in (replace(of, batch=None) if call.rows_of_all else of).parts(mesh).items():
            found = torch.cat([found] * ways, dim)
        return found.requires_grad_(leaf.requires_grad)

    args, kwargs = pytree.tree_map_only(Tensor, whole, (call.args, call.kwargs))
    return Call(args, kwargs, pytree.tree_leaves((args, kwargs)), call.key)


def gathered(call: Call, plan: Plan) -> Call:
    """``call`` with whole tensors in place of DTensors, from which gradients flow back; collective.

    Raises ValueError where a rank is to pass a part of the batch by itself.
    """
    if plan.inputs == "local":
        raise ValueError(
            "an input is a DTensor, the output of another parallel module, and Plan(inputs='local') takes parts\n"
            "Way out: give that module Plan(outputs='full') and pass this rank's rows, or leave out inputs='local'."
        )
    args, kwargs = pytree.tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), (call.args, call.kwargs))
    return Call(args, kwargs, pytree.tree_leaves((args, kwargs)), call.key)


def ordinary(call: Call) -> Call:
    """``call`` with copies of the tensors that were made in ``inference_mode``, which no other mode may save."""
    if not any(tensor.is_inference() for tensor in call.tensors):
        return call
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.clone(), (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs, leaves=pytree.tree_leaves((args, kwargs)))


def resized(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows_of_all: bool) -> Call:
    """``call`` with arguments of other sizes."""
    leaves = pytree.tree_leaves((args, kwargs))
    return Call(args, kwargs, leaves, (call.key[0], *map(kind_of, leaves)), rows_of_all)


def shapes(tensors: Sequence[Tensor]) -> str:
    """``[4, 16] [4, 16]``, for messages."""
    return " ".join(str(list(tensor.shape)) for tensor in tensors)
