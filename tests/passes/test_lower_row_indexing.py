"""Rows by position: what is a gather, a selection or a choice, and what stays an index."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopar.frontend.numerics import input_tensors, run_graph
from tests.passes.canonical import Function, canonical, counts, traced

aten = torch.ops.aten


def test_writing_a_number_under_a_mask_is_a_choice_for_each_element() -> None:
    def masked(x: torch.Tensor, rows: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        x = x * 2
        x[x > 1] = 0
        x[rows] = -1.0
        return torch.index_put(x, (rows,), value)

    x, rows, number = torch.randn(4, 3), torch.tensor([True, False, True, False]), torch.tensor([5.0])
    program = canonical(traced(Function(masked), x, rows, number))
    assert counts(program)["aten.where.self"] == 3 and not counts(program)["aten.index_put"]
    (found,) = run_graph(program.graph, input_tensors(program, Function(masked), (x, rows, number), {}))
    assert torch.equal(found, masked(x, rows, number))


def test_rows_written_by_position_stay_a_write() -> None:
    def written(x: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.concat([x.index_put((rows,), values), torch.index_put(x, (rows > 1,), values[:2])])

    x, rows, values = torch.randn(4, 3), torch.tensor([0, 3, 2, 1]), torch.randn(4, 3)
    program = canonical(traced(Function(written), x, rows, values))
    assert counts(program)["aten.index_put"] == 2 and counts(program)["aten.cat"] == 1


@pytest.mark.parametrize("picks", [torch.tensor([1, -1, 0, 4]), torch.tensor([[1, 4], [-2, 0], [0, 0], [3, -5]])])
def test_rows_that_each_pick_their_own_are_gathered(picks: torch.Tensor) -> None:
    rows = (4,) if picks.dim() == 1 else (4, 1)
    model, x = Function(lambda x, picks: x[torch.arange(4).reshape(rows), picks]), torch.randn(4, 5, 3)
    program = canonical(traced(model, x, picks))
    assert counts(program)["aten.gather"] == 1 and not counts(program)["aten.index.Tensor"]
    (found,) = run_graph(program.graph, [x, picks])
    assert torch.equal(found, model(x, picks))


def test_rows_that_all_pick_the_same_are_selected() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:  # as Hugging Face looks up attention masks
        rows, places = torch.arange(4)[:, None, None, None], torch.arange(5)[None, None, None, :]
        return x[rows, places]

    x = torch.randn(4, 6) > 0
    program = canonical(traced(Function(masked), x))
    assert counts(program)["aten.index_select"] == 1 and not counts(program)["aten.index.Tensor"]
    (found,) = run_graph(program.graph, input_tensors(program, nn.Identity(), (x,), {}))
    assert torch.equal(found, masked(x))


def test_an_index_that_pairs_other_rows_stays() -> None:
    x, picks = torch.randn(5, 5, 3), torch.tensor([1, 0, 2, 4])
    program = canonical(traced(Function(lambda x, picks: x[torch.arange(4), picks]), x, picks))
    assert counts(program)["aten.index.Tensor"] == 1
