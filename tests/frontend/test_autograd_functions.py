"""Hand-written autograd Functions: the gradient is the hand-written one, on every mesh, or the Function is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from autopar import Mesh, Plan
from autopar.autodiff.differentiate import differentiate
from autopar.check import check
from autopar.compiler import compile_program
from autopar.errors import TraceError
from autopar.frontend.numerics import gradient_error
from autopar.frontend.trace import trace
from autopar.operators.straight_through import STRAIGHT_THROUGH
from tests.frontend.test_trace import UNCHECKED, Base, run
from tests.frontend.test_trace_gradients import gradients
from tests.selection import one_each


class Amplified(Function):
    """A toy: differentiating the forward pass gives 0.5."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 0.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 123


class Reversed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:  # type: ignore[override]
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.neg() * ctx.strength, None


class Rounded(Function):
    """The straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return (x * 4).round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Several(Function):
    """Two outputs with a gradient and one without; two tensor inputs, a third that needs none, and a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, mask: Tensor, n: float) -> tuple[Tensor, ...]:  # type: ignore[override]
        y, z = x @ w, (x * n).tanh()
        best = y.argmax(-1, keepdim=True)
        ctx.save_for_backward(x, w, None, z)
        ctx.kept = {"mask": mask, "n": n}
        return y, z, best

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dz: Tensor, dbest: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, nothing, z = ctx.saved_tensors
        assert nothing is None and dbest.shape == (*dy.shape[:-1], 1)
        assert ctx.needs_input_grad == (True, True, False, False)
        x, dy = x.to(w.dtype), dy.to(w.dtype)
        dx = dy @ w.t() * ctx.kept["mask"] + ctx.kept["n"] ** 2 * dz * (1 - z * z)
        return dx, 3 * x.flatten(0, -2).t() @ dy.flatten(0, -2), None, None


class Clipped(Function):
    """forward apart from setup_context; a mask that is no saved tensor; in-place writing; no second derivative."""

    @staticmethod
    def forward(x: Tensor, slope: float = 2.0) -> Tensor:  # type: ignore[override]
        return (x * slope).clamp(-1, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.slope = inputs
        ctx.outside = (x * ctx.slope).abs() >= 1

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone()
        grad[ctx.outside] = 0
        grad[..., 0] = grad[..., 1].detach() * 2
        return grad * ctx.slope, None


class Root(Function):
    """A slope of infinity at zero: what is multiplied with it must not spoil the value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.relu().sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, grad * 0.5 * x.relu().rsqrt(), 0)


amplified = Amplified.apply  # models keep bound methods


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.function = function

    def hidden(self, x: Tensor) -> Tensor:
        assert self.function is not None
        return self.function(self.up(x))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.down(self.hidden(x)).pow(2).mean()}


class NetOfSeveral(Net):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16) / 4)

    def hidden(self, x: Tensor) -> Tensor:
        x = self.up(x)
        y, z, best = Several.apply(x, self.w, x > 0, 3.0)
        return y * best + z  # type: ignore[no-any-return]


NETS: dict[str, Callable[[], nn.Module]] = {
    "amplified": lambda: Net(amplified),
    "reversed": lambda: Net(lambda x: Reversed.apply(x, 0.3)),
    "rounded": lambda: Net(Rounded.apply),
    "several": NetOfSeveral,
    "clipped": lambda: Net(Clipped.apply),
    "root": lambda: Net(Root.apply),
    "twice": lambda: Net(lambda x: Clipped.apply(Amplified.apply(x / 123), slope=0.7) + x.relu()),
}


@pytest.mark.parametrize("name, mesh", one_each(NETS, ["dp=2", "tp=2", "dp=2,tp=2", "tp=4"]))
def test_exact_on_every_mesh(name: str, mesh: str) -> None:
    report = check(NETS[name](), {"x": torch.randn(4, 6, 8)}, Mesh.parse(mesh))
    assert report.worst < 1e-14
    if "tp" in mesh:
        split = [entry.node for entry in report.program.inputs if entry.target == "up.weight"]
        (node,) = [node for node in report.program.graph.nodes if node.name == split[0]]
        assert "@tp" in str(report.program).split(f"{node.name} ", 1)[1].splitlines()[0]


def test_forward_and_inference_do_not_compute_the_surrogate() -> None:
    batch = {"x": torch.randn(4, 6, 8)}
    program = compile_program(Net(Slanted.apply), Mesh(), None, (), batch)
    role = program.required_role
    assert STRAIGHT_THROUGH in {node.target for node in program.graph.nodes}
    plain = differentiate(compile_program(Net(lambda x: (x * 0.5).tanh()), Mesh(), None, (), batch)).required_role
    for graph, expected in ((role.forward, plain.forward), (role.inference, plain.inference)):
        targets, wanted = ([n.target for n in g.nodes if n.op == "call_function"] for g in (graph, expected))
        assert targets == wanted


class Slanted(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        y = (x * 0.5).tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * ctx.saved_tensors[0]


def compared(model: nn.Module, x: Tensor) -> float:
    program = trace(model, (x,), plan=UNCHECKED)
    output, expected = run(program, model, x), model(x)
    assert output.dtype == expected.dtype and torch.equal(output, expected)
    found, wanted = gradients(model, output.float().sum()), gradients(model, expected.float().sum())
    return max(gradient_error(found, wanted).values())


def test_dtypes_and_autocast() -> None:
    class Halves(Base):
        def forward(self, x: Tensor) -> Tensor:
            half = Rounded.apply((x @ self.w).bfloat16())
            with torch.autocast("cpu", torch.bfloat16):
                y, z, _ = Several.apply(x @ self.v, self.w, x > 0, 1.0)
            return half + y.tanh() * z.relu()  # type: ignore[no-any-return]

    assert compared(Halves(), torch.randn(4, 4)) < 1e-2


def test_gradients_of_another_shape_and_dtype_are_made_to_fit() -> None:
    class Wide(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return x.double() + b

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return grad * 5, grad * 7

    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = Wide.apply(x @ self.w, self.v[0])
            return found

    assert compared(Model(), torch.randn(4, 4)) < 1e-6


def test_constants_outside_of_the_function() -> None:
    table = torch.randn(4, 4)

    class Tabled(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * table * torch.tensor([1.0, 2.0, 3.0, 4.0]) * torch.tensor(0.5)

    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = Tabled.apply(x @ self.w)
            return found

    assert compared(Model(), torch.randn(4, 4)) < 1e-6


def test_where_no_gradient_flows_the_function_is_its_forward() -> None:
    class Harmless(Base):
        def forward(self, x: Tensor) -> Tensor:
            first = Worst.apply(x) @ self.w
            with torch.no_grad():
                second = Worst.apply(x @ self.v)
            return first * second  # type: ignore[no-any-return]

    assert compared(Harmless(), torch.randn(4, 4)) < 1e-6


def test_functions_within_functions() -> None:
    class Outer(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            found: Tensor = Amplified.apply(x) * 3
            return found

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            found: Tensor = Amplified.apply(grad)
            return found

    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = Outer.apply(x @ self.w)
            return found

    model, x = Model(), torch.randn(4, 4)
    assert compared(model, x) < 1e-6
    expected = x.t() @ torch.full((4, 4), 0.5)
    assert torch.allclose(torch.autograd.grad(model(x).sum(), model.w)[0], expected)


def test_no_weights_are_needed() -> None:
    with torch.device("meta"):
        model = Net(Clipped.apply)
    program = compile_program(model, Mesh(tp=2), None, (), {"x": torch.randn(4, 6, 8, device="meta")})
    assert STRAIGHT_THROUGH in {node.target for node in program.graph.nodes}


def test_the_program_is_read_where_the_model_is_not_known(tmp_path: Path) -> None:
    program = compile_program(Net(Rounded.apply), Mesh(tp=2), None, (), {"x": torch.randn(4, 6, 8)})
    program.save(tmp_path / "out")
    read = f"from autopar.ir.program import Program; print(Program.load({str(tmp_path / 'out')!r}))"
    found = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
    assert found.stdout == f"{program}\n" and "autopar.straight_through(" in found.stdout


# ---------------------------------------------------------------- refused


class Worst(Function):
    """What nothing may call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise ArithmeticError("no gradient today")


class Bounded(Worst):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clamp(-1, 1)


class Added(Worst):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad + 0.1


class Looking(Worst):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * float(grad.abs().max())


class Numpy(Worst):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return torch.from_numpy(grad.numpy() * 2)


class Hidden(Worst):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.there = lambda: x
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * ctx.there()


class Writing(Worst):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(x)
        return x.mul_(2)


class Scratch(Worst):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        x -= x.amax()  # and does not say so
        return x.exp()


class Few(Worst):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


REFUSED: dict[type[Function], str] = {
    Worst: "backward cannot be traced: ArithmeticError: no gradient today",
    Bounded: "passes the incoming gradient through aten.clamp.default, which is not linear",
    Added: "aten.add.Tensor adds something to the incoming gradient that does not depend on it",
    Looking: "its backward looks at the values in a tensor",
    Numpy: "does not depend on the incoming gradient",
    Hidden: "reads a tensor that forward has not saved",
    **dict.fromkeys((Writing, Scratch), "its forward writes into its inputs"),
    Few: "its backward returns 1 gradients for 2 arguments of forward",
}


@pytest.mark.parametrize("function", REFUSED)
def test_refused_by_name(function: type[Function]) -> None:
    class Hand(Base):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.w
            found: Tensor = function.apply(y, y) if function is Few else function.apply(y)
            return found

    before = Function.apply.__func__.__code__  # type: ignore[attr-defined]
    named = rf"{function.__name__}\n  at test_autograd_functions.py:\d+ in forward: found(?s:.*)"
    with pytest.raises(TraceError, match=named + REFUSED[function] + "(?s:.*)Way out") as info:
        trace(Hand(), (torch.randn(4, 4),), plan=Plan(check_numerics=False))
    assert str(info.value).count("\n") < 15
    assert Function.apply.__func__.__code__ is before  # type: ignore[attr-defined]
