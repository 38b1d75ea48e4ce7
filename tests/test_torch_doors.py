"""What autopar uses of torch's private parts does what it is used for; these tests say so first when torch changes."""

from __future__ import annotations

import copy
import inspect
import operator
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed import _state_dict_utils
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dispatch import OpDispatcher
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
from autopar import Mesh, Plan
from autopar.autodiff.autograd import accumulating, below_autograd, is_watched, take_saved
from autopar.cache.launch_store import launch_store
from autopar.codegen.python import compile_source, emit
from autopar.codegen.torch_bindings import BINDINGS
from autopar.communication.connect import connect
from autopar.communication.functional_collectives import start_maximum
from autopar.compiler import compile_program
from autopar.dtensors.dtensor import local_of, of_local, spec_of
from autopar.dtensors.piecewise import PiecewiseDTensor, dtensor
from autopar.dtensors.placements import Pieces, plain
from autopar.frontend.past_modes import past_modes
from autopar.ir.fast_graph import copied
from autopar.ir.node import output_node
from autopar.ir.operator_facts import runnable
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.models import cnn, gpt, llama, t5
from autopar.runtime.rank_graphs import passed_on
from autopar.runtime.rank_program import sharing
from tests.against_one_process import difference, float64, whole
from tests.launch import run_ranks

aten = torch.ops.aten

# ---------------------------------------------------------------- bindings


class Calls(TorchDispatchMode):
    """The operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.targets.append(func)
        return func(*args, **(kwargs or {}))


class Alone:
    device = torch.device("cpu")


@pytest.mark.parametrize("module", [gpt, llama, t5, cnn], ids=lambda module: module.__name__)
def test_bindings_call_the_operators_of_the_graph(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = module.build()
    batch = module.example_batch(model.config, 2)
    program = compile_program(model, Mesh(), Plan(check_numerics=False), (), batch)
    role = program.required_role
    assert role.backward is not None
    tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | dict(program.constants) | batch
    inputs = [tensors[entry.target].detach() for _, entry in program.placeholders(*InputKind)]
    count, runs = len(program.outputs), []
    for table in (BINDINGS, {}):
        monkeypatch.setattr("autopar.codegen.python.BINDINGS", table)
        forward = compile_source(emit({"forward": role.forward}, program), "forward")
        backward = compile_source(emit({"backward": role.backward}, program), "backward")
        with below_autograd(), Calls() as calls:
            found = forward(Alone(), list(inputs))
            grads = backward(Alone(), [*found[count:], *(torch.ones_like(found[i]) for i in role.differentiable)])
        runs.append(((*found[:count], *grads), calls.targets))
    for ours, theirs in zip(runs[0][0], runs[1][0]):
        assert torch.equal(ours, theirs)
    ours, theirs = ([runnable(target) for target in run[1]] for run in runs)
    assert ours == theirs, "the same operators in the same order"


def test_every_binding_exists() -> None:
    for target, name in BINDINGS.items():
        assert callable(eval(name, {"torch": torch})), target


# ---------------------------------------------------------------- DTensor


def take_dtensors_apart() -> list[bool]:
    connection = connect(Mesh(tp=2), 60.0, torch.device("cpu"))
    full, thirds = torch.arange(24.0).reshape(12, 2), Pieces(0, [(0, 2), (4, 2), (8, 2), (2, 2), (6, 2), (10, 2)])
    local = torch.cat([block.chunk(2)[connection.rank] for block in full.chunk(3)])
    made = dtensor(local, connection.device_mesh, [thirds], full.shape)
    again = of_local(local, spec_of(made))
    optimized = nn.Parameter(dtensor(local.clone(), connection.device_mesh, [thirds], full.shape))
    optimized.grad = of_local(torch.ones_like(local), spec_of(optimized))
    expected = nn.Parameter(full.clone())
    expected.grad = torch.ones_like(full)
    norms = [torch.nn.utils.clip_grad_norm_([p], 1.0) for p in (optimized, expected)]
    for parameter in (optimized, expected):
        torch.optim.AdamW([parameter]).step()
    return [
        local_of(made).data_ptr() == local.data_ptr(),
        local_of(local) is local,
        made.stride() == full.stride() and made.shape == full.shape,
        torch.equal(made.full_tensor(), full),
        type(again) is PiecewiseDTensor and torch.equal(again.full_tensor(), full) and not again.requires_grad,
        plain([thirds, Replicate()]) == (Shard(0), Replicate()),
        torch.equal(made.redistribute(placements=[Replicate()]).to_local(), full),
        torch.allclose(whole(norms[0]), norms[1]),
        torch.allclose(optimized.full_tensor(), expected),
    ]


def test_dtensors() -> None:
    for checks in run_ranks(take_dtensors_apart, 2):
        assert all(checks), checks


def ask_the_dispatcher() -> dict[str, bool]:
    """What ``dtensor_habits``, ``initialising``, ``torch_on_stages`` and ``start_maximum`` rely on."""
    connection = connect(Mesh(), 60.0, torch.device("cpu"))
    handlers = DTensor._op_dispatcher._custom_op_handlers
    rules = inspect.signature(OpDispatcher._propagate_op_sharding_dispatch_slow_path)  # type: ignore[attr-defined]
    held = dtensor(torch.ones(2), connection.device_mesh, [Replicate()], (2,))
    seen: list[Any] = []

    def zero(target: Any, args: Any, kwargs: Any) -> Any:
        seen.append(target)
        del handlers[target]  # then torch does it by itself
        try:
            return target(*args, **kwargs)
        finally:
            handlers[target] = zero

    handlers[aten.erf_.default] = zero
    held.erf_()
    del handlers[aten.erf_.default]
    held.erf_()
    before = held._version
    held.data.add_(1)
    numbers = torch.tensor([3, 4])
    start_maximum(numbers, dist.group.WORLD).wait()  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        norms: list[int] = []
        patch.setattr(clip_grad, "_get_total_norm", lambda found, *rest, **more: norms.append(1) or torch.ones(()))
        clipped = torch.ones(2, requires_grad=True)
        clipped.grad = torch.ones(2)
        torch.nn.utils.clip_grad_norm_([clipped], 1.0)
    return {
        "a handler is asked, and may leave it to torch": seen == [aten.erf_.default] and held.shape == (2,),
        "numbers are asked for by one operator": aten._local_scalar_dense.default in handlers,
        "a rule is asked for by one method": list(rules.parameters)[1:5] == ["op_call", "args", "kwargs", "op_info"],
        "views by strides are asked for by one operator": aten.as_strided.default in handlers,
        "scalers unscale by one operator": aten._amp_foreach_non_finite_check_and_unscale_.default in handlers,
        "data shares the counter of changes": held._version > before,
        "data is a property of tensors": hasattr(torch._C.TensorBase.data, "__set__"),  # type: ignore[attr-defined]
        "clipping takes one norm": norms == [1],
        "a backend reduces past the dispatcher": numbers.tolist() == [3, 4],
        "checkpoints spread whole tensors": callable(_state_dict_utils._distribute_tensors),
        "and distribute them": callable(_state_dict_utils.distribute_tensor),  # type: ignore[attr-defined]
    }


def test_handlers_of_dtensors_and_helpers_of_torch() -> None:
    found = run_ranks(ask_the_dispatcher, 1)[0]
    assert all(found.values()), [name for name, right in found.items() if not right]


class Told(TorchFunctionMode):
    """What modes are told of."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_reading_past_modes() -> None:
    tensor = torch.ones(2, 3)
    with Told() as told:
        with past_modes():
            assert (tensor.shape, tensor.stride()) == ((2, 3), (3, 1))
        assert not told.functions
        assert tensor.stride() and told.functions


def test_copies_of_graphs_are_what_torch_makes() -> None:
    program = compile_program(
        nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), Mesh(dp=2), None, (torch.ones(4, 4),)
    )
    for graph in program.graphs.values():
        mine, its = copied(graph), copy.deepcopy(graph)
        mine.lint()
        assert str(mine) == str(its) and len(mine.nodes) == len(its.nodes)
        more = [made.create_node("call_function", operator.add, (1, 2), name="add").name for made in (mine, its)]
        assert more[0] == more[1]
        found = [[len(made.find_nodes(op=node.op, target=node.target)) for node in graph.nodes] for made in (mine, its)]
        assert found[0] == found[1]


# ---------------------------------------------------------------- autograd


class Probe(torch.autograd.Function):
    seen: list[Any] = []

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(tensors[0] * 2)
        return tensors[0].sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        Probe.seen.append((accumulating(ctx), [tensor.shape for tensor in take_saved(ctx)]))
        return tuple(torch.ones(2) for _ in ctx.next_functions)


def test_what_a_backward_pass_is_for() -> None:
    leaf, frozen, other = torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2, requires_grad=True)
    Probe.seen.clear()
    Probe.apply(leaf, frozen, other).backward()
    Probe.apply(leaf, frozen, other).backward(inputs=[other])
    torch.autograd.grad(Probe.apply(leaf, frozen, other), [leaf])
    shapes = [torch.Size([2])]
    assert Probe.seen == [([True, False, True], shapes), ([False, False, True], shapes), ([False] * 3, shapes)]


def test_saved_tensors_are_let_go_of_once() -> None:
    leaf = torch.ones(2, requires_grad=True)
    result = Probe.apply(leaf)
    result.backward(retain_graph=True)
    result.backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()


class Forgetful(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x * 2)
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        saved = take_saved(ctx)
        first = weakref.ref(saved[0])
        saved.clear()
        assert first() is None, "autograd still holds the activation, so memory would not fall during backward"
        return torch.ones(2)


def test_saved_tensors_die_during_backward() -> None:
    Forgetful.apply(torch.ones(2, requires_grad=True)).backward()


def test_hooks_are_noticed() -> None:
    leaf = torch.ones(2, requires_grad=True)
    assert not is_watched(leaf)
    handle = leaf.register_hook(lambda grad: None)
    assert is_watched(leaf)
    handle.remove()
    leaf.register_post_accumulate_grad_hook(lambda tensor: None)
    assert is_watched(leaf)


def test_below_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    with below_autograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_results_that_share_memory() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    shared, alone = (graph.call_function(target, (x,)) for target in (aten.neg.default, aten.exp.default))
    views = [graph.call_function(aten.t.default, (node,)) for node in (shared, alone)]
    parts = graph.call_function(aten.split.Tensor, (alone, 1))
    rows = [graph.call_function(operator.getitem, (parts, i)) for i in (0, 1)]
    given = graph.call_function(operator.getitem, (graph.call_function(aten.split.Tensor, (x, 1)), 0))
    bucket = [graph.call_function(aten.slice.Tensor, (alone, 0, i, i + 1)) for i in (0, 1)]
    for returned, expected in (
        ((shared, *views, x), [0, 1, 3]),
        ((*rows, given), [2]),
        ((*bucket, shared), []),
        ((*bucket, alone), [0, 1, 2]),
    ):
        graph.output(returned)
        function = compile_source(emit({"f": graph}, Program(graph, Mesh(), Plan(), (), ())), "f")
        found = function(Alone(), [torch.ones(2, 2)])
        assert sharing(passed_on(graph), found) == expected
        graph.erase_node(output_node(graph))


class SharedGradients(nn.Module):
    """Two parameters with one and the same gradient, and one whose gradient is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.a + self.b).tanh() + self.c * x).sum()


def accumulate() -> list[bool]:
    model = float64(SharedGradients)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(), Plan(check_numerics=False))
    x = torch.randn(4)
    kept = x.clone()
    checks = []
    parameters = list(parallel.parameters())
    for _ in range(2):
        parallel(x).backward()
        reference(x).backward()
        for parameter in parameters:  # in place, as clipping does
            parameter.grad.mul_(0.5)
        for parameter in reference.parameters():
            parameter.grad.mul_(0.5)
        pairs = zip(parameters, reference.parameters())
        checks.append(all(difference(p.grad, q.grad) < 1e-14 for p, q in pairs))
    checks.append(torch.equal(x, kept))
    # the gradients themselves
    grads = torch.autograd.grad(parallel(x), parameters)
    wanted = torch.autograd.grad(reference(x), list(reference.parameters()))
    checks.append(all(difference(g, w) < 1e-14 for g, w in zip(grads, wanted)))
    # only some of them
    parallel.zero_grad()
    parallel(x).backward(inputs=[parallel.b])
    checks.append(parallel.a.grad is None and parallel.c.grad is None and parallel.b.grad is not None)
    # hooks
    seen: list[str] = []
    parallel.a.register_post_accumulate_grad_hook(lambda p: seen.append("after"))
    parallel.b.register_hook(lambda grad: grad * 3)
    parallel.zero_grad()
    parallel(x).backward()
    checks.append(seen == ["after"] and difference(parallel.b.grad, 3 * whole(parallel.a.grad)) < 1e-14)
    return checks


def test_gradients_are_kept_apart_and_hooks_run() -> None:
    checks = run_ranks(accumulate, 1)[0]
    assert all(checks), checks


def test_calls_of_modules_go_through_one_method() -> None:
    """As autopar.observation.observation watches them, while ``torch.export`` has put its own method above."""
    model = nn.Sequential(nn.Linear(2, 2))
    seen: list[str] = []
    original = nn.Module._call_impl

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self).__name__)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_call_impl", call)
        torch.export.export(model, (torch.ones(2, 2),))
    assert {"Sequential", "Linear"} <= set(seen)


# ---------------------------------------------------------------- the store of a launch


def counted_in_the_store() -> int:
    connect(Mesh(dp=2), 60.0, torch.device("cpu"))
    store = launch_store()
    assert store is not None, "torch gives the store of the process group"
    return int(store.add("ranks", 1))


def test_ranks_share_a_store() -> None:
    assert launch_store() is None
    assert sorted(run_ranks(counted_in_the_store, 2)) == [1, 2]
