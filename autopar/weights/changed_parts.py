"""What torch does to parts of a parallel module between its calls, of which the module itself is not told.

``model.head.float()`` changes dtypes, so programs are made anew; marks of parameters stay, and stages that do not have
them know. ``torch.func.functional_call`` puts other tensors in the places of parameters, for which a program has no
gradient: refused. On a pipeline ``prune`` and parametrisations find no parameter on the stages that do not have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakMethod, ref

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, stateless

from autopar.dtensors.dtensor import HELD
from autopar.errors import InvariantError
from autopar.weights.identity import kept
from autopar.weights.parameters import Weights

Cast = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Parallel:
    """Of a parallel module, which these lead to: it would never go."""

    its_weights: ReferenceType[Weights]
    is_pipelined: bool
    clear_programs: WeakMethod[Callable[[], None]]

    @property
    def weights(self) -> Weights:
        found = self.its_weights()
        assert found is not None, "the weights of a module that is there"
        return found

    def clear(self) -> None:
        clear = self.clear_programs()
        if clear is not None:
            clear()


_parallel: WeakKeyDictionary[nn.Module, _Parallel] = WeakKeyDictionary()
_applying: list[nn.Module] = []


def watch_parts(module: nn.Module, weights: Weights, is_pipelined: bool, clear: Callable[[], None]) -> None:
    """From now on do what is to be done where a part of the parallel ``module`` is changed; ``clear``: its programs."""
    _parallel[module] = _Parallel(ref(weights), is_pipelined, WeakMethod(clear))
    _install()


@cache
def _install() -> None:
    module, methods, parts = nn.Module, prune.BasePruningMethod, parametrize
    module._apply = _watched(nn.Module._apply)  # type: ignore[method-assign]
    stateless._reparametrize_module = _with_own(stateless._reparametrize_module)  # type: ignore[attr-defined]
    usual = methods.apply.__func__  # type: ignore[attr-defined]
    methods.apply = classmethod(_refused(usual, "prune", 1))  # type: ignore[assignment, method-assign]
    parts.register_parametrization = _refused(parts.register_parametrization, "parametrize", 0)


def _around(module: nn.Module) -> list[_Parallel]:
    """The parallel modules that have a module in common with ``module``."""
    own = {id(one) for one in module.modules()} if _parallel else set()
    return [found for root, found in _parallel.items() if any(id(one) in own for one in root.modules())]


def _watched(usual: Any) -> Any:
    """``module.to(...)``, ``float()``, ..."""

    def _apply(self: nn.Module, fn: Cast, recurse: bool = True) -> nn.Module:
        parallel = [] if _applying else _around(self)
        if not parallel:
            _applying.append(self)
            try:
                found: nn.Module = usual(self, fn, recurse)
            finally:
                _applying.pop()
            return found
        _applying.append(self)
        try:
            with kept([parameter for parameter in self.parameters() if HELD in vars(parameter)]):
                usual(self, fn, recurse)
        finally:
            _applying.pop()
        for one in parallel:
            _cast_absent(one.weights, self, fn)
            one.clear()
        return self

    return _apply


def _cast_absent(weights: Weights, module: nn.Module, fn: Cast) -> None:
    tables = {id(table) for one in module.modules() for table in (one._parameters, one._buffers)}
    for missing in weights.absent:
        if id(missing.table) in tables:
            with torch.no_grad():
                dtype = fn(torch.empty(0, dtype=missing.outline.dtype)).dtype
            missing.outline.data = missing.outline.data.to(dtype)


def _with_own(usual: Any) -> Any:
    @contextmanager
    def reparametrized(module: nn.Module, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Iterator[None]:
        for path, one in module.named_modules() if _parallel else ():
            if one in _parallel:
                _check_own(one, f"{path}." if path else "", tensors)
        with usual(module, tensors, *args, **kwargs):
            yield

    return reparametrized


def _check_own(parallel: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    own: dict[str, Tensor] = dict(parallel.named_parameters(prefix.rstrip("."), remove_duplicate=False))
    own.update(parallel.named_buffers(prefix.rstrip("."), remove_duplicate=False))
    other = next((name for name, held in own.items() if tensors.get(name, held) is not held), None)
    if other is not None:
        raise InvariantError(
            f"functional_call puts another tensor in the place of '{other}' of a parallel module: a program has "
            "gradients of the parameters that it holds alone\n"
            "Way out: functional_call around the plain model, within a small nn.Module that is parallelised; or write "
            "to the parameter: with torch.no_grad(): parameter.copy_(tensor)."
        )


def _refused(usual: Any, what: str, place: int) -> Any:
    """``usual``, whose argument at ``place`` is a module."""

    def call(*args: Any, **kwargs: Any) -> Any:
        module = args[place] if len(args) > place else kwargs.get("module")
        if isinstance(module, nn.Module) and any(one.is_pipelined for one in _around(module)):
            raise InvariantError(
                f"torch.nn.utils.{what} of a {type(module).__name__} of a parallel module on pp: only the stages that "
                "compute with its parameters have them\n"
                f"Way out: {what} before autopar.parallelize, or a mesh without pp."
            )
        return usual(*args, **kwargs)

    return call
