"""Sample calls of operators that rearrange, cut, join, pick or write elements. See samples.py."""

from __future__ import annotations

from typing import Any

import torch

from autopar.ir.collectives import OPS
from autopar.verification.rule_check import Sample
from tests.rules.tensors import call, cplx, distinct, ints, x

aten = torch.ops.aten

_END = 9223372036854775807

_RESHAPES = [
    call(x(6, 4, 3), [24, 3]),
    call(x(24, 3), [6, 4, 3]),
    call(x(2, 6, 1, 4), [12, 4]),
    call(x(6, 4), [4, 6]),
    call(x(3, 6, 4), [3, 4, 2, 3]),
    call(x(2, 9, 4), [2, 6, 6]),
    call(x(2, 6, 4), [2, 3, 2, 4]),
    call(x(4, 36), [4, 3, 6, 2]),
    call(x(4, 3, 6, 2), [4, 36]),
    call(x(6), [1, 6]),
    call(x(2, 6, 4), [2, 4, 6]),
    call(x(1, 1), [1]),
    call(x(12, 12), [144]),
    call(x(5, 3), [5, 1, 3]),
    call(x(7), [7, 1]),
]

VIEWS: dict[Any, list[Sample]] = {
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten._unsafe_view.default), _RESHAPES),
    aten.transpose.int: [call(x(6, 1, 4), 0, -1), call(x(3, 4), -2, 1), call(x(5, 7), 0, 1)],
    aten.permute.default: [call(x(6, 4, 1, 3), [2, 0, -1, 1]), call(x(5, 7), [1, 0])],
    aten.t.default: [call(x(6, 4)), call(x(6))],
    aten.unsqueeze.default: [call(x(6, 4), 1), call(x(6, 4), -1), call(x(1, 5), 0), call(x(), 0)],
    aten.squeeze.dim: [
        call(x(6, 1, 4), 1),
        call(x(6, 1, 4), -2),
        call(x(2, 6), 0),
        call(x(3, 6), 0),
        call(x(2, 1, 4), 1),
    ],
    aten.squeeze.dims: [call(x(6, 1, 4, 1), [1, 3]), call(x(2, 1, 3), [0, 1])],
    aten.squeeze.default: [call(x(1, 6, 1, 4)), call(x(2, 1, 3))],
    aten.expand.default: [call(x(6, 1), [6, 4]), call(x(4), [6, -1]), call(x(1, 6, 1), [3, 2, 6, 4])],
    aten.broadcast_tensors.default: [call([x(6, 1), x(4)]), call([x(6, 4), x(6, 4)])],
    aten.repeat.default: [
        call(x(6, 4), [2, 3]),
        call(x(4), [6, 2]),
        call(x(1, 6), [4, 1]),
        call(x(3, 1, 2), [1, 1, 1, 6]),
    ],
    aten.tile.default: [call(x(6, 4), [2]), call(x(4), [6, 2])],
    aten.repeat_interleave.self_int: [
        call(x(6, 4), 3, 1),
        call(x(6, 4), 4, -2),
        call(x(6, 4), 2),
        call(x(1, 6), 6, 0),
        call(x(6, 4), 2, 0, output_size=12),
    ],
    aten.flip.default: [call(x(6, 4), [0]), call(x(3, 4, 6), [-1, 0])],
    aten.roll.default: [call(x(6, 4), [1], [0]), call(x(6, 4), [2])],
    aten.cumsum.default: [call(x(6, 4), 0), call(x(1, 6, 4), -1), call(ints(5, 6, 4), 1)],
    aten.diff.default: [call(x(6, 4)), call(x(6, 4), 1, 0)],
    **dict.fromkeys(
        (aten.tril.default, aten.triu.default), [call(x(6, 4, 4)), call(x(12, 1, 3, 4), -1), call(x(4, 4))]
    ),
    aten.diagonal.default: [call(x(6, 4, 4), 1, 1, 2), call(x(4, 6, 4), 0, 0, -1)],
    aten.unfold.default: [call(x(6, 8), 1, 4, 2), call(x(8, 6), -2, 3, 1)],
    aten.view_as_complex.default: [call(x(6, 4, 2))],
    aten.view_as_real.default: [call(cplx(6, 4))],
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default), [call(x(3), [6, 4]), call(x(), [6, 1, 4])]),
    aten.new_full.default: [call(x(3), [6, 4], 2.0)],
    **dict.fromkeys((aten.zeros.default, aten.ones.default), [call([6, 4], dtype=torch.float64)]),
    aten.full.default: [call([6, 1, 4], 2.0, dtype=torch.float64)],
    aten.arange.default: [call(6)],
    aten.arange.start: [call(1, 6)],
    aten.arange.start_step: [call(0, 6, 2)],
    aten.scalar_tensor.default: [call(2.0)],
}

_QKV = x(2, 3, 18)

SEGMENTS: dict[Any, list[Sample]] = {
    aten.slice.Tensor: [
        call(x(6, 8), 1, 0, 4),
        call(x(6, 8), 1, 4, _END),
        call(x(6, 8), -1, 2, -2),
        call(_QKV, 2, 0, 6),
        call(_QKV, 2, 12, 18),
        call(x(18, 4), 0, 12, 15),
        call(x(6, 8), 1, 0, _END, 2),
        call(x(6, 12), 1, 1, 12, 2),
        call(x(6, 8), 0, 1, 5, 3),
        call(x(6, 4), 0, 0, 6),
        call(x(6, 4), 1, 2, 3),
        call(x(5, 4), 1, 0, 2),
        call(x(6, 2), 1, 1, 2, 2),
        call(x(6)),
    ],
    aten.split.Tensor: [
        call(x(6, 8), 4, -1),
        call(x(6, 9), 4, 1),
        call(x(6, 4), 3),
        call(x(6, 4), 1, 1),
        call(x(10, 4), 4),
    ],
    aten.split_with_sizes.default: [
        call(x(3, 24), [12, 6, 6], -1),
        call(x(24, 3), [6, 6, 6, 6]),
        call(x(4, 9), [6, 3], 1),
        call(x(4, 5), [2, 3], 1),
    ],
    aten.cat.default: [
        call([x(6, 4), x(6, 4)], 1),
        call([x(6, 4), x(6, 2)], -1),
        call([x(12, 2), x(6, 2), x(6, 2)]),
        call([x(6, 1), x(6, 1)], 1),
        call([x(0), x(6, 4)]),
    ],
    aten.stack.default: [call([x(6, 4), x(6, 4)]), call([x(6, 1), x(6, 1), x(6, 1)], -1)],
    aten.select.int: [call(x(6, 4, 3), 1, 2), call(x(1, 6), 0, 0), call(x(6, 4), -1, -1)],
    aten.unbind.int: [call(x(6, 3)), call(x(6, 3, 1), 1), call(x(2, 6), -1)],
    aten.pad.default: [
        call(x(6, 4), [1, 2]),
        call(x(6, 4), [0, 0, 1, 0], "constant", 2.0),
        call(x(6, 4, 5), [1, 1], "reflect"),
        call(ints(4, 6, 5), [0, 1], "constant", -100),
    ],
    aten.constant_pad_nd.default: [call(x(6, 4), [1, 2]), call(x(6, 4), [0, -1], 1.5), call(x(7, 4), [1, 1])],
    aten.slice_scatter.default: [call(x(6, 8), x(6, 4), 1, 2, 6), call(x(8, 6), x(4, 6), 0, 4, _END)],
    aten.select_scatter.default: [call(x(6, 4), x(6), 1, 2), call(x(4, 6, 1), x(6, 1), 0, -1)],
    aten.glu.default: [call(x(6, 8)), call(x(12, 3), 0), call(x(6, 2), 1)],
}

_PICK = ints(4, 6, 3)
_ROWS = distinct(6, 4)

INDEXING: dict[Any, list[Sample]] = {
    aten.gather.default: [
        call(x(6, 4), 1, ints(4, 6, 6)),
        call(x(6, 4), -1, ints(4, 3, 2)),
        call(x(4, 1, 6), 0, ints(4, 12, 1, 6)),
    ],
    aten.scatter.src: [
        call(x(6, 4), 1, distinct(4, 4).repeat(6, 1), x(6, 4)),
        call(x(6, 4), 1, distinct(4, 2).repeat(3, 1), x(6, 4), still=(0, 2)),
    ],
    aten.scatter.value: [call(x(6, 4), 1, _PICK, 0), call(x(6, 4), 1, _PICK, 1.5)],
    aten.scatter_reduce.two: [call(x(6, 4), 1, _PICK, x(6, 3), "amax"), call(x(6, 4), 1, _PICK, x(6, 3), "mean")],
    aten.scatter_add.default: [
        call(x(6, 4), 1, ints(4, 6, 12), x(6, 12)),
        call(x(6, 4), 0, ints(6, 6, 4), x(6, 4)),
        call(x(6, 4), 1, _PICK, x(6, 4), still=(0, 2)),
    ],
    aten.index.Tensor: [
        call(x(6, 4), [ints(6, 12)]),
        call(x(6, 4, 3), [None, ints(4, 6)]),
        call(x(6, 4, 3), [ints(6, 6), None, ints(3, 6)]),
        call(x(6, 4, 3), [ints(6, 6, 1), ints(4, 1, 4)]),
        call(x(2, 6, 4, 3), [None, ints(6, 1), ints(4, 6)]),
        call(x(6, 4), [torch.tensor(2)]),
    ],
    aten.index_put.default: [
        call(x(6, 4), [_ROWS], x(4, 4)),
        call(x(6, 4), [_ROWS], x(4)),
        call(x(6, 4), [ints(6, 6)], x(6, 4), True),
        call(x(6, 4), [None, ints(4, 6)], x(6, 6), True),
        call(x(6, 4, 3), [ints(6, 6, 1), ints(4, 2)], x(1, 1, 3), True),
    ],
    aten.index_select.default: [
        call(x(6, 4), 1, ints(4, 6)),
        call(x(4, 6), -2, ints(4, 1)),
        call(x(4, 6), 0, torch.tensor(2)),
    ],
    aten.index_add.default: [call(x(6, 4), 1, ints(4, 6), x(6, 6)), call(x(6, 4), 0, ints(6, 12), x(12, 4), alpha=2)],
    aten.index_copy.default: [call(x(6, 4), 0, _ROWS, x(4, 4))],
    aten.index_fill.int_Scalar: [call(x(6, 4), 0, _ROWS, 1.5)],
    aten.one_hot.default: [call(ints(5, 6, 1, 4), 5), call(ints(3, 6), 3)],
    aten.bucketize.Tensor: [call(x(6, 4), torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))],
    aten.searchsorted.Tensor: [
        call(torch.arange(4.0).double(), x(6, 4)),
        call(torch.arange(24.0).double().view(6, 4), x(6, 3)),
    ],
    aten.isin.Tensor_Tensor: [call(ints(4, 6, 4), torch.tensor([1, 3]))],
}


def _where(dim: int, length: int, outer: int = 1, ratio: tuple[int, ...] = (1,)) -> tuple[Any, ...]:
    return ("dp", 2, dim, outer, list(ratio), length)


COLLECTIVES: dict[Any, list[Sample]] = {
    OPS.axis_index.default: [call("dp", outer=2)],
    **dict.fromkeys(
        (OPS.enter.default, OPS.release.default, OPS.keep_first.default),
        [call(x(6, 5), "dp", outer=2), call(x(12), "dp", outer=2)],
    ),
    OPS.all_reduce.default: [call(x(6, 5), "dp", "sum", outer=2), call(x(6, 4), "dp", "max", outer=2)],
    **dict.fromkeys(
        (OPS.all_gather.default, OPS.all_gather_invariant.default, OPS.pad.default),
        [call(x(6, 4), *_where(1, 8), outer=2), call(x(6, 4, 5), *_where(1, 8, 2), outer=2)],
    ),
    **dict.fromkeys(
        (OPS.reduce_scatter.default, OPS.split.default, OPS.split_replicated.default),
        [call(x(6, 8), *_where(1, 8), outer=2), call(x(8, 6, 5), *_where(0, 8, 2), outer=2)],
    ),
    OPS.all_to_all.default: [
        call(x(4, 6, 2), "dp", 2, [0, 1, 1], [2, 1, 1], outer=2),
        call(x(4, 7, 2), "dp", 2, [2, 1, 1], [0, 2, 1], outer=2),
    ],
    OPS.reorder.default: [
        call(x(6, 8), "dp", 2, [1, -2, 1], [1, 1, 1], outer=2),
        call(x(8, 6, 5), "dp", 2, [0, 1, 1], [0, -2, 1], outer=2),
    ],
    OPS.shift.default: [call(x(6, 5), "dp", 2, 1, outer=2)],
}
