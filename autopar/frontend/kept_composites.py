"""``ExportedProgram.run_decompositions({})``, without what torch prepares anew in each call.

While a graph is decomposed torch keeps composite operators that it was not told to decompose: it lists those of all
libraries, and gives each of about 500 a kernel for each of 20 dispatch keys, which it takes away again afterwards. Both
are the same in each call of a process, and take a third of the time in which a small model is compiled.

This is the one file that knows ``_collect_all_valid_cia_ops`` and ``_override_composite_implicit_decomp`` of
``torch.export.exported_program``, ``py_kernels`` and ``_dispatch_cache`` of an operator, and torch's table of rules for
fake tensors. Where a torch lacks one of them, it prepares as it always did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.export import ExportedProgram, exported_program

from autopar.ir.torch_export import whatever_allows_tf32

Kernels = dict[Any, Any]  # dispatch key -> what the operator calls for it
Override = Callable[[dict[Any, Any]], AbstractContextManager[None]]

_LIST, _OVERRIDE = "_collect_all_valid_cia_ops", "_override_composite_implicit_decomp"


@dataclass(frozen=True)
class _Prepared:
    """What torch's override changes for ``given``."""

    given: dict[Any, Any]  # operator -> how it is decomposed, or that it is kept
    before: dict[Any, Kernels]
    during: dict[Any, Kernels]
    rules: dict[Any, Any]  # those for fake tensors

    def is_for(self, given: dict[Any, Any]) -> bool:
        return self.given == given and all(op.py_kernels == kernels for op, kernels in self.before.items())


_listed: tuple[tuple[str, ...], set[Any]] | None = None
_prepared: _Prepared | None = None


def decomposed(exported: ExportedProgram) -> ExportedProgram:
    """``exported`` in operators that write into nothing, as torch decomposes it with an empty table.

    Composites that neither write nor alias stay; see ``frontend/exported.py`` for why they are wanted.
    """
    lists, override, rules = (
        getattr(exported_program, _LIST, None), getattr(exported_program, _OVERRIDE, None), _rules_of_fake_tensors(),
    )  # fmt: skip
    if lists is None or override is None or rules is None:
        return _run(exported)
    with (
        mock.patch.object(exported_program, _LIST, lambda: _composites(lists)),
        mock.patch.object(exported_program, _OVERRIDE, lambda given: _overridden(given, override, rules)),
    ):
        return _run(exported)


def _run(exported: ExportedProgram) -> ExportedProgram:
    with whatever_allows_tf32():
        found: ExportedProgram = exported.run_decompositions({})
    return found


def _composites(lists: Callable[[], set[Any]]) -> set[Any]:
    """What ``lists`` says, asked again when a library has registered a composite or is gone."""
    global _listed
    registered = tuple(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
    if _listed is None or _listed[0] != registered:
        _listed = registered, lists()
    return _listed[1]


@contextmanager
def _overridden(given: dict[Any, Any], override: Override, rules: dict[Any, Any]) -> Iterator[None]:
    """``override(given)``; from the second call on, the kernels that the first one made."""
    global _prepared
    if _prepared is None or not _prepared.is_for(given):
        before, rules_before = {op: dict(op.py_kernels) for op in given}, dict(rules)
        try:
            with override(given):
                during = {op: dict(op.py_kernels) for op in given}
                added = {op: rules[op] for op in given if op in rules}
                yield
        finally:
            rules.update(rules_before)  # torch takes away those that were there already
        _prepared = _Prepared(dict(given), before, during, added)
        return
    prepared, rules_before = _prepared, dict(rules)
    _set_kernels(prepared.during)
    rules.update(prepared.rules)
    try:
        yield
    finally:
        _set_kernels(prepared.before)
        for op in prepared.rules:
            rules.pop(op, None)  # torch's own, within this one, may have taken it away
        rules.update(rules_before)


def _set_kernels(kernels: dict[Any, Kernels]) -> None:
    for op, own in kernels.items():
        op.py_kernels.clear()
        op.py_kernels.update(own)
        op._dispatch_cache.clear()


def _rules_of_fake_tensors() -> dict[Any, Any] | None:
    try:
        from torch._subclasses.fake_impls import op_implementations_dict
    except ImportError:
        return None
    return op_implementations_dict
