"""A batch that a loader gives, for a model that takes some of it, and the loss of what it does not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.ir.loss import loss_of
from autopar.zoo.fitted_loss import with_fitting_loss

X, Y, NUMBERS = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), torch.randn(4, 2)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(x) * scale


class WithLoss(Classifier):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return functional.cross_entropy(self.linear(x), y), {}


class Any1(Classifier):
    def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return self.linear(inputs[0])


def wanted(model: nn.Module, target: Tensor) -> Tensor:
    linear: Any = model.linear
    of_classes = not target.is_floating_point()
    return (functional.cross_entropy if of_classes else functional.mse_loss)(linear(X), target)


@pytest.mark.parametrize("loss", ["auto", "explicit"])
@pytest.mark.parametrize("target", [Y, NUMBERS], ids=["classes", "numbers"])
def test_a_target_beside_the_inputs(loss: str, target: Tensor) -> None:
    name = "auto" if loss == "auto" else "squared-error" if target is NUMBERS else "cross-entropy"
    for batch in ({"x": X, "label": target}, (X, 2.0, target)):
        factor = 2.0 if isinstance(batch, tuple) else 1.0
        made = with_fitting_loss(Classifier(), batch, name, "it")
        of_name, linear = loss_of(made.model(**made.batch)), made.model.linear
        call = made.model(*batch) if isinstance(batch, tuple) else made.model(**batch)
        fits = functional.mse_loss if target is NUMBERS else functional.cross_entropy
        assert torch.equal(loss_of(call), fits(linear(X) * factor, target)) and torch.equal(of_name, loss_of(call))
        assert bool(made.words) == (loss == "auto")
        assert set(dict(made.model.named_parameters())) == {"linear.weight", "linear.bias"}


def test_a_target_before_an_argument_with_a_default() -> None:
    made = with_fitting_loss(Classifier(), (X, Y), "cross-entropy", "it")
    assert torch.equal(loss_of(made.model(X, Y)), wanted(made.model, Y)), "it would be taken for the scale"


def test_a_model_that_returns_its_loss_is_left_as_it_is() -> None:
    for batch in ((X, Y), {"y": Y, "x": X}):
        model = WithLoss()
        made = with_fitting_loss(model, batch, "auto", "it")
        assert made.model is model and type(model) is WithLoss and not made.words
        assert list(made.batch) == (["x", "y"] if isinstance(batch, tuple) else ["y", "x"])
    assert with_fitting_loss(Any1(), (X, X), "none", "it").batch.keys() == {"0", "1"}


WRONG: list[tuple[Any, Any, str, str]] = [
    (WithLoss, {"x": X, "lables": Y}, "auto", "the forward of it needs y, and a batch has x, lables"),
    (
        WithLoss,
        {"x": X, "y": Y, "row": Y},
        "auto",
        "'row', which .* does not take; the model returns a loss without it",
    ),
    (WithLoss, {"x": X, "y": Y, "row": Y}, "none", "'row', which the forward of it does not take"),
    (WithLoss, (X, Y, Y, Y), "auto", "4 entries, and the forward of it takes 2: x, y"),
    (WithLoss, (X,), "none", "the forward of it needs y, and a batch has 1 entries"),
    (Classifier, {"x": X}, "cross-entropy", "compares with an entry of the batch that the model does not take"),
    (Classifier, {"x": X, "y": X}, "auto", r"no loss fits its output \[4, 2\]"),
    (Classifier, (X, Y), "cross-entrpy", "there is no loss"),
]


@pytest.mark.parametrize("kind, batch, loss, said", WRONG, ids=[said for *_, said in WRONG])
def test_a_batch_that_does_not_fit(kind: type[nn.Module], batch: Any, loss: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}(.|\n)*Way out: "):
        with_fitting_loss(kind(), batch, loss, "it")
