"""The operators that are jointly linear in some of their arguments: every row of the table against the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.ir.operator_facts import FACTS, linear_in
from autopar.operators.straight_through import STRAIGHT_THROUGH

aten = torch.ops.aten
LINEAR = {name: row.linear for name, row in FACTS.items() if row.linear}


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def z(*shape: int) -> Tensor:
    return torch.complex(x(*shape), x(*shape, 1).squeeze(-1))


ROWS, PICKS, MASK = torch.tensor([2, 0, 1]), torch.tensor([[0, 2], [1, 1]]), x(4, 3) > 0
SAMPLES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "add": (aten.add.Tensor, (x(4, 3), x(3))),
    "subtract": (aten.subtract.Tensor, (x(4, 3), x(3))),
    "sub": (aten.sub.Tensor, (x(4, 3), x(3))),
    "rsub": (aten.rsub.Tensor, (x(4, 3), x(3))),
    "slice_scatter": (aten.slice_scatter.default, (x(4, 3), x(2, 3), 0, 1, 3)),
    "select_scatter": (aten.select_scatter.default, (x(4, 3), x(3), 0, 1)),
    "diagonal_scatter": (aten.diagonal_scatter.default, (x(3, 3), x(3))),
    "complex": (aten.complex.default, (x(3), x(3))),
    "multiply": (aten.multiply.Tensor, (x(4, 3), x(3))),
    "mul": (aten.mul.Tensor, (x(4, 3), x(3))),
    "mm": (aten.mm.default, (x(4, 3), x(3, 2))),
    "bmm": (aten.bmm.default, (x(2, 4, 3), x(2, 3, 2))),
    "mv": (aten.mv.default, (x(4, 3), x(3))),
    "dot": (aten.dot.default, (x(3), x(3))),
    "matmul": (aten.matmul.default, (x(2, 4, 3), x(3, 2))),
    "neg": (aten.neg.default, (x(3),)),
    "divide": (aten.divide.Tensor, (x(4, 3), x(3))),
    "true_divide": (aten.true_divide.Tensor, (x(4, 3), x(3))),
    "div": (aten.div.Tensor, (x(4, 3), x(3))),
    "clone": (aten.clone.default, (x(3),)),
    "_to_copy": (aten._to_copy.default, (x(3),)),
    "cat": (aten.cat.default, ([x(4, 3), x(2, 3)],)),
    "stack": (aten.stack.default, ([x(4, 3), x(4, 3)],)),
    "sum": (aten.sum.dim_IntList, (x(4, 3), [0])),
    "mean": (aten.mean.dim, (x(4, 3), [1])),
    "cumsum": (aten.cumsum.default, (x(4, 3), 0)),
    "flip": (aten.flip.default, (x(4, 3), [0])),
    "roll": (aten.roll.default, (x(4, 3), [1], [0])),
    "gather": (aten.gather.default, (x(2, 3), 1, PICKS)),
    "index": (aten.index.Tensor, (x(4, 3), [ROWS])),
    "index_select": (aten.index_select.default, (x(4, 3), 0, ROWS)),
    "take": (aten.take.default, (x(4, 3), PICKS)),
    "repeat": (aten.repeat.default, (x(4, 3), [2, 1])),
    "tril": (aten.tril.default, (x(4, 3),)),
    "triu": (aten.triu.default, (x(4, 3),)),
    "trace": (aten.trace.default, (x(3, 3),)),
    "diag_embed": (aten.diag_embed.default, (x(3),)),
    "embedding": (aten.embedding.default, (x(4, 3), PICKS)),
    "_conj": (aten._conj.default, (z(3),)),
    "_conj_physical": (aten._conj_physical.default, (z(3),)),
    "_fft_r2c": (aten._fft_r2c.default, (x(4, 3), [0], 0, True)),
    "_fft_c2c": (aten._fft_c2c.default, (z(4, 3), [0], 0, True)),
    "_fft_c2r": (aten._fft_c2r.default, (z(4, 3), [0], 0, 6)),
    "im2col": (aten.im2col.default, (x(1, 2, 4, 4), [2, 2], [1, 1], [0, 0], [2, 2])),
    "col2im": (aten.col2im.default, (x(1, 8, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2])),
    "avg_pool2d": (aten.avg_pool2d.default, (x(1, 2, 4, 4), [2, 2])),
    "_adaptive_avg_pool2d": (aten._adaptive_avg_pool2d.default, (x(1, 2, 4, 4), [2, 2])),
    "upsample_nearest2d": (aten.upsample_nearest2d.default, (x(1, 2, 4, 4), [8, 8])),
    "upsample_bilinear2d": (aten.upsample_bilinear2d.default, (x(1, 2, 4, 4), [8, 8], False)),
    "reflection_pad2d": (aten.reflection_pad2d.default, (x(1, 2, 4, 4), [1, 1, 1, 1])),
    "replication_pad2d": (aten.replication_pad2d.default, (x(1, 2, 4, 4), [1, 1, 1, 1])),
    "pixel_shuffle": (aten.pixel_shuffle.default, (x(1, 4, 2, 2), 2)),
    "pixel_unshuffle": (aten.pixel_unshuffle.default, (x(1, 1, 4, 4), 2)),
    "_reshape_copy": (aten._reshape_copy.default, (x(4, 3), [12])),
    "lift_fresh_copy": (aten.lift_fresh_copy.default, (x(3),)),
    "scatter": (aten.scatter.src, (x(2, 3), 1, PICKS[:, :1], x(2, 1))),
    "scatter_add": (aten.scatter_add.default, (x(2, 3), 1, PICKS, x(2, 2))),
    "index_add": (aten.index_add.default, (x(4, 3), 0, ROWS, x(3, 3))),
    "index_copy": (aten.index_copy.default, (x(4, 3), 0, ROWS, x(3, 3))),
    "index_fill": (aten.index_fill.int_Scalar, (x(4, 3), 0, ROWS, 0)),
    "where": (aten.where.self, (MASK, x(4, 3), x(3))),
    "masked_fill": (aten.masked_fill.Scalar, (x(4, 3), MASK, 0)),
    "masked_scatter": (aten.masked_scatter.default, (x(4, 3), MASK, x(4, 3))),
    "index_put": (aten.index_put.default, (x(4, 3), [ROWS], x(3, 3))),
    "constant_pad_nd": (aten.constant_pad_nd.default, (x(4, 3), [1, 1])),
    "lerp": (aten.lerp.Scalar, (x(4, 3), x(4, 3), 0.3)),
    "addmm": (aten.addmm.default, (x(2), x(4, 3), x(3, 2))),
    "addmv": (aten.addmv.default, (x(4), x(4, 3), x(3))),
    "baddbmm": (aten.baddbmm.default, (x(2, 4, 2), x(2, 4, 3), x(2, 3, 2))),
    "addcmul": (aten.addcmul.default, (x(4, 3), x(3), x(4, 3))),
    "addcdiv": (aten.addcdiv.default, (x(4, 3), x(3), x(4, 3))),
    "convolution": (
        aten.convolution.default,
        (x(1, 2, 4, 4), x(3, 2, 2, 2), x(3), [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    ),
    "autopar::straight_through": (STRAIGHT_THROUGH, (x(4, 3), x(4, 3))),
    "copy": (aten.copy.default, (x(4, 3), x(3))),
}


def test_every_line_has_a_sample() -> None:
    assert set(SAMPLES) == set(LINEAR)


@pytest.mark.parametrize("name", LINEAR)
def test_the_table_is_right(name: str) -> None:
    target, args = SAMPLES[name]
    assert linear_in(target) == LINEAR[name]
    for group in LINEAR[name]:
        changed = {position for position in group if position < len(args)}
        assert any(isinstance(leaf, Tensor) for position in changed for leaf in pytree.tree_leaves(args[position]))

        def at(factor: float, shift: float, changed: set[int] = changed) -> Tensor:
            def moved(tensor: Tensor) -> Tensor:
                return factor * tensor + shift * tensor.flip(0) * tensor

            given = [pytree.tree_map_only(Tensor, moved, a) if i in changed else a for i, a in enumerate(args)]
            found: Tensor = target(*given)
            return found

        mixed = at(2.0, -3.0)
        assert torch.allclose(mixed, 2 * at(1.0, 0.0) - 3 * at(0.0, 1.0), atol=1e-12)
        assert mixed.abs().max() > 0.1, "a sample that says nothing"
