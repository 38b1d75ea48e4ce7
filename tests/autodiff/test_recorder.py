"""What is recorded computes what ran, in functional operators and without superfluous ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from autopar.autodiff.recorder import Recorder, fake_mode, functional_form
from autopar.errors import InvariantError
from autopar.frontend.numerics import run_graph
from autopar.ir import collectives as comm
from autopar.ir.node import values
from autopar.ir.operator_facts import is_factory, is_random, is_view

aten = torch.ops.aten

Function = Callable[[Tensor, Tensor], Tensor]


def recorded(function: Function, x: Tensor, y: Tensor) -> fx.Graph:
    graph = fx.Graph()
    with fake_mode() as mode, Recorder(graph) as recorder:
        with recorder.paused():
            fakes = [mode.from_tensor(tensor) for tensor in (x, y)]
        for name, fake in zip("xy", fakes):
            recorder.placeholder(name, fake)
        graph.output((recorder.node_of(function(*fakes)),))
    graph.eliminate_dead_code()
    return graph


def operators(graph: fx.Graph) -> list[str]:
    return [node.target._schema.name.split("::")[1] for node in graph.nodes if node.op == "call_function"]


def write_to_slice(x: Tensor, y: Tensor) -> Tensor:
    z = x + 1
    z[1] = y[0]
    return z * 2


def write_through_two_views(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    left, right = z[:, :2], z.t()
    left.add_(y[:, :2])
    right[0].mul_(3.0)
    left.copy_(left * 2)
    return z + right.t()


def write_to_parts(x: Tensor, y: Tensor) -> Tensor:
    """As torch's own cells do: what is written to a part of an unsafe split is not seen in the whole."""
    whole = x * y
    parts = torch.unsafe_chunk(whole, 2, 1)
    first, second, third = torch.unsafe_split_with_sizes(y + 1, (1, 2, 1), 1)
    return torch.cat([parts[0].sigmoid_(), parts[1].tanh_() + second.mul_(2.0)], 1) * first.exp_() * third


def view_taken_before_a_write(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1.5
    row = z[2]
    z.add_(y)
    return row + z[2]


def accumulate(x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(4, 4, dtype=x.dtype)
    for i in range(3):
        total.index_put_((torch.arange(4), torch.arange(4)), y[i], accumulate=True)
    return total.masked_fill_(total > 1, 0.5)


def gradient_of_indexing(x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    picked = x[torch.arange(3), torch.arange(3)] * y[0, :3] + x.gather(1, torch.zeros(4, 1, dtype=torch.int64)).sum()
    return torch.autograd.grad(picked.sum(), x)[0]


def complex_product(x: Tensor, y: Tensor) -> Tensor:
    a, b = torch.view_as_complex(x.reshape(4, 2, 2)), torch.view_as_complex(y.reshape(4, 2, 2))
    return torch.view_as_real(a * b.conj() + a.conj()).flatten(1)


def several_results(x: Tensor, y: Tensor) -> Tensor:
    top, where = x.topk(2, 1)
    first, second = torch.split(y, 2, 1)
    return top * first + second.gather(1, where % 2)


def powers(x: Tensor, y: Tensor) -> Tensor:
    """In place the number is the exponent of ``pow_.Scalar``; of ``pow.Scalar`` it is the base."""
    return (x * 1).pow_(3) + (y.abs() + 1).pow_(x) + (y.abs() + 2).float_power_(2).ldexp_(torch.ones(4).double())


FUNCTIONS: tuple[Function, ...] = (
    write_to_slice,
    write_through_two_views,
    write_to_parts,
    view_taken_before_a_write,
    accumulate,
    gradient_of_indexing,
    complex_product,
    several_results,
    powers,
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_graph_computes_what_ran(function: Function) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    graph = recorded(function, x, y)
    (found,) = run_graph(graph, [x, y])
    assert torch.equal(found, function(x.clone(), y.clone()))
    assert not any(
        node.target._schema.is_mutable for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    )


@pytest.mark.parametrize(
    ("function", "expected"),
    (
        (lambda x, y: x.t().t() + y, ["add"]),
        (lambda x, y: x.detach().view(16).view(4, 4).expand(4, 4) + y, ["add"]),
        (lambda x, y: x.view(2, 8).view(8, 2), ["view"]),
        (lambda x, y: x.t() @ y + x.t() @ y, ["t", "mm", "add"]),
        (lambda x, y: x.reshape(16)[None] * y.reshape(16)[None], ["view", "unsqueeze", "view", "unsqueeze", "mul"]),
        (lambda x, y: x**1.0 + y, ["add"]),
        (lambda x, y: comm.OPS.enter(x, "tp").t().t() + comm.OPS.release(y, "tp"), ["add"]),
        (lambda x, y: comm.OPS.all_reduce(x, "tp", "sum") + comm.OPS.all_reduce(x, "tp", "sum"), ["all_reduce", "add"]),
        (lambda x, y: torch.rand_like(x) + torch.rand_like(x), ["rand_like", "rand_like", "add"]),
        (lambda x, y: x.to(torch.float16).to(torch.float16), ["_to_copy"]),
        (lambda x, y: (x + 1) * (x + 1.0), ["add", "add", "mul"]),
    ),
)
def test_no_more_operators_than_needed(function: Function, expected: list[str]) -> None:
    graph = recorded(function, torch.randn(4, 4), torch.randn(4, 4))
    assert operators(graph) == expected


def test_backward_makes_free_things_again_and_other_things_anew() -> None:
    graph = fx.Graph()
    with fake_mode(), Recorder(graph) as recorder:
        with recorder.paused():
            x = torch.empty(4, 4)
        recorder.placeholder("x", x)
        view, work = recorder.node_of(x.t()), recorder.node_of(x.exp())
        recorder.backward()
        assert recorder.node_of(x.t()) is view
        assert recorder.node_of(x.exp()) is not work
    assert work in recorder.forward_nodes


def test_types_are_recorded() -> None:
    graph = recorded(lambda x, y: torch.topk(x, 2)[0].half(), torch.randn(4, 4), torch.randn(4, 4))
    types = {node.name: [(v.dtype, v.shape) for v in values(node)] for node in graph.nodes if node.op != "output"}
    assert types["topk"] == [(torch.float32, (4, 2)), (torch.int64, (4, 2))]
    assert types["to_copy"] == [(torch.float16, (4, 2))]


def test_a_number_is_kept_and_a_table_is_refused() -> None:
    graph = recorded(lambda x, y: x * torch.tensor(3.0), torch.randn(4, 4), torch.randn(4, 4))
    assert operators(graph) == ["full", "mul"]
    with pytest.raises(InvariantError, match=r"constant of shape \[2\] .*make it an input"):
        recorded(lambda x, y: x[:, :2] * torch.tensor([3.0, 4.0]), torch.randn(4, 4), torch.randn(4, 4))


def test_kinds_of_operators() -> None:
    assert is_view(aten.t.default) and is_view(aten.split.Tensor) and not is_view(aten.add.Tensor)
    assert not is_view(aten.add_.Tensor)
    assert is_factory(aten.full.default) and is_factory(comm.OPS.axis_index.default)
    assert not is_factory(aten.rand.default) and not is_factory(aten.ones_like.default)
    assert is_random(aten.bernoulli.p) and not is_random(aten.relu.default)


def test_the_form_that_writes_nothing_takes_the_same_arguments() -> None:
    """Of all operators of torch's own that write into their first argument: some names mean others there."""
    found = 0
    for name in torch._C._dispatch_get_all_op_names():
        library, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if library == "aten" and base.endswith("_") and not base.endswith("__"):
            target = getattr(getattr(aten, base), overload or "default")
            try:
                plain = functional_form(target)
            except InvariantError:
                continue
            found += 1
            types = [[str(argument.type) for argument in one._schema.arguments] for one in (target, plain)]
            assert types[0] == types[1], (target, plain)
    assert found > 200
