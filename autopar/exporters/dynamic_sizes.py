"""The sizes of a family in exported programs: which dims of inputs are dynamic, and all other numbers by these.

A size ``s`` of a family holds for ``least`` to ``most`` in steps. What an exporter declares is a whole number ``k``
with ``s = step * k + rest``, so that whatever is a whole number at each size of the family (``s/4``) is a polynomial in
such k with whole coefficients: ``torch.export`` then proves all that it asks of the shapes, and guards nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from autopar.errors import ExportError
from autopar.families.family import Family
from autopar.families.forms import symbol
from autopar.ir.node import traced_value
from autopar.ir.sizes import is_expression

MOST_STEP = 4096
FEWEST = 2  # torch.export takes a size of 1 for a constant


@dataclass(frozen=True)
class Root:
    """The size ``name`` is ``step * k + rest`` for k from ``least`` to ``most``."""

    name: str
    step: int
    rest: int
    least: int
    most: int

    @property
    def symbol(self) -> sympy.Symbol:
        return symbol(f"{self.name}_root")

    @property
    def value(self) -> sympy.Expr:
        return self.step * self.symbol + self.rest

    @property
    def dim(self) -> Any:
        """For ``dynamic_shapes`` of ``torch.export``; its name is that of the size where it is the size."""
        name = self.name if self.step == 1 and not self.rest else f"{self.name}_by_{self.step}"
        return Dim(name, min=self.least, max=self.most)

    def to_json(self) -> dict[str, int]:
        least, most = (self.step * end + self.rest for end in (self.least, self.most))
        return {"least": least, "most": most, "step": self.step}


class DynamicSizes:
    """Those of ``family``.

    Attributes:
        roots: by the name of a size that is dynamic.
        known: the value of each root, while a module is traced.

    Raises ExportError for a family that leaves out sizes in its ranges, has too few of them, or rounds some.
    """

    def __init__(self, family: Family) -> None:
        if family.exceptions:
            raise ExportError(
                f"the family is for {family}: a file has no way to refuse the other sizes in between\n"
                "Way out: a file for each size: export(family.member({'b': ..., 's': ...}), ...)."
            )
        rounded = [name for name in family.rounded if any(symbol(name) in form.free_symbols for form in family.forms)]
        if rounded:
            raise ExportError(
                f"the family has sizes that are rounded, {rounded[0]}, for which a file has no dynamic dim\n"
                "Way out: compile the family for lengths that are multiples of what divides them; or a file for each "
                "size: export(family.member({'b': ..., 's': ...}), ...)."
            )
        self.family = family
        self.roots = {name: root for name in family.ranges if (root := _root(family, name)) is not None}
        self.known: dict[sympy.Symbol, Any] = {}
        self._by_size = {symbol(name): root.value for name, root in self.roots.items()}
        self._by_root = {root.symbol: (symbol(name) - root.rest) / root.step for name, root in self.roots.items()}
        self._terms: dict[Any, tuple[list[tuple[int, tuple[tuple[sympy.Symbol, int], ...]]], str]] = {}
        self._dims = {name: root.dim for name, root in self.roots.items()}

    # ------------------------------------------------------------ inputs

    def in_roots(self, size: Any) -> Any:
        """A size as a polynomial in the roots."""
        return sympy.expand(size.subs(self._by_size)) if is_expression(size) else size

    def dim_of(self, size: Any, where: str) -> Any:
        """What ``torch.export`` is told of a dim of an input; None for one that never changes. Raises ExportError."""
        size = self.in_roots(size)
        if not is_expression(size) or size.is_Integer:
            return None
        used = [root for root in self.roots.values() if root.symbol in size.free_symbols]
        if len(used) != 1 or not size.is_polynomial() or sympy.degree(size, used[0].symbol) != 1:
            raise ExportError(
                f"{where} has {size} elements: torch.export has no such dim\n"
                "Way out: export a program of fixed sizes (compile_program) for this mesh."
            )
        factor, rest = (int(part) for part in sympy.Poly(size, used[0].symbol).all_coeffs())
        dim = self._dims[used[0].name]
        dim = factor * dim if factor != 1 else dim
        return dim + rest if rest else dim

    def example(self, size: Any) -> int:
        """A size of an input while it is traced: large, so that none is 1, and each size another one."""
        at = {root.symbol: root.most - place for place, root in enumerate(self.roots.values())}
        found = self.in_roots(size)
        return int(found.subs(at)) if is_expression(found) else int(found)

    def bind(self, inputs: Sequence[tuple[Sequence[Any], Tensor]]) -> None:
        """Know the roots from the shapes of ``inputs``, each with its sizes as expressions. Raises ExportError."""
        self.known = {}
        for root in self.roots.values():
            places = (
                (expression, tensor.shape[dim])
                for sizes, tensor in inputs
                for dim, size in enumerate(sizes)
                if is_expression(expression := self.in_roots(size)) and expression.free_symbols == {root.symbol}
            )
            found = next(places, None)
            if found is None:
                continue
            factor, rest = (int(part) for part in sympy.Poly(found[0], root.symbol).all_coeffs())
            self.known[root.symbol] = (found[1] - rest) // factor

    def words(self, size: Any) -> int | str:
        """A size for people, in the names of the family: ``s/2``."""
        found = self.in_roots(size)
        if not is_expression(found) or found.is_Integer:
            return int(found)
        return str(sympy.expand(found.subs(self._by_root, simultaneous=True))).replace(" ", "")

    def named(self, exported: ExportedProgram, shapes: Sequence[Sequence[Any]]) -> dict[str, sympy.Expr]:
        """The symbols of ``exported``, whose inputs have ``shapes``, as sizes of the family."""
        found: dict[str, sympy.Expr] = {}
        nodes = {node.name: node for node in exported.graph.nodes}
        names = exported.graph_signature.user_inputs
        for name, shape in zip(names, shapes, strict=True):
            for dim, size in zip(traced_value(nodes[name]).shape, shape, strict=True):
                own = dim.node.expr if isinstance(dim, torch.SymInt) else None
                if own is None or len(own.free_symbols) != 1:
                    continue
                (one,) = own.free_symbols
                solved = sympy.solve(own - self.in_roots(size), one)
                found[str(one)] = solved[0].subs(self._by_root, simultaneous=True)
        return found

    # ------------------------------------------------------------ numbers

    def number(self, item: Any) -> Any:
        """``item``, an argument or a shape, with numbers of the trace in the places of expressions."""
        if is_expression(item):
            return self._value(item)
        if isinstance(item, (tuple, list)):
            return type(item)([self.number(each) for each in item])
        if isinstance(item, dict):
            return {key: self.number(each) for key, each in item.items()}
        if isinstance(item, slice):
            return slice(*(self.number(each) for each in (item.start, item.stop, item.step)))
        return item

    def _value(self, form: sympy.Expr) -> Any:
        if form not in self._terms:
            self._terms[form] = self._read(form)
        terms, shape = self._terms[form]
        total = sum(
            factor * math.prod(self._known(root) ** power for root, power in powers) for factor, powers in terms
        )
        return 1.0 / total if shape == "inverse" else float(total) if shape == "float" else total

    def _read(self, form: sympy.Expr) -> Any:
        shape = ""
        if form.has(sympy.Float):
            form, shape = sympy.nsimplify(form, rational=True), "float"
        found = self.in_roots(form)
        if not found.is_polynomial():
            found, shape = self.in_roots(sympy.expand(1 / form)), "inverse"
        symbols = sorted(found.free_symbols, key=str)
        if not symbols:
            return [(int(found), ())], shape
        terms = sympy.Poly(found, *symbols).terms()
        return [
            (int(factor), tuple((root, power) for root, power in zip(symbols, powers) if power))
            for powers, factor in terms
        ], shape

    def _known(self, root: sympy.Symbol) -> Any:
        if root not in self.known:
            raise ExportError(
                f"no input of this file says how large {str(root).removesuffix('_root')} is\n"
                "Way out: export a program of fixed sizes (compile_program) for this mesh."
            )
        return self.known[root]

    def to_json(self) -> dict[str, dict[str, int]]:
        """For the manifest: the sizes that may be had, by their names."""
        fixed = {name: each.least for name, each in self.family.ranges.items() if name not in self.roots}
        return {name: root.to_json() for name, root in self.roots.items()} | {
            name: {"least": size, "most": size, "step": 1} for name, size in fixed.items()
        }


def _root(family: Family, name: str) -> Root | None:
    """None for a size that never changes. Raises ExportError where too few sizes are left."""
    known = family.ranges[name]
    if known.least == known.most:
        return None
    step = known.step * _denominator(family, name)
    rest = known.first % step
    least, most = -(-(known.least - rest) // step), (known.most - rest) // step
    if rest == 0:
        least = max(least, FEWEST)
    if most <= least or step > MOST_STEP:
        raise ExportError(
            f"{name} = {known}: in steps of {step}, from {least * step + rest} on, too few are left to be dynamic\n"
            "Way out: a family of more sizes; or a program of fixed sizes (compile_program)."
        )
    return Root(name, step, rest, least, most)


def _denominator(family: Family, name: str) -> int:
    """What steps of the size have to be multiplied by, so that all numbers are whole at all of its values."""
    steps = {
        symbol(each): symbol(each) * known.step + known.first % known.step
        for each, known in family.ranges.items()
        if known.least < known.most
    }
    own, found = symbol(name), 1
    for form in family.forms:
        whole = form if form.is_polynomial() else 1 / form
        if own not in whole.free_symbols:
            continue
        taken = sympy.expand(sympy.nsimplify(whole, rational=True).subs(steps, simultaneous=True))
        for powers, factor in sympy.Poly(taken, own, *(taken.free_symbols - {own})).terms():
            found = math.lcm(found, int(factor.q)) if powers[0] else found
    return found
