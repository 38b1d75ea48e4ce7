"""Decomposing as torch does, with the same operators and the same state of the process afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import exported_program

from autopar.frontend import kept_composites
from autopar.frontend.kept_composites import decomposed

aten = torch.ops.aten


class Composites(nn.Module):
    """Composites that stay, others that alias or draw, and operators that write."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.norm = nn.Linear(4, 8), nn.Dropout(0.5), nn.RMSNorm(8)
        self.table = nn.Embedding(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.dropout(self.first(self.table(ids))))
        x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        scores = torch.einsum("bsd,btd->bst", x, x).clone()
        scores[..., 0].square_()
        return nn.functional.cross_entropy(scores.flatten(0, 1), ids.flatten() % 4)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x.clone().mul_(2)).mean()


@pytest.fixture(autouse=True)
def nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kept_composites, "_prepared", None)
    monkeypatch.setattr(kept_composites, "_listed", None)
    yield


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (x,), strict=False)


def state() -> tuple[dict[Any, dict[Any, Any]], dict[Any, Any]]:
    rules = kept_composites._rules_of_fake_tensors()
    assert rules is not None
    operators = exported_program._collect_all_valid_cia_ops()
    return {op: dict(op.py_kernels) for op in operators}, dict(rules)


def texts() -> list[str]:
    models = [(Plain(), torch.randn(3, 4)), (Composites(), torch.randint(0, 5, (2, 4)))]
    return [str(decomposed(exported(model, x)).graph) for model, x in models]


def test_the_same_graphs_as_torchs_own_and_nothing_is_left() -> None:
    models = [(Plain(), torch.randn(3, 4)), (Composites(), torch.randint(0, 5, (2, 4)))]
    own = [str(exported(model, x).run_decompositions({}).graph) for model, x in models]
    before = state()
    for _ in range(3):
        assert texts() == own
        assert state() == before
    assert "aten.linear.default" in own[1] and "aten.scaled_dot_product_attention.default" in own[1]
    assert "square_" not in own[1] and "mul_" not in own[0]


def test_torch_prepares_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear where torch has other names: then each compile takes as long as it did, and this says why."""
    calls: list[str] = []
    for name in (kept_composites._LIST, kept_composites._OVERRIDE):
        torchs = getattr(exported_program, name)
        monkeypatch.setattr(
            exported_program, name, lambda *args, name=name, torchs=torchs: calls.append(name) or torchs(*args)
        )
    assert len(set(texts() + texts())) == 2
    assert calls == [kept_composites._LIST, kept_composites._OVERRIDE]


def test_an_error_leaves_torch_as_it_was() -> None:
    before = state()
    for _ in range(2):
        texts()
        program = exported(Plain(), torch.randn(3, 4))
        program.graph_module.forward = None
        next(node for node in program.graph.nodes if node.op == "call_function").target = aten.cholesky.default
        with pytest.raises(Exception, match="cholesky"):
            decomposed(program)
        assert state() == before


def test_composites_that_are_registered_later_are_kept_too() -> None:
    texts()
    library = torch.library.Library("kept_composites", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.kept_composites.twice(x.clone().mul_(2))

    found = decomposed(exported(Twice(), torch.randn(3)))
    assert "kept_composites.twice" in str(found.graph)
    library._destroy()
    del library
    assert len(texts()) == 2
