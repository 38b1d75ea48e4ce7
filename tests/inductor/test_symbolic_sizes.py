"""Functions of tensors of many sizes, up to what Inductor gets; the compiled ones are in tests/end_to_end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from autopar.codegen.python import compile_source, emit_sized
from autopar.codegen.regions import regions_of, with_regions
from autopar.compiler import compile_program
from autopar.families.family import Point, fit
from autopar.families.forms import symbol
from autopar.inductor import symbolic_sizes
from autopar.inductor.symbolic_sizes import ForSizes, compiled_for_sizes, order_of, value_at
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.models import gpt
from autopar.plan import Plan

B, S = symbol("b"), symbol("s")


def test_expressions_at_whole_numbers() -> None:
    at = {B: 4, S: 6}
    assert [value_at(each, at) for each in (7, B * S, B / 2, S + 1, B * S / 8)] == [7, 24, 2, 7, 3]
    assert value_at(1 / (B * S), at) == 1 / 24


def test_orders_in_memory_do_not_depend_on_the_length() -> None:
    def views(length: int) -> list[Tensor]:
        x = torch.empty(2, length, 12)
        heads = x.view(2, length, 3, 4).transpose(1, 2)
        return [x, heads, x[..., 4:8], x.transpose(0, 2), x.new_empty(2, 1, 12).expand(2, length, 12), x[:1]]

    assert [order_of(x) for x in views(5)] == [order_of(x) for x in views(9)]
    assert order_of(torch.empty(2, 8, 3)[:, :5]) is None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What Inductor would get; it runs as it is, without the symbols."""
    found: list[fx.GraphModule] = []

    class Nothing:
        current_callable = None

        def __init__(self, graph: fx.GraphModule, inputs: Any) -> None:
            found.append(graph)

        def __call__(self, given: list[Any]) -> Any:
            return found[-1](*given)

    inductor = symbolic_sizes.inductor_of()
    monkeypatch.setattr(symbolic_sizes, "inductor_of", lambda: _With(inductor, Nothing))
    return found


class _With:
    def __init__(self, inductor: Any, compiler: Any) -> None:
        self.decompositions, self.compile = inductor.decompositions, compiler


def compiled(function: Any, operands: list[Tensor], shapes: list[Any], sizes: list[Any], b: int, s: int) -> ForSizes:
    return compiled_for_sizes(function, operands, shapes, sizes, {B: b, S: s}, lambda graph: None)


def test_one_graph_serves_all_sizes(graphs: list[fx.GraphModule]) -> None:
    def function(given: list[Tensor], sizes: tuple[Any, ...]) -> tuple[Tensor, ...]:
        x, row, labels = given
        rows, less = sizes
        shifted = torch.constant_pad_nd(labels, [0, 1], -100.0)[:, 1:]
        return torch.reshape(torch.addcmul(x, x, row, value=0.5), [rows, 3]) / rows, shifted, x[:, :less]

    def batch(b: int, s: int) -> list[Tensor]:
        x = torch.randn(b, s, 3, dtype=torch.float64)
        return [x, torch.randn(b, s, 1, dtype=torch.float64), torch.arange(b * s).reshape(b, s)]

    made = compiled(function, batch(4, 6), [[B, S, 3], [B, S, 1], [B, S]], [B * S, S - 1], 4, 6)
    for b, s in ((4, 6), (2, 9), (7, 3)):
        given = batch(b, s)
        orders = tuple(order for x in given if (order := order_of(x)) is not None)
        assert made.fits(orders, (b, s)) and not made.fits(orders[:2], (b, s))
        rest = list(given)
        for one, other in zip(made.at((b, s))(rest), function(given, (b * s, s - 1)), strict=True):
            assert one.shape == other.shape and (one - other).abs().max() <= 1e-15
        assert not rest, "tensors are freed inside"
    assert len(graphs) == 1


def test_what_holds_for_one_size_is_not_given_others(graphs: list[fx.GraphModule]) -> None:
    def function(given: list[Tensor], sizes: tuple[Any, ...]) -> tuple[Tensor, ...]:
        (x,) = given
        return (x * 2 if x.shape[0] == 4 else x * 3,)

    x = torch.ones(4, 6)
    made = compiled(function, [x], [[B, S]], [], 4, 6)
    orders = (order_of(x),)
    assert made.fits(orders, (4, 9)) and not made.fits(orders, (5, 6))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depends on the length"):
        compiled(function, [torch.ones(4, 8)[:, :6]], [[B, S]], [], 4, 6)


def test_the_python_of_a_family_gives_its_regions_their_sizes() -> None:
    def program(length: int, rows: int) -> Program:
        torch.manual_seed(0)
        model = gpt.build(vocab=32, context=64, width=16, heads=2, layers=2)
        found = compile_program(
            model, Mesh(), Plan(check_numerics=False), (), gpt.example_batch(model.config, rows, length)
        )
        assert isinstance(found, Program)
        return found

    points = [Point({"b": rows, "s": length}, program(length, rows)) for length, rows in ((8, 4), (16, 4), (24, 6))]
    family = fit(points)
    template = family.template
    assert isinstance(template, Program)
    regional = with_regions(template.required_role.forward, template.mesh, lambda target: "autopar" not in str(target))
    source, sizes = emit_sized("forward", regional, template)
    assert callable(compile_source(source, "forward"))
    for region in regions_of(regional):
        own = sizes[region.__name__]
        assert own[: len(region.symbols)] == region.symbols and set(own) <= set(sizes["forward"])
        assert f"def {region.__name__}(comm, inputs{', sizes' if own else ''}):" in source
    assert any(region.symbols for region in regions_of(regional))
    numbers = family.numbers({"b": 4, "s": 16})
    assert numbers is not None and numbers[B] == 4 and numbers[S] == 16 and set(sizes["forward"]) <= set(numbers)
