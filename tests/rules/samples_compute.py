"""Sample calls of contractions, reductions, images and recurrent layers. See samples.py."""

from __future__ import annotations

from typing import Any

import torch

from autopar.operators import (
    hybrid_attention,
    masked_attention,
    padded_convolution,
    ring_attention,
    rows_attention,
)
from autopar.operators.bags import EMBEDDING_BAGS
from autopar.operators.experts import EXPERT_LINEAR
from autopar.operators.recurrent import RECURRENT_LAYER
from autopar.verification.rule_check import Sample
from tests.rules.tensors import above, call, flags, ints, unit, x

aten = torch.ops.aten

_Q, _K, _V = x(2, 4, 5, 6), x(2, 4, 3, 6), x(2, 4, 3, 2)
_TABLE = x(12, 6)
_PARTS = x(6, 2, 4, 4), x(6, 2, 4, 4), x(6, 2, 4, 2)
_GROUPED = x(2, 12, 4, 2), x(2, 6, 4, 2), x(2, 6, 4, 2)
_RANK = torch.tensor(0)

CONTRACTIONS: dict[Any, list[Sample]] = {
    aten.linear.default: [
        call(x(2, 6, 4), x(6, 4), x(6)),
        call(x(6, 12), x(4, 12)),
        call(x(6), x(4, 6), x(4)),
        call(x(3, 1), x(6, 1)),
        call(x(6, 4), x(1, 4), x(1)),
        call(x(3, 5), x(7, 5), x(7), weights=(1, 2)),
        call(x(5), x(7, 5), weights=(1,)),
        call(x(3, 5), x(7, 5)),
        call(x(2, 18), x(18, 18), x(18)),
    ],
    EXPERT_LINEAR: [
        call(x(6, 4), x(3, 4, 6), ints(3, 6)),
        call(x(6, 4), x(3, 4, 6), ints(4, 12)),  # two experts for each row; a fourth expert is none
        call(x(4, 6), x(2, 12, 6).transpose(1, 2), ints(2, 12), weights=(1,)),
        call(x(3, 5), x(2, 5, 7), ints(2, 3), weights=(1,)),
        call(x(1, 4), x(1, 4, 6), ints(1, 6)),
    ],
    aten.mm.default: [call(x(6, 4), x(4, 6)), call(x(1, 6), x(6, 12))],
    aten.bmm.default: [call(x(6, 4, 2), x(6, 2, 3)), call(x(2, 3, 6), x(2, 6, 4))],
    aten.mv.default: [call(x(6, 4), x(4)), call(x(2, 6), x(6))],
    aten.dot.default: [call(x(6), x(6))],
    aten.outer.default: [call(x(6), x(4))],
    aten.bilinear.default: [call(x(3, 6), x(3, 4), x(6, 6, 4), x(6)), call(x(3, 2), x(3, 6), x(1, 2, 6), None)],
    aten.addmm.default: [
        call(x(6), x(4, 6), x(6, 6)),
        call(x(4, 6), x(4, 2), x(2, 6), beta=2, alpha=0.5),
        call(x(1, 1), x(4, 6), x(6, 3)),
        call(x(4, 1), x(4, 6), x(6, 3)),
    ],
    aten.addmv.default: [call(x(6), x(6, 4), x(4))],
    aten.baddbmm.default: [
        call(x(6, 4, 3), x(6, 4, 2), x(6, 2, 3)),
        call(x(1, 1, 3), x(6, 4, 2), x(6, 2, 3), beta=0.5),
    ],
    aten.addbmm.default: [call(x(4, 3), x(6, 4, 2), x(6, 2, 3))],
    aten.matmul.default: [
        call(x(6, 4), x(4, 3)),
        call(x(2, 6, 4), x(4, 3)),
        call(x(6, 1, 4, 2), x(3, 2, 6)),
        call(x(6), x(6)),
        call(x(6), x(2, 6, 3)),
        call(x(2, 3, 6), x(6)),
        call(x(1, 6, 1), x(6, 1, 4)),
    ],
    aten.einsum.default: [
        call("bid,bjd->bij", [x(6, 4, 2), x(6, 3, 2)]),
        call("nc, ecf -> enf", [x(6, 4), x(3, 4, 2)]),
        call("...ij,...jk->...ik", [x(6, 2, 3), x(1, 3, 4)]),
        call("ij,jk", [x(6, 4), x(4, 3)]),
        call("ii->i", [x(6, 6)]),
        call("bhqd,bhkd,b->hqk", [x(2, 6, 3, 2), x(2, 6, 2, 2), x(2)]),
        call("ij->", [x(6, 4)]),
    ],
    aten.embedding.default: [
        call(_TABLE, ints(12, 6, 4)),
        call(x(7, 5), ints(7, 6)),
        call(x(12, 6), ints(12, 6, 2), 3),
        call(x(12, 6), ints(12, 6), -1, True),
        call(x(6, 1), torch.tensor(3)),
        call(x(7, 5), ints(7, 6), 6),
    ],
    aten.embedding_bag.padding_idx: [
        call(_TABLE, ints(12, 8), torch.tensor([0, 2, 5]), False, 0, False, None, False, None),
        call(_TABLE, ints(12, 8), torch.tensor([0, 2, 5]), False, 1, False, None, False, 3),
        call(_TABLE, ints(12, 8), torch.tensor([0, 2, 5]), False, 0, False, unit(8), False, None),
        call(_TABLE, ints(12, 8), torch.tensor([0, 2]), False, 2, False, None, False, None),
    ],
    EMBEDDING_BAGS: [
        call(_TABLE, ints(12, 6, 4), None, None, None, None, "sum", -1),
        call(_TABLE, ints(12, 6, 4), None, None, x(6, 4), None, "sum", 3),
        call(x(7, 6), ints(7, 6, 3), None, None, None, None, "mean", 2),
        call(_TABLE, ints(12, 6, 3), None, None, None, None, "max", -1),
        call(_TABLE, ints(12, 1, 3), None, None, None, None, "sum", -1),
        call(_TABLE, ints(12, 9), torch.tensor([0, 2, 2, 5, 6, 9]), torch.arange(6), None, None, "mean", -1),
        call(_TABLE, ints(12, 9), torch.tensor([0, 2, 2, 5, 6, 8, 9]), torch.arange(6), x(9), None, "sum", 1),
        call(_TABLE, ints(12, 9), torch.tensor([1, 2, 2, 5, 6, 8]), torch.arange(4), None, None, "max", 1),
    ],
    aten.scaled_dot_product_attention.default: [
        call(_Q, _K, _V),
        call(x(6, 2, 5, 4), x(6, 2, 5, 4), x(6, 2, 5, 4), None, 0.0, True),
        call(x(2, 12, 5, 2), x(2, 6, 5, 2), x(2, 6, 5, 2), None, 0.0, True, enable_gqa=True),
        call(x(2, 6, 5, 2), x(2, 1, 5, 2), x(2, 1, 5, 2), enable_gqa=True),
        call(x(2, 6, 3, 2), x(2, 6, 4, 2), x(2, 6, 4, 2), x(2, 6, 3, 4)),
        call(x(2, 6, 3, 2), x(2, 6, 4, 2), x(2, 6, 4, 2), x(6, 1, 4)),
        call(x(6, 2, 3, 2), x(6, 2, 4, 2), x(6, 2, 4, 2), flags(6, 1, 1, 4) | (torch.arange(4) == 0)),
        call(x(2, 6, 3, 2), x(2, 6, 4, 2), x(2, 6, 4, 2), x(3, 4), scale=0.3),
        call(x(6, 3, 2), x(6, 4, 2), x(6, 4, 2)),
        call(x(3, 2), x(4, 2), x(4, 2)),
        call(x(2, 6, 3, 4, 2), x(2, 6, 3, 4, 2), x(2, 6, 3, 4, 2)),
        call(x(1, 1, 3, 2), x(1, 1, 3, 2), x(1, 1, 3, 2)),
    ],
    masked_attention: [
        call(x(6, 2, 5, 4), x(6, 2, 5, 4), x(6, 2, 5, 4), None, [], "j<=i & i-j<2"),
        call(x(6, 2, 5, 4), x(6, 2, 5, 4), x(6, 2, 5, 4), None, [flags(6, 5), ints(3, 5)], "v0[j] & v1[i]==v1[j]", 0.3),
        call(x(2, 12, 5, 2), x(2, 6, 5, 2), x(2, 6, 5, 2), x(12, 5, 5), [ints(2, 2, 5)], "v0[i]<=v0[j]"),
        call(x(4, 6, 3, 2), x(4, 6, 4, 2), x(4, 6, 4, 2), x(4, 1, 1, 4), [flags(1, 4)], "v0[j] | j<2"),
        call(x(6, 3, 2), x(6, 4, 2), x(6, 4, 2), None, [flags(6, 4)], "v0[j] | j<2"),
        call(x(2, 6, 3, 4, 2), x(2, 6, 3, 4, 2), x(2, 6, 3, 4, 2), None, [flags(6, 4)], "v0[j] & j<=i"),
    ],
    # on an axis of one rank, which has all positions: what their collectives do is not for rules of other axes
    ring_attention: [
        call(*_PARTS, None, [flags(6, 4)], _RANK, "sp", 1, False, "v0[j] & j<=i", [], None),
        call(*_GROUPED, x(12, 4, 4), [], _RANK, "sp", 1, True, "", [], 0.3),
    ],
    rows_attention: [
        call(*_PARTS, None, [flags(6, 4)], _RANK, 1, False, "v0[j] & j<=i", None),
        call(*_GROUPED, x(2, 12, 4, 4), [], _RANK, 1, True, "j<=i", 0.3),
    ],
    hybrid_attention: [
        call(*_PARTS, [flags(6, 4)], _RANK, "sp:inner1", "sp:outer1", 1, 1, False, "v0[j] & j<=i", [], None),
        call(*_GROUPED, [], _RANK, "sp:inner1", "sp:outer1", 1, 1, True, "j<=i", [], 0.3),
    ],
}

_REDUCED = [call(x(6, 4)), call(x(4, 1, 6), [0]), call(x(6, 4, 3), [-1, 0], True), call(x(3, 12), [1]), call(x(6), [0])]
_ONE_DIM = [call(x(6, 4), 0), call(x(6, 4, 3), -1, True), call(x(4, 6, 1), 0)]
_EACH = [call(x(6, 4)), call(x(12))]
_SPREAD = [
    call(x(6, 4), [0], correction=1),
    call(x(4, 6, 3), [-1], correction=0, keepdim=True),
    call(x(6, 4), None, correction=1),
]
_STD = [call(x(6, 4), [0]), call(x(4, 6, 3), [0, 2], True, True)]
_PICKED = [call(x(6, 4), 2), call(x(6, 4), 2, 0), call(x(6, 1, 4), 3, -1, True)]

REDUCTIONS: dict[Any, list[Sample]] = {
    aten.sum.default: [*_EACH, call(ints(5, 6, 4)), call(flags(6, 4))],
    aten.sum.dim_IntList: [*_REDUCED[1:], call(x(6, 4), []), call(x(7, 4), [1]), call(flags(6, 4), [0])],
    aten.mean.default: [*_EACH, call(ints(3, 6, 4), dtype=torch.float64)],
    aten.mean.dim: [
        *_REDUCED[1:],
        call(x(6, 4), None),
        call(x(7, 4), [1]),
        call(ints(3, 6, 4), [0], dtype=torch.float64),
    ],
    **dict.fromkeys((aten.amax.default, aten.amin.default), [*_REDUCED, call(ints(9, 6, 4), [1])]),
    **dict.fromkeys((aten.max.default, aten.min.default), [*_EACH, call(ints(9, 6, 4))]),
    **dict.fromkeys((aten.max.dim, aten.min.dim), _ONE_DIM),
    **dict.fromkeys((aten.argmax.default, aten.argmin.default), [*_ONE_DIM, call(x(6, 4))]),
    **dict.fromkeys(
        (aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction), _SPREAD
    ),
    **dict.fromkeys((aten.var.dim, aten.std.dim, aten.var_mean.dim, aten.std_mean.dim), _STD),
    **dict.fromkeys((aten.var.default, aten.std.default, aten.var_mean.default), _EACH),
    aten.median.default: [call(x(5, 3))],
    aten.median.dim: [call(x(6, 4), 0), call(x(5, 6), -2, True)],
    aten.quantile.scalar: [call(x(6, 4), 0.3), call(x(6, 4), 0.5, 1), call(x(4, 6), 0.5, 0, True)],
    aten.nanmean.default: [call(x(6, 4)), call(x(6, 4), [1], True)],
    aten.aminmax.default: [call(x(6, 4)), call(x(6, 4), dim=0), call(x(6, 4), dim=1, keepdim=True)],
    aten.count_nonzero.dim_IntList: [call(ints(2, 6, 4), [1])],
    aten.count_nonzero.default: [call(ints(2, 6, 4), 0), call(ints(2, 6, 4))],
    aten.histc.default: [call(ints(4, 12).double(), 4, 0, 3), call(x(12), 4)],
    **dict.fromkeys((aten.softmax.int, aten.log_softmax.int), [call(x(6, 4), -1), call(x(4, 6, 1), 0), call(x(6), 0)]),
    **dict.fromkeys(
        (aten._softmax.default, aten._log_softmax.default), [call(x(6, 4), 1, False), call(x(4, 6), 0, False)]
    ),
    **dict.fromkeys(
        (aten.cumprod.default, aten.cummax.default, aten.cummin.default, aten.logcumsumexp.default),
        [call(x(6, 4), 1), call(x(4, 1, 6), 0)],
    ),
    aten.topk.default: _PICKED,
    aten.sort.default: [call(x(6, 4)), call(x(6, 4), 0, True)],
    aten.sort.stable: [call(x(6, 4), stable=True), call(x(6, 4), stable=True, dim=0, descending=True)],
    aten.argsort.default: [call(x(6, 4)), call(x(6, 4), 0)],
    aten.layer_norm.default: [
        call(x(6, 4, 5), [5], x(5), x(5)),
        call(x(6, 4, 3), [4, 3]),
        call(x(6, 4), [4], x(4)),
        call(x(6, 4), [4], None, x(4)),
        call(x(6, 1), [1], x(1), x(1)),
    ],
    aten.rms_norm.default: [
        call(x(6, 4, 5), [5], x(5)),
        call(x(6, 4), [4], None, 1e-6),
        call(x(6, 4, 3), [4, 3], x(4, 3)),
    ],
    aten._weight_norm.default: [call(x(6, 4), x(6, 1)), call(x(4, 6, 3), x(1, 6, 1), 1)],
    aten.cosine_similarity.default: [call(x(6, 4), x(6, 4)), call(x(4, 6, 3), x(6, 3), 0), call(x(6, 4), x(1, 4), -1)],
    aten.linalg_cross.default: [call(x(6, 3), x(6, 3)), call(x(3, 6), x(3, 1), dim=0)],
    aten.cdist.default: [call(x(6, 4, 2), x(6, 3, 2)), call(x(6, 2), x(4, 2)), call(x(1, 6, 2), x(3, 4, 2))],
}

_IMAGE = x(2, 4, 6, 5)
_BIAS = x(6)


_POOL_2D = [call(x(6, 4, 6, 4), [2, 2]), call(x(6, 6, 4), [2, 2])]
_ADAPTIVE = [call(x(6, 4, 6, 4), [2, 2]), call(x(6, 1, 4, 4), [1, 1])]
_RESIZE = [call(x(6, 4, 3, 3), None, False, [2.0, 2.0]), call(x(2, 6, 3, 3), [4, 5], True, None)]

SPATIAL: dict[Any, list[Sample]] = {
    padded_convolution: [
        call(x(2, 6, 5), x(6, 3, 2), x(6), 2, 1, 0, [1], [0], [1], 2),
        call(x(6, 4, 5, 3), x(6, 4, 2, 1), None, 3, 0, 2, [1, 1], [1, 0], [1, 2], 1),
    ],
    aten.conv1d.default: [
        call(x(2, 4, 8), x(6, 4, 3), _BIAS, [1], [1]),
        call(x(4, 8), x(6, 4, 3)),
        call(x(6, 6, 8), x(6, 1, 3), x(6), [1], [2], [1], 6),
    ],
    aten.conv2d.default: [
        call(_IMAGE, x(6, 4, 3, 3), _BIAS, [1, 1], [1, 1]),
        call(x(6, 1, 4, 4), x(4, 1, 2, 2), None, [2, 2]),
        call(x(2, 12, 4, 4), x(12, 2, 3, 3), x(12), [1, 1], [0, 0], [1, 1], 6),
        call(x(2, 8, 4, 4), x(24, 4, 1, 1), groups=2),
        call(x(4, 5, 5), x(6, 4, 2, 2), x(6)),
    ],
    aten.conv3d.default: [call(x(2, 4, 3, 3, 3), x(6, 4, 2, 2, 2), _BIAS)],
    aten.conv1d.padding: [call(x(2, 4, 8), x(6, 4, 3), _BIAS, [1], "same")],
    aten.conv2d.padding: [
        call(_IMAGE, x(6, 4, 3, 3), _BIAS, [1, 1], "valid"),
        call(x(2, 6, 4, 4), x(6, 1, 3, 3), None, [1, 1], "same", [1, 1], 6),
    ],
    aten.conv3d.padding: [call(x(2, 4, 3, 3, 3), x(6, 4, 2, 2, 2), None, [1, 1, 1], "same")],
    aten.conv_transpose1d.default: [
        call(x(2, 4, 5), x(4, 6, 3), _BIAS),
        call(x(2, 6, 5), x(6, 2, 3), x(12), [2], [0], [0], 6),
    ],
    aten.conv_transpose2d.input: [
        call(_IMAGE, x(4, 6, 2, 2), _BIAS, [2, 2]),
        call(x(2, 12, 3, 3), x(12, 2, 2, 2), groups=6),
        call(x(4, 3, 3), x(4, 6, 2, 2)),
    ],
    aten.conv_transpose3d.input: [call(x(2, 4, 3, 3, 3), x(4, 6, 2, 2, 2), _BIAS)],
    aten.avg_pool1d.default: [call(x(6, 4, 8), [2])],
    aten.avg_pool2d.default: _POOL_2D,
    aten.avg_pool3d.default: [call(x(6, 4, 4, 4, 4), [2, 2, 2])],
    aten.adaptive_avg_pool1d.default: [call(x(6, 4, 8), [2]), call(x(6, 8), [1])],
    aten.adaptive_avg_pool2d.default: _ADAPTIVE,
    aten.adaptive_avg_pool3d.default: [call(x(6, 4, 4, 4, 4), [1, 1, 1])],
    aten.max_pool1d.default: [call(x(6, 4, 8), [2])],
    **dict.fromkeys((aten.max_pool2d.default, aten.max_pool2d_with_indices.default), _POOL_2D),
    aten.max_pool3d.default: [call(x(6, 4, 4, 4, 4), [2, 2, 2])],
    aten.adaptive_max_pool1d.default: [call(x(6, 4, 8), [2])],
    aten.adaptive_max_pool2d.default: _ADAPTIVE,
    aten.upsample_nearest1d.vec: [call(x(6, 4, 3), None, [2.0])],
    **dict.fromkeys(
        (aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec),
        [call(x(6, 4, 3, 3), None, [2.0, 2.0]), call(x(2, 6, 3, 3), [4, 5], None)],
    ),
    aten.upsample_nearest3d.vec: [call(x(6, 4, 2, 2, 2), None, [2.0, 2.0, 2.0])],
    aten.upsample_linear1d.vec: [call(x(6, 4, 3), None, False, [2.0])],
    **dict.fromkeys(
        (
            aten.upsample_bilinear2d.vec,
            aten.upsample_bicubic2d.vec,
            aten._upsample_bilinear2d_aa.vec,
            aten._upsample_bicubic2d_aa.vec,
        ),
        _RESIZE,
    ),
    aten.upsample_trilinear3d.vec: [call(x(6, 4, 2, 2, 2), None, False, [2.0, 2.0, 2.0])],
    aten.group_norm.default: [
        call(x(6, 4, 5), 2, x(4), x(4)),
        call(x(2, 12, 3, 3), 6),
        call(x(6, 4, 5), 1, x(4), x(4)),
        call(x(2, 6, 3), 6, x(6), None),
    ],
    aten.instance_norm.default: [
        call(x(6, 4, 5), x(4), x(4), None, None, True, 0.1, 1e-5, False),
        call(x(6, 4, 5), None, None, None, None, True, 0.1, 1e-5, False),
    ],
    aten._native_batch_norm_legit_functional.default: [
        call(x(4, 6, 3), x(6), x(6), x(6), above(6), True, 0.1, 1e-5, still=(3, 4))
    ],
    aten._native_batch_norm_legit.no_stats: [
        call(x(4, 6, 3), x(6), x(6), True, 0.1, 1e-5),
        call(x(6, 4), None, None, True, 0.1, 1e-5),
    ],
    aten._native_batch_norm_legit_no_training.default: [
        call(x(4, 6, 3), x(6), x(6), x(6), above(6), 0.1, 1e-5, still=(3, 4)),
        call(x(6, 4), x(4), x(4), x(4), above(4), 0.1, 1e-5, still=(3, 4)),
    ],
    aten.pixel_shuffle.default: [call(x(2, 12, 3, 4), 2), call(x(24, 6, 4), 2)],
    aten.pixel_unshuffle.default: [call(x(2, 3, 12, 4), 2), call(x(1, 6, 4, 4), 2)],
    aten.channel_shuffle.default: [call(x(6, 4, 3, 3), 2)],
    aten.im2col.default: [
        call(x(6, 4, 4, 4), [2, 2], [1, 1], [0, 0], [2, 2]),
        call(x(6, 3, 3), [2, 2], [1, 1], [0, 0], [1, 1]),
    ],
    aten.col2im.default: [
        call(x(6, 16, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]),
        call(x(2, 24, 6), [3, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    ],
    aten.grid_sampler.default: [
        call(x(6, 4, 3, 3), unit(6, 2, 4, 2), 0, 0, False),
        call(x(2, 6, 3, 3), unit(2, 6, 3, 2), 1, 1, True),
    ],
}


def _weights(gates: int, inputs: int, hidden: int) -> list[Any]:
    return [x(gates * hidden, inputs), x(gates * hidden, hidden), x(gates * hidden), x(gates * hidden)]


RECURRENT: dict[Any, list[Sample]] = {
    RECURRENT_LAYER: [
        call(x(5, 6, 3), [x(6, 2), x(6, 2)], _weights(4, 3, 2), "lstm"),
        call(x(2, 4, 3), [x(4, 2), x(4, 6)], [x(24, 3), x(24, 2), x(2, 6)], "lstm"),
        call(x(5, 6, 6), [x(6, 2)], _weights(3, 6, 2), "gru"),
        call(x(5, 6, 3), [x(6, 2)], _weights(1, 3, 2)[:2], "rnn_tanh"),
        call(x(3, 1, 3), [x(1, 2)], _weights(1, 3, 2), "rnn_relu"),
    ],
}
