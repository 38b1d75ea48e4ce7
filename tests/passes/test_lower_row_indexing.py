"""Rows by position: what is a gather, a selection or a choice, and what stays an index."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopar import Mesh, Plan
from autopar.check import check
from autopar.frontend.numerics import input_tensors, run_graph
from tests.passes.canonical import Function, canonical, counts, traced
from tests.selection import one_each

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


class MaskToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.token = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).clone()
        hidden[mask] = self.token
        hidden[..., 0].zero_()
        return self.down(torch.relu(hidden)).square().mean()


class Seeing(nn.Module):
    """Features of images among the tokens with number 3; ``whole_rows``: the mask is that of tokens, expanded."""

    def __init__(self, whole_rows: bool) -> None:
        super().__init__()
        self.embed, self.see, self.out = nn.Embedding(11, 8), nn.Linear(6, 8), nn.Linear(8, 11)
        self.whole_rows = whole_rows

    def forward(self, tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        hidden, features = self.embed(tokens), torch.tanh(self.see(image)).flatten(0, 1)
        mask = (tokens == 3)[..., None]
        mask = mask.expand_as(hidden) if self.whole_rows else mask & (torch.arange(8) != 5)
        hidden = hidden.masked_scatter(mask, features)
        return torch.nn.functional.cross_entropy(self.out(torch.relu(hidden)).flatten(0, 1), tokens.flatten())


MESHES = [Mesh(dp=2), Mesh(tp=2), Mesh(sp=2), Mesh(dp=2, tp=2), Mesh(pp=2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_one_row_under_a_mask(mesh: Mesh) -> None:
    """A parameter in the places of a mask that is an input (masked autoencoders); ``zero_`` of a slice."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 6, 6), "mask": torch.rand(4, 6) < 0.4}
    assert check(MaskToken(), batch, mesh, Plan(microbatches=1)).worst < 1e-12


@pytest.mark.parametrize(
    "mesh, whole_rows", one_each(MESHES, [True, False], [(0, 0), (1, 1), (2, 0), (3, 1), (4, 1)]), ids=str
)
def test_the_next_element_under_a_mask(mesh: Mesh, whole_rows: bool) -> None:
    """Tokens of images lie unevenly over the rows: the features of one rank go to tokens of another."""
    torch.manual_seed(0)
    tokens = torch.tensor([[3, 3, 3, 3, 1, 2], [0, 4, 5, 6, 7, 8], [3, 1, 1, 9, 10, 3], [2, 2, 3, 3, 0, 0]])
    batch = {"tokens": tokens, "image": torch.randn(4, 2, 6)}
    assert check(Seeing(whole_rows), batch, mesh, Plan(microbatches=1)).worst < 1e-12


def test_a_value_for_each_place_stays_a_write() -> None:
    """How many there are, only the mask says: this one has two."""

    def written(x: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.index_put(x, (rows,), values)

    x, rows, values = torch.randn(4, 3), torch.tensor([True, False, True, False]), torch.randn(2, 3)
    program = canonical(traced(Function(written), x, rows, values))
    assert counts(program)["aten.index_put"] == 1


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
