"""The step of the unmodified model in the field: its traced graph on one rank, differentiated by torch.

No pass has a hand in it: the graph is ``Program.source``, and the derivatives are those of torch's autograd, which runs
on the tensors of the field as on any others. So the canonical form, the losses as sums, recognised masks and experts,
the derived backward pass and all optimisations are compared with something that knows nothing of them.

Random numbers are drawn as a program draws them: the k-th operator of the source that draws has salt k, and each
microbatch has its own seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from autopar.ir.node import Origin, origin, value
from autopar.ir.operator_facts import is_random
from autopar.ir.program import Program
from autopar.ir.signature import user_tensors
from autopar.ir.tables import InputKind, OutputKind
from autopar.operators.random import random_keep, random_uniform
from autopar.proof.field_complex import ComplexFieldTensor
from autopar.proof.field_fourier import spectrogram
from autopar.proof.field_layers import embedding_bags
from autopar.proof.field_statistics import WRITTEN
from autopar.proof.field_tensor import FieldTensor, NoFieldForm
from autopar.simulator.lockstep import FAILURES

aten = torch.ops.aten


@dataclass(frozen=True)
class FieldStep:
    """``named``: outputs, new buffers and gradients with words for each. ``nodes``, ``origins``: by names of nodes."""

    named: Mapping[str, Tensor]
    nodes: Mapping[str, Any]
    origins: Mapping[str, Origin]


def reference_step(
    source: Program,
    tensors: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tangents: Mapping[str, Tensor],
    seeds: Seeds,
) -> FieldStep:
    """Loss, outputs, buffers and gradients of ``source``; ``tangents``: of the outputs that get one, by their targets.

    ``tensors``: whole parameters and buffers by name; ``seeds``: from which numbers are drawn.
    Raises NoFieldForm, naming the operator and the user's line.
    """
    known: dict[fx.Node, Any] = {}
    leaves: dict[str, Tensor] = {}
    given = iter(user_tensors(source, tuple(args), kwargs) if source.in_spec is not None else [*args, *kwargs.values()])
    table = {entry.node: entry for entry in source.inputs}
    salt = 0
    for node in source.graph.nodes:
        if node.op == "placeholder":
            entry = table[node.name]
            known[node] = _placed(entry.kind, entry.names, source, tensors, given)
            _check_shape(node, entry.target, known[node])
            if value(node).requires_grad and isinstance(known[node], FieldTensor | ComplexFieldTensor):
                known[node] = leaves[entry.target] = known[node].detach().requires_grad_()
        elif node.op == "call_function" and _gives_something(node):
            draws = _draws(node)
            if is_random(node.target) and node.target not in (*DRAWING, *RECURRENT):
                raise NoFieldForm(f"{node.target} draws numbers in {origin(node).source}")
            known[node] = _call(node, known, salt, seeds)
            salt += draws
    results = dict(zip([(out.kind, out.target) for out in source.outputs], [known[node] for node in source.returned]))
    named = {_words(kind, target): result for (kind, target), result in results.items()}
    named |= _gradients(results, leaves, tangents)
    nodes, origins = {node.name: x for node, x in known.items()}, {node.name: origin(node) for node in known}
    return FieldStep(named, nodes, origins)


def _placed(
    kind: InputKind, names: Sequence[str], source: Program, tensors: Mapping[str, Tensor], given: Any
) -> Tensor:
    if kind is InputKind.INPUT:
        found: Tensor = next(given)
        return found
    if kind is InputKind.CONSTANT and names[0] in source.constants:
        return source.constants[names[0]]
    return next(tensors[name] for name in names if name in tensors)


def _check_shape(node: fx.Node, target: str, tensor: Tensor) -> None:
    if tensor.shape != value(node).shape:
        raise NoFieldForm(
            f"{target} is {list(tensor.shape)}, and the model was traced for {list(value(node).shape)}: it was traced "
            "for one microbatch, so give the trace of the whole batch as `source`"
        )


def _gives_something(node: fx.Node) -> bool:
    """Not an assertion of the tracer's, of a dtype that is another one in this arithmetic."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.returns)


def _words(kind: OutputKind, target: str) -> str:
    return f"buffer {target}" if kind is OutputKind.BUFFER_UPDATE else f"output {target}"


def _gradients(
    results: Mapping[tuple[OutputKind, str], Any], leaves: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    wanted = {target: results[OutputKind.USER, target] for target in tangents}
    if not wanted or not leaves:
        return {}
    with torch.enable_grad():
        found = torch.autograd.grad(
            list(wanted.values()), list(leaves.values()), [tangents[target] for target in wanted], allow_unused=True
        )
    return {f"gradient of {name}": grad for name, grad in zip(leaves, found) if grad is not None}


def _call(node: fx.Node, known: Mapping[fx.Node, Any], salt: int, seeds: Seeds) -> Any:
    args: Any
    kwargs: Any
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    target: Any = node.target
    try:
        if target in RECURRENT and len(args) == 9:
            with torch.backends.mkldnn.flags(enabled=False):  # whose kernel is no composite  # type: ignore[no-untyped-call]
                return _layers(target, seeds, salt, *args)
        if target in DRAWING and _draws(node):
            return DRAWING[target](seeds, salt, *args, **kwargs)
        return COMPOSITES.get(target, target)(*args, **kwargs)
    except NoFieldForm as problem:
        where = origin(node)
        raise NoFieldForm(f"{str(problem)}; {node.name} of {where.module or 'the model'}: {where.source}") from None
    except FAILURES as problem:
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise NoFieldForm(
            f"{target}: {first}; {node.name} of {origin(node).module}: {origin(node).source}"
        ) from problem


# ---------------------------------------------------------------- what is random


@dataclass(frozen=True)
class Seeds:
    """The seed of the step, and the rows of its microbatches, of which the n-th draws from the n-th seed after it."""

    seed: int
    rows: tuple[int, ...] = (1,)

    def drawn(self, shape: Sequence[int], draw: Callable[[Tensor, list[Tensor]], Tensor]) -> Tensor:
        """What ``draw(seed, positions of each dim)`` gives; in parts along the first dim where there are some."""
        if len(self.rows) == 1:
            return draw(torch.tensor(self.seed), list(map(torch.arange, shape)))
        total = sum(self.rows)
        if not shape or shape[0] % total:
            raise NoFieldForm(f"numbers of shape {list(shape)} are drawn, and {total} rows are not its first dim")
        sizes = [(shape[0] // total * rows, *shape[1:]) for rows in self.rows]
        parts = [draw(torch.tensor(self.seed + n), list(map(torch.arange, size))) for n, size in enumerate(sizes)]
        return torch.cat(parts)


def _draws(node: fx.Node) -> int:
    """How many times an operator draws."""
    args: Any = node.args
    if node.target is aten.scaled_dot_product_attention.default:
        return int(float(args[4] if len(args) > 4 else node.kwargs.get("dropout_p", 0.0)) > 0)  # type: ignore[arg-type]
    if node.target in RECURRENT:
        layers, dropout, train = args[4:7]
        return layers - 1 if dropout and train else 0
    if node.target is aten.dropout.default:
        return int(bool(args[2] and args[1]))
    return int(node.target in DRAWING)


def _dropout(seeds: Seeds, salt: int, x: Tensor, p: float, train: bool = True) -> Tensor:
    keep = seeds.drawn(x.shape, lambda seed, at: random_keep(seed, salt, p, *at))
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)


def _uniform(seeds: Seeds, salt: int, x: Tensor, low: float = 0.0, high: float = 1.0, **rest: Any) -> Tensor:
    dtype = rest.get("dtype") or x.dtype
    return seeds.drawn(x.shape, lambda seed, at: random_uniform(seed, salt, low, high, dtype, *at))


def _normal(seeds: Seeds, salt: int, x: Any, *rest: Any, **more: Any) -> Tensor:
    """By two uniform numbers (Box and Muller, 1958)."""
    shape, wide = x.shape if isinstance(x, Tensor) else x, torch.float64
    radius = seeds.drawn(shape, lambda seed, at: random_uniform(seed, 2 * salt, 2.0**-32, 1.0, wide, *at))
    angle = seeds.drawn(shape, lambda seed, at: random_uniform(seed, -2 * salt - 1, 0.0, 2 * math.pi, wide, *at))
    dtype = more.get("dtype") or (x.dtype if isinstance(x, Tensor) else torch.get_default_dtype())
    return (radius.log().mul(-2.0).sqrt() * angle.cos()).to(dtype)


def _coins(seeds: Seeds, salt: int, x: Tensor, p: float | None = None, **rest: Any) -> Tensor:
    drawn = seeds.drawn(x.shape, lambda seed, at: random_uniform(seed, salt, 0.0, 1.0, torch.float64, *at))
    return (drawn < (x if p is None else p)).to(x.dtype)


def _attention(
    seeds: Seeds, salt: int, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention as torch documents it: scores, softmax, dropout, product."""
    if q.dim() > 3 and k.shape[-3] != q.shape[-3]:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = torch.matmul(q, k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if attn_mask is not None:
        is_bool = attn_mask.dtype is torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf) if is_bool else scores + attn_mask
    if is_causal:
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    weights = aten._safe_softmax.default(scores, -1)
    if dropout_p > 0:
        weights = _dropout(seeds, salt, weights, dropout_p)
    return torch.matmul(weights, v)


RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


def _layers(
    target: Any, seeds: Seeds, salt: int, x: Tensor, states: Any, weights: Sequence[Tensor], has_biases: bool,
    layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A stack of recurrent layers, one after the other, with dropout between them; steps come first."""
    x = x.transpose(0, 1) if batch_first else x
    ways, each = 1 + bidirectional, len(weights) // layers
    last: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        rows = slice(layer * ways, (layer + 1) * ways)
        own = [state[rows] for state in states] if isinstance(states, list) else states[rows]
        of_layer = weights[layer * each : (layer + 1) * each]
        x, *final = target(x, own, of_layer, has_biases, 1, 0.0, train, bidirectional, False)
        last.append(tuple(final))
        if dropout and train and layer < layers - 1:
            x = _dropout(seeds, salt + layer, x, dropout)
    return (x.transpose(0, 1) if batch_first else x, *(torch.cat(parts) for parts in zip(*last)))


def _bags(
    table: Tensor, ids: Tensor, offsets: Tensor, by_frequency: bool = False, mode: int = 0, sparse: bool = False,
    weights: Tensor | None = None, with_last: bool = False, padding_idx: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """embedding_bag as torch documents it; the results after the first are of its kernel."""
    bags = torch.arange(len(offsets) - with_last)
    kind, padding = ("sum", "mean", "max")[mode], -1 if padding_idx is None else padding_idx
    return embedding_bags(table, ids, offsets, bags, weights, None, kind, padding), offsets, offsets, offsets


DRAWING: dict[Any, Callable[..., Tensor]] = {
    aten.dropout.default: _dropout,
    aten.uniform.default: _uniform,
    aten.rand_like.default: _uniform,
    aten.randn.default: _normal,
    aten.randn_like.default: _normal,
    aten.bernoulli.default: _coins,
    aten.bernoulli.p: _coins,
    aten.scaled_dot_product_attention.default: _attention,
}

# what torch would take apart in a way that the field has no exact numbers for, as roots of a scale
COMPOSITES: dict[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: partial(_attention, Seeds(0), 0),
    aten.stft.default: spectrogram,
    aten.embedding_bag.padding_idx: _bags,
    aten.embedding_bag.default: _bags,
    **WRITTEN,
}
