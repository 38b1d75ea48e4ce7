"""Every architecture of the zoo, and every model of ours, on dp x tp: exact, and split but for the known exceptions."""

from __future__ import annotations

import pytest

from autopar import zoo
from autopar.commands.coverage import OWN_FAMILY, measure
from autopar.mesh import Mesh
from autopar.verification.coverage import Case
from autopar.zoo.named import OURS

CASE = Case("dp=2,tp=2", Mesh(dp=2, tp=2))
NOT_ALL_SPLIT = {  # and what the report says of them
    "clip": "all_gather over dp",  # a contrastive loss compares every text with every image
    "siglip": "all_gather over dp",
    "resnet": "statistics of batch normalisation",
    "segformer": "1 heads",
    "models.cnn": "statistics of batch normalisation",
    "models.lstm": "recurrent_layer",
}
QUICK = {  # one of each kind; the others take long together: pytest -m slow tests/zoo/test_zoo.py
    "llama", "gpt2", "bloom", "mixtral", "deberta_v2", "whisper", "mamba2", "models.dlrm", "models.lstm",
}  # fmt: skip
NAMES = [*zoo.ARCHITECTURES, *(f"models.{name}" for name in OURS)]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_architecture(name: str) -> None:
    family = OWN_FAMILY if name.startswith("models.") else zoo.architecture(name).family
    if family != OWN_FAMILY:
        pytest.importorskip("transformers")
    found = measure(name, family, [CASE])
    assert not found.failure and not found.unknown, found
    (outcome,) = found.outcomes
    assert outcome.exact, outcome
    if name in NOT_ALL_SPLIT:
        said = " ".join([outcome.failure, *outcome.remarks])
        assert not outcome.passed and NOT_ALL_SPLIT[name] in said, said
    else:
        assert outcome.passed, outcome
