"""The graphs of a role as readable Python, one line per node; a rank runs this code.

    aten_linear = torch.nn.functional.linear

    def forward(comm, inputs):
        x, p_down_weight = inputs
        inputs.clear()
        # down  mlp.py:12 in forward: return self.down(h)
        linear = aten_linear(x, p_down_weight); del x  # f32[4@dp,16,8]{sum:tp}
        all_reduce = comm.all_reduce(linear, "tp", "sum"); del linear  # f32[4@dp,16,8]
        return (all_reduce, p_down_weight)

A function takes its inputs in a list and empties it, so that ``del`` at the last use really frees a saved activation.
Where an argument is used for the last time and has the size of the result, the result takes its memory:
``aten_add_`` (:mod:`autopar.codegen.in_place`).
"""

from __future__ import annotations

import hashlib
import linecache
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from textwrap import indent
from types import CodeType
from typing import Any

import torch
from torch import fx

from autopar.codegen.in_place import IN_PLACE, reused
from autopar.codegen.regions import Region, regions_of
from autopar.codegen.torch_bindings import BINDINGS, sooner
from autopar.errors import InvariantError
from autopar.ir import collectives as comm
from autopar.ir.node import Node, last_uses, origin, output_node, values
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.sizes import is_expression
from autopar.ir.tables import Role
from autopar.ir.text import type_text
from autopar.mesh import PIPELINE
from autopar.operators.registry import REGISTRY

RankFunction = Callable[[Any, list[Any]], tuple[Any, ...]]  # (comm, inputs) -> results

INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
}
RESERVED = ("comm", "inputs", "given", "sizes", "torch", "op", "math", "operator", "float", "slice")
DEFAULTS = {"outer": 1, "ratio": [1]}  # arguments of collectives that are left out where they say nothing


@dataclass(frozen=True)
class RankProgram:
    """The program of one rank; ``print(program.rank(3).code)``."""

    program: AnyProgram
    rank: int

    @property
    def coordinates(self) -> dict[str, int]:
        return self.program.mesh.coordinates(self.rank)

    @property
    def stages(self) -> Mapping[int, RankProgram]:
        """For a pipelined program, the program of each of the rank's stages, once it has a schedule."""
        if isinstance(self.program, Program):
            return {}
        here = self.coordinates
        place = {axis: position for axis, position in here.items() if axis != PIPELINE}
        mine = self.program.stages_on(here[PIPELINE])
        return {number: RankProgram(stage, stage.mesh.rank(place)) for number, stage in mine.items()}

    @property
    def instructions(self) -> str:
        """For a pipelined program, the order of the rank's stages, sends and receives; one a line."""
        schedule = self.program.schedule if isinstance(self.program, PipelinedProgram) else None
        steps = schedule.ranks[self.coordinates[PIPELINE]] if schedule is not None else ()
        return "".join(f"{step}\n" for step in steps)

    @property
    def role(self) -> Role | None:
        """None before ``differentiate``, and for a pipelined program, whose ``stages`` have one each."""
        return self.program.role if isinstance(self.program, Program) else None

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        role = self.role
        if role is None:
            return {"forward": self.program.graph}
        if role.backward is None:
            return {"forward": role.forward}
        return {"forward": role.forward, "backward": role.backward}

    @property
    def code(self) -> str:
        """Python source of ``forward`` and ``backward``, with this rank's numbers in it."""
        if self.stages:
            parts = [f"# stage {number}\n{stage.code}" for number, stage in self.stages.items()]
            return "\n\n".join([*parts, f"# schedule\n{indent(self.instructions, '# ')}"])
        return emit(self.graphs, self.program, self.coordinates)

    @property
    def inference_code(self) -> str:
        if self.stages:
            return "\n\n".join(f"# stage {number}\n{s.inference_code}" for number, s in self.stages.items())
        role = self.role
        return emit({"inference": role.inference if role else self.program.graph}, self.program, self.coordinates)


def emit(
    graphs: Mapping[str, fx.Graph],
    program: AnyProgram,
    coordinates: Mapping[str, int] | None = None,
    *,
    labelled: bool = False,
) -> str:
    """One Python module with a function ``name(comm, inputs: list) -> tuple`` for each of ``graphs``.

    With ``coordinates`` of a rank its constants are folded; without, the source is that of all ranks of the role.
    ``labelled``: what belongs to a module of the model runs in a context ``comm.inside(label)``, for profilers.
    Raises InvariantError for a node that cannot be written as Python.
    """
    module = _Module(program, coordinates, labelled)
    functions = [module.function(name, graph) for name, graph in graphs.items()]
    return "\n".join([*module.head(), *(line for lines in functions for line in ("", "", *lines)), ""])


def emit_sized(
    name: str, graph: fx.Graph, program: AnyProgram, *, labelled: bool = False
) -> tuple[str, dict[str, tuple[Any, ...]]]:
    """As :func:`emit`, for a ``graph`` in which expressions stand for sizes: ``name(comm, inputs, sizes) -> tuple``.

    Also gives, for ``name`` and for each of its regions, the expressions whose values ``sizes`` holds, in order;
    without any, ``sizes`` is not taken.
    """
    module = _Module(program, None, labelled)
    lines = module.function(name, graph)
    return "\n".join([*module.head(), "", "", *lines, ""]), {name: tuple(module.sizes), **module.regions}


def compile_source(source: str, name: str) -> RankFunction:
    """The function ``name`` of an emitted module; tracebacks and debuggers show its lines."""
    return function_of(code_of(source, name), source, name)


def code_of(source: str, name: str) -> CodeType:
    """An emitted module, the function ``name`` of which is wanted, as it is run."""
    return compile(source, f"<autopar {name} {hashlib.sha256(source.encode()).hexdigest()[:12]}>", "exec")


def function_of(code: CodeType, source: str, name: str) -> RankFunction:
    """The function ``name`` of the module that :func:`code_of` made of ``source``, in this process or another."""
    linecache.cache[code.co_filename] = (len(source), None, source.splitlines(keepends=True), code.co_filename)
    namespace: dict[str, Any] = {"__name__": f"autopar.emitted.{name}"}
    exec(code, namespace)  # our own source, or what was kept of it where nobody else can write
    namespace.update(sooner(namespace))
    function: RankFunction = namespace[name]
    return function


class _Module:
    """The bindings at the top of an emitted module, filled while its functions are written."""

    def __init__(self, program: AnyProgram, coordinates: Mapping[str, int] | None, labelled: bool) -> None:
        self.program, self.coordinates, self.labelled = program, coordinates, labelled
        self.bindings: dict[str, str] = {}  # short name -> torch.ops expression
        self.imports: set[str] = set()
        self.taken: frozenset[str] = frozenset()
        self.sizes: dict[Any, str] = {}  # expression of sizes -> the variable that holds its value
        self.regions: dict[str, tuple[Any, ...]] = {}  # names of those whose functions are written -> their sizes

    def head(self) -> list[str]:
        place = "" if self.coordinates is None else f" rank {self.program.mesh.rank(self.coordinates)}:"
        where = "".join(f" {axis}={position}" for axis, position in (self.coordinates or {}).items())
        bound = [f"{name} = {target}" for name, target in sorted(self.bindings.items())]
        imports = sorted(self.imports | ({"import torch"} if bound else set()), key=lambda line: line.split()[1])
        return [f"# {self.program.mesh}{place}{where}", *imports, *([""] if bound else []), *bound]

    def function(self, name: str, graph: fx.Graph, *, is_region: bool = False) -> list[str]:
        """The lines of one function, after those of its regions; names of nodes are those of the graph."""
        before = list[str]()
        for region in regions_of(graph):
            if region.__name__ not in self.regions:
                around, self.sizes = self.sizes, {}
                self.taken = frozenset(node.name for node in region.graph.nodes)
                for symbol in region.symbols:
                    self.size(symbol)
                before += [*self.function(region.__name__, region.graph, is_region=True), "", ""]
                self.regions[region.__name__], self.sizes = tuple(self.sizes), around
        self.taken = frozenset(node.name for node in graph.nodes)
        body = _Body(self, graph, is_region)
        calls = [node for node in graph.nodes if node.op not in ("placeholder", "output") and not _is_result(node)]
        lines = list(body.labelled(calls, name) if self.labelled and not is_region else body.commented(calls))
        head = [f"def {name}(comm, inputs{', sizes' if self.sizes else ''}):", *body.unpacking(self._labels(graph))]
        if self.sizes:
            head += ["    (", *(f"        {size},  # {form}" for form, size in self.sizes.items()), "    ) = sizes"]
        end = f"    return {body.text(tuple(output_node(graph).args[0]))}"  # type: ignore[arg-type]
        return [*before, *head, *lines, end]

    def _labels(self, graph: fx.Graph) -> dict[str, str]:
        """For each placeholder its kind, name and type: ``param up.weight f32[32@tp,8]``."""
        table = {entry.node: entry for entry in self.program.inputs}
        labels = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                entry = table.get(node.name)
                labels[node.name] = " ".join([*([entry.kind.value, entry.target] if entry else []), *_types(node)])
        return labels

    def size(self, expression: Any) -> str:
        """The variable that holds the value of ``expression``."""
        if expression not in self.sizes:
            name = f"n{len(self.sizes)}"
            while name in self.taken:
                name += "_"
            self.sizes[expression] = name
        return self.sizes[expression]

    def bind(self, target: Any, node: Node) -> str:
        """The expression by which a line calls ``target``."""
        if isinstance(target, torch._ops.OpOverload):
            namespace, name = target._schema.name.split("::")
            overload = target._overloadname
            short = f"{namespace}_{name}" + ("" if overload == "default" else f"_{overload}")
            bound = BINDINGS.get(target) or f"torch.ops.{namespace}.{name}.{overload}"
            while short in self.taken or self.bindings.get(short, bound) != bound:
                short += "_"
            self.bindings[short] = bound
            return short
        name = getattr(target, "__name__", "")
        if REGISTRY.get(name) is target:
            self.imports.add("from autopar import operators as op")
            return f"op.{name}"
        if getattr(operator, name, None) is target or getattr(math, name, None) is target:
            module = "operator" if hasattr(operator, name) else "math"
            self.imports.add(f"import {module}")
            return f"{module}.{name}"
        raise InvariantError(
            f"{node.name} calls {target!r}, which has no name that another process could find\n"
            "Way out: register it with @autopar.operators.operator, or as a torch.library operator."
        )


class _Body:
    """The lines of one function."""

    def __init__(self, module: _Module, graph: fx.Graph, is_region: bool) -> None:
        self.module, self.graph = module, graph
        self.names = _variables(graph)
        self.dying = last_uses(graph)
        self.reused = reused(graph, module.program.mesh) if not is_region else {}

    def unpacking(self, labels: Mapping[str, str]) -> list[str]:
        nodes = [node for node in self.graph.nodes if node.op == "placeholder"]
        if not nodes:
            return []
        width = max(len(self.names[node]) for node in nodes) + 1
        comments = {node: _printable(labels[node.name]) for node in nodes}
        rows = [f"        {self.names[node] + ',':<{width}}  # {comments[node]}".rstrip(" #") for node in nodes]
        unused = [self.names[node] for node in nodes if not node.users]
        deleted = [f"    del {', '.join(unused)}"] if unused else []
        return ["    (", *rows, "    ) = inputs", "    inputs.clear()", *deleted]

    def commented(self, calls: Sequence[Node]) -> Iterator[str]:
        """A line for each call, and before those of one line of the model, that line."""
        where = None
        for node in calls:
            if (place := _place(node)) != where and place:
                yield f"    # {_printable(place)}"
            where = place
            yield self.line(node)

    def labelled(self, calls: Sequence[Node], function: str) -> Iterator[str]:
        """A line for each call, those of one module in a context with its label."""
        for label, nodes in groupby(calls, partial(_label, function)):
            yield f"    with comm.inside({label!r}):"
            yield from (indent(self.line(node), "    ") for node in nodes)

    def line(self, node: Node) -> str:
        if node.op != "call_function":
            raise InvariantError(f"{node.name} is a {node.op} node; a rank program has only functions and placeholders")
        dying = ", ".join(self.names[dead] for dead in self.dying.get(node, ()))
        if isinstance(node.target, Region):
            return self.region(node, node.target.__name__, dying)
        types = ", ".join(_types(node))
        line = f"    {self.names[node]} = {self.call(node)}"
        return line + (f"; del {dying}" if dying else "") + (f"  # {types}" if types else "")

    def call(self, node: Node) -> str:
        target: Any = node.target
        if target is operator.getitem:
            return f"{self.text(node.args[0])}[{self.text(node.args[1])}]"
        if target in INFIX and len(node.args) == 2:
            return f"{self.text(node.args[0])} {INFIX[target]} {self.text(node.args[1])}"
        if target in comm.TARGETS:
            return self.collective(node)
        given = list(node.args)
        if node in self.reused:
            given.insert(0, given.pop(self.reused[node]))
            target = IN_PLACE[target]
        arguments = [self.text(value) for value in given]
        arguments += [f"{key}={self.text(value)}" for key, value in node.kwargs.items()]
        return f"{self.module.bind(target, node)}({', '.join(arguments)})"

    def region(self, node: Node, name: str, dying: str) -> str:
        """The operands in a list, so that the region itself frees those that nothing needs after it."""
        given = f"    given = {self.text(node.args[0])}" + (f"; del {dying}" if dying else "")
        results = [(self.names[item], ", ".join(_types(item))) for item in node.users]
        names = ", ".join(name for name, _ in results) + "," * (len(results) == 1)
        types = ", ".join(each for _, each in results)
        sizes = "".join(f"{self.module.size(each)}, " for each in self.module.regions[name])
        return f"{given}\n    {names} = {name}(comm, given{f', ({sizes.rstrip()})' if sizes else ''})  # {types}"

    def collective(self, node: Node) -> str:
        target: Any = node.target
        name: str = comm.TARGETS[target]
        given = comm.arguments_of(node)
        if name == "axis_index" and self.module.coordinates is not None:
            self.module.imports.add("import torch")
            position = self.module.program.mesh.position(str(given["axis"]), self.module.coordinates)
            return f"torch.tensor({position}, device=comm.device)"
        leading = [self.text(given.pop(key)) for key in ("x", "axis", "op") if key in given]
        shown = [f"{key}={self.text(value)}" for key, value in given.items() if DEFAULTS.get(key) != value]
        shown += ["in_place=True"] * (node in self.reused)
        return f"comm.{name}({', '.join(leading + shown)})"

    def text(self, value: Any) -> str:
        """``value`` as a Python expression; devices are the rank's own, so that a program runs on any."""
        if isinstance(value, Node):
            return self.names[value]
        if isinstance(value, (tuple, list)):
            inner = ", ".join(map(self.text, value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, torch.device):
            return "comm.device"
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            self.module.imports.add("import torch")
            return str(value)
        if is_expression(value):
            return self.module.size(value)
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            return f'"{value}"' if isinstance(value, str) and value.isidentifier() else repr(value)
        raise InvariantError(f"an argument of type {type(value).__name__} ({value!r}) cannot be written as Python")


def _variables(graph: fx.Graph) -> dict[Node, str]:
    """The Python variable of each node: its name, or a longer one where that means something else already."""
    taken = {node.name for node in graph.nodes}
    found: dict[Node, str] = {}
    for node in graph.nodes:
        name = node.name
        while name in RESERVED or name != node.name and name in taken:
            name += "_"
        taken.add(name)
        found[node] = name
    return found


def _is_result(node: Node) -> bool:
    """Whether ``node`` is a result of a region, whose line has all of them."""
    return node.target is operator.getitem and isinstance(node.all_input_nodes[0].target, Region)


def _printable(text: str) -> str:
    """``text`` for a comment: a line break in a name would end the comment, and what follows would be code."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _place(node: Node) -> str:
    where = origin(node)
    return " ".join(f"{where.module}  {where.source}".split("\n")).strip()


def _label(function: str, node: Node) -> str:
    """``backward model.layers.0.mlp``; of a collective ``all_reduce over tp: model.layers.0.mlp.down_proj``."""
    module, name = origin(node).module or "(model)", comm.moving(node.target)
    if name is None:
        return f"{function} {module}"
    return f"{name} over {comm.arguments_of(node)['axis']}: {module} ({function})"


def _types(node: Node) -> Sequence[str]:
    return [type_text(value) for value in values(node)]
