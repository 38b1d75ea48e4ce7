"""The collectives that appear in graphs: one table, from which all other facts about them follow.

A row gives the placements of the operand and of the result on the axis (I, R, S or P, see ``layout.py``), the dual
(the collective of the backward pass), the arguments after the tensor, and the bytes that one rank sends. Shape
functions, autograd formulas, moved bytes, costs of both directions, early starts and contracts follow from it. A new
collective is a row here, a kernel in the simulator, and a method of the runtime's communicator.

An axis may be several merged to one, or a part of one (``dp+sp``, ``sp:inner2``, see ``mesh.py``).

They are torch operators in the namespace ``autopar`` with a shape function and an autograd formula, but no kernel: a
graph is traced with them for any mesh without a process group; the runtime (real processes) and the simulator (ranks
in lock-step) execute them.

A ``start_...`` does the same as the collective it starts, but its result is available only from ``wait``. It has no
dual, since ``overlap_collectives`` writes it after differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from autopar.ir.fast_graph import called, calls_of
from autopar.ir.layout import Partial, Placement, Split, Whole
from autopar.ir.operator_facts import argument_names
from autopar.mesh import Mesh, axes_of

Held = Literal["I", "R", "S", "P"]  # the placement of a value on one axis
Arguments = dict[str, Any]  # those after the tensor, by name
WHOLE: tuple[Held, ...] = ("I", "R")


@dataclass(frozen=True)
class Form:
    """The arguments after the tensor.

    ``turned``: the arguments of the dual, where they are not the same. ``idle``: whether no rank sends anything, for
    such arguments on an axis of more than one rank.
    """

    schema: str
    turned: Callable[[Arguments], Arguments] = dict
    idle: Callable[[Arguments], bool] = lambda given: False

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(argument.split()[1] for argument in self.schema.split(", "))


AXIS = Form("str axis")
REDUCTION = Form("str axis, str op")
# one dim of `length` elements in all, cut as by Split.of(dim, outer, ratio)
PART = Form("str axis, int ways, int dim, int outer, int[] ratio, int length")
# source and target are (dim, outer, *ratio) of the two splits
ENDS = Form(
    "str axis, int ways, int[] source, int[] target",
    lambda given: {**given, "source": given["target"], "target": given["source"]},
)
# the same, of two splits of one dim
ORDERS = Form(ENDS.schema, ENDS.turned, idle=lambda given: list(given["source"]) == list(given["target"]))
# by: the number of ranks further on the axis, which is a ring
STEPS = Form(
    "str axis, int ways, int by",
    turned=lambda given: {**given, "by": -given["by"]},
    idle=lambda given: given["by"] % given["ways"] == 0,
)
# rows of dim 0 for each rank of the axis, and from it: (ways,) whole numbers, known at run time only
SIZES = Form(
    "str axis, int ways, Tensor send, Tensor receive",
    turned=lambda given: {**given, "send": given["receive"], "receive": given["send"]},
)
# counts (1, ways, own + 1): rows that this rank sends to each rank of `group`, and to each of its experts;
# places: the slot of each expert
NOTE = Form("str axis, Tensor counts, str layer, str group, int[] places")


@dataclass(frozen=True)
class Collective:
    """A row of the table.

    ``sends``: (ranks of the axis, bytes of the operand) -> bytes that one rank sends; it is linear in the bytes, and 0
    on an axis of one rank. ``starts``: the collective that starts this one early. ``short``: its column in tables.
    """

    before: Held
    after: Held
    dual: str
    does: str  # for people; {dim} where the words need one
    form: Form = AXIS
    sends: Callable[[int, int], int] = lambda ways, size: 0
    starts: str = ""
    short: str = ""

    @property
    def does_nothing(self) -> bool:
        """Whether the result is the operand, and only the gradient differs."""
        return self.before in WHOLE and self.after in WHOLE

    @property
    def grows(self) -> bool:
        """Whether a part becomes a whole: ``length`` is then the size of the result, else that of the operand."""
        return self.form is PART and self.before == "S"

    @property
    def shrinks(self) -> bool:
        return self.form is PART and self.after == "S"


# Bytes by the usual accounting of ring algorithms (Thakur et al. 2005).
COLLECTIVES: dict[str, Collective] = {
    "enter": Collective("I", "R", dual="all_reduce", does="nothing"),
    "release": Collective("R", "I", dual="keep_first", does="nothing"),
    "keep_first": Collective("I", "P", dual="release", does="zeros on all ranks but the first: a bias is added once"),
    "all_reduce": Collective(
        "P", "I", dual="enter", does="sum (or `op=max`, `op=min`) over the ranks", form=REDUCTION,
        sends=lambda ways, size: 2 * (ways - 1) * size // ways, starts="start_all_reduce", short="AR",
    ),
    "all_gather": Collective(
        "S", "R", dual="reduce_scatter", does="joins the parts", form=PART,
        sends=lambda ways, size: (ways - 1) * size, starts="start_all_gather", short="AG",
    ),
    "all_gather_invariant": Collective(
        "S", "I", dual="split", does="joins the parts, used alike by all ranks", form=PART,
        sends=lambda ways, size: (ways - 1) * size, starts="start_all_gather", short="AG",
    ),
    "pad": Collective("S", "P", dual="split_replicated", does="zeros around each rank's part", form=PART),
    "reduce_scatter": Collective(
        "P", "S", dual="all_gather", does="sums, each rank keeps its part", form=PART,
        sends=lambda ways, size: (ways - 1) * size // ways, starts="start_reduce_scatter", short="RS",
    ),
    "split": Collective("I", "S", dual="all_gather_invariant", does="each rank takes its part", form=PART),
    "split_replicated": Collective("R", "S", dual="pad", does="each rank takes its part", form=PART),
    "all_to_all": Collective(
        "S", "S", dual="all_to_all", does="from parts of one dim to parts of another", form=ENDS,
        sends=lambda ways, size: (ways - 1) * size // ways, short="A2A",
    ),
    # in zig-zag order a rank has two chunks of 2n; of two ranks each keeps one, of more some send both
    "reorder": Collective(
        "S", "S", dual="reorder", does="from parts in one order of a dim to parts in another", form=ORDERS,
        sends=lambda ways, size: size // 2 if ways == 2 else size if ways > 2 else 0, short="RO",
    ),
    "shift": Collective(
        "S", "S", dual="shift", does="each rank has the part of the rank `by` before it", form=STEPS,
        sends=lambda ways, size: size if ways > 1 else 0, starts="start_shift", short="SH",
    ),
    # the bytes are those of a balanced load
    "dispatch_rows": Collective(
        "S", "S", dual="return_rows", does="rows, sorted by rank, to the ranks of their experts", form=SIZES,
        sends=lambda ways, size: (ways - 1) * size // ways, starts="start_dispatch_rows", short="DR",
    ),
    "return_rows": Collective(
        "S", "S", dual="dispatch_rows", does="rows back to the ranks that dispatched them", form=SIZES,
        sends=lambda ways, size: (ways - 1) * size // ways, starts="start_return_rows", short="RR",
    ),
    "tally": Collective(
        "S", "S", dual="tally", does="nothing; each rank notes how many rows it sends to which expert", form=NOTE,
    ),
}  # fmt: skip

STARTED: dict[str, str] = {}  # a collective that is started early -> what it does
for _name, _row in COLLECTIVES.items():
    if _row.starts:
        STARTED.setdefault(_row.starts, _name)
NAMES = (*COLLECTIVES, "axis_index", *STARTED, "wait")
MOVING = tuple(name for name, row in COLLECTIVES.items() if row.sends(2, 2)) + tuple(STARTED)  # send data


def row_of(name: str) -> Collective:
    """The row of a collective, or of the collective that is started under that name."""
    return COLLECTIVES[STARTED.get(name, name)]


# ---------------------------------------------------------------- the operators

_LIBRARY: Any = torch.library.Library("autopar", "DEF")  # type: ignore[no-untyped-call]
OPS = torch.ops.autopar
SHAPES: dict[Any, Callable[..., Tensor]] = {}  # operator -> its shape function: an empty tensor of the result's sizes


def _define(name: str, form: Form, shape: Callable[..., Tensor]) -> None:
    _LIBRARY.define(f"{name}(Tensor x, {form.schema}) -> Tensor")
    torch.library.register_fake(f"autopar::{name}", shape, lib=_LIBRARY)
    SHAPES[getattr(OPS, name).default] = shape


def _differentiable(name: str) -> None:
    """Give the collective its gradient: the dual, applied to the gradient of its result."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[1:]

    def formula(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dual, arguments = dual_of(name, ctx.arguments)
        given = grad if COLLECTIVES[dual].does_nothing else getattr(OPS, dual)(grad, *arguments)
        return (given, *[None] * len(ctx.arguments))

    torch.library.register_autograd(f"autopar::{name}", formula, setup_context=setup_context, lib=_LIBRARY)


def _same(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty([size if d == dim else s for d, s in enumerate(x.shape)])


def _grown(x: Tensor, axis: str, ways: int, dim: int, outer: int, ratio: Sequence[int], length: int) -> Tensor:
    return _resized(x, dim, length)


def _cut(x: Tensor, axis: str, ways: int, dim: int, outer: int, ratio: Sequence[int], length: int) -> Tensor:
    return _resized(x, dim, -(-length // ways))


def _swapped(x: Tensor, axis: str, ways: int, source: Sequence[int], target: Sequence[int]) -> Tensor:
    return x.new_empty(
        [s * ways if d == source[0] else s // ways if d == target[0] else s for d, s in enumerate(x.shape)]
    )


def _shape(row: Collective) -> Callable[..., Tensor]:
    return _grown if row.grows else _cut if row.shrinks else _swapped if row.form is ENDS else _same


for _name, _row in COLLECTIVES.items():
    _define(_name, _row.form, _shape(_row))
    _differentiable(_name)
for _name in STARTED:
    _define(_name, row_of(_name).form, _shape(row_of(_name)))
_define("wait", AXIS, _same)
_LIBRARY.define("axis_index(str axis) -> Tensor")
torch.library.register_fake("autopar::axis_index", lambda axis: torch.empty((), dtype=torch.int64), lib=_LIBRARY)

TARGETS = {getattr(OPS, name).default: name for name in NAMES}  # operator -> its name

# ---------------------------------------------------------------- sets of operators that follow from the table


def targets(names: Iterable[str]) -> frozenset[Any]:
    return frozenset(getattr(OPS, name).default for name in names)


def _those(fits: Callable[[Collective], bool]) -> frozenset[Any]:
    return targets(name for name, row in COLLECTIVES.items() if fits(row))


def started_too(operators: Iterable[Any]) -> frozenset[Any]:
    """``operators``, and the operators that start them early."""
    operators = frozenset(operators)
    return operators | {STARTS[target] for target in operators if target in STARTS}


STARTS = {
    getattr(OPS, name).default: getattr(OPS, row.starts).default for name, row in COLLECTIVES.items() if row.starts
}  # operator -> the one that does the same early
IDENTITIES = _those(lambda row: row.does_nothing)
REDUCTIONS = _those(lambda row: row.before == "P")  # sums over ranks
GATHERS = _those(lambda row: row.before == "S" and row.after in WHOLE)
CUTS = _those(lambda row: row.before in WHOLE and row.after == "S")
ROUTES = _those(lambda row: row.form is SIZES)  # rows to experts and back
ELEMENTWISE = _those(lambda row: row.form not in (PART, ENDS, ORDERS, SIZES, NOTE))  # each element stays in its place
CONVERSIONS: dict[tuple[Held, Held], str] = {}  # (placement now, placement required) -> the collective that converts
for _name, _row in COLLECTIVES.items():
    CONVERSIONS.setdefault((_row.before, _row.after), _name)


def moving(target: Any) -> str | None:
    """The collective that sends data in a node with this target, by its name when not started early; else None."""
    name = TARGETS.get(target)
    return STARTED.get(name, name) if name in MOVING else None  # type: ignore[arg-type]


def held(placement: Placement) -> Held:
    """The letter of a placement on its axis."""
    if isinstance(placement, Whole):
        return "I" if placement.invariant else "R"
    assert isinstance(placement, Split | Partial)
    return "S" if isinstance(placement, Split) else "P"


def collectives_of(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a graph that are collectives, in order."""
    return calls_of(graph, [target for target in called(graph) if target in TARGETS])


# ---------------------------------------------------------------- arguments


def arguments_of(node: fx.Node) -> Arguments:
    """The arguments of a collective by name, ``x`` first, in the order of its schema, positional or not."""
    given = {**dict(zip(argument_names(node.target), node.args)), **node.kwargs}
    return {name: given[name] for name in argument_names(node.target) if name in given}


def axis_of(node: fx.Node) -> str:
    """The axis of the mesh, or several, over which a collective in a graph runs."""
    place = argument_names(node.target).index("axis")
    return str(node.args[place] if place < len(node.args) else node.kwargs["axis"])


def dual_of(name: str, arguments: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    """The dual of ``name`` and its arguments; both lists of arguments are without the tensor."""
    row = COLLECTIVES[name]
    given = {"op": "sum", **row.form.turned(dict(zip(row.form.parameters, arguments)))}
    return row.dual, tuple(given[parameter] for parameter in COLLECTIVES[row.dual].form.parameters)


def does_nothing(target: Any, args: Sequence[Any], mesh: Mesh) -> bool:
    """Whether this is a collective that leaves every rank what it has: its axis has size 1, or its form is idle."""
    name = TARGETS.get(target)
    if name is None or name in ("axis_index", "tally"):  # a rank alone notes its load too
        return False
    if mesh.size(args[1]) == 1:
        return True
    form = AXIS if name == "wait" else row_of(name).form
    return form.idle(dict(zip(form.parameters, args[1:])))


def axes_over(node: fx.Node) -> frozenset[str]:
    """The axes of the mesh over which a collective in a graph runs."""
    return frozenset(axes_of(axis_of(node)))


def axes_used(graphs: Iterable[fx.Graph]) -> list[str]:
    """The axes, single or merged, over which ranks that run ``graphs`` communicate, in the same order on all."""
    nodes = (node for graph in graphs for node in graph.nodes if moving(node.target) is not None)
    return sorted({str(arguments_of(node)["axis"]) for node in nodes})


def is_idle(node: fx.Node, mesh: Mesh) -> bool:
    """As :func:`does_nothing`, for a collective in a graph."""
    return does_nothing(node.target, tuple(arguments_of(node).values()), mesh)


def where(split: Split, axis: str, ways: int, length: int) -> tuple[str, int, int, int, list[int], int]:
    """The arguments after the tensor, for an operator that splits or joins a dim of ``length`` elements."""
    return (axis, ways, split.dim, split.signed_outer, list(split.ratio), length)


def split_of(arguments: Sequence[Any]) -> Split:
    """The split in the ``where`` arguments (axis, ways, dim, outer, ratio, length) of a node."""
    return Split.of(arguments[2], arguments[3], arguments[4])


def end_of(numbers: Sequence[int]) -> Split:
    """The split in ``source`` or ``target`` of an all_to_all or a reorder."""
    return Split.of(numbers[0], numbers[1], numbers[2:])
