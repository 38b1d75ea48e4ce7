"""The parallel program against the unmodified model, in float64: loss, outputs and every gradient, on many meshes."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch

from autopar.analysis.footprint import held, sent
from autopar.check import TOLERANCE, Report, check
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.zoo.named import named_model
from tests.selection import slow_but

HUGGING_FACE = ("hf:llama", "hf:gpt2", "hf:bert", "hf:t5", "hf:vit")
OURS = ("gpt", "llama", "moe", "bert", "t5", "vit", "cnn", "mlp")
MESHES = ("dp=1,tp=1", "dp=2", "dp=3", "dp=4", "tp=2", "tp=3", "tp=4", "dp=2,tp=2", "dp=3,tp=2", "dp=2,tp=4")
# models on torch's own layers, and of other kinds: the share of the parameters that tp has to split
LAYERS = {"transformer": 0.95, "transformer:tiny_classifier": 0.95, "lstm": 0.15, "dlrm": 0.95, "unet": 0.95}
LAYER_MESHES = ("dp=2", "dp=3", "tp=2", "tp=4", "dp=2,tp=2")
WHOLE = {"lstm": {"layers.*": "replicate"}}  # each step needs the whole state of the one before
MEGATRON = ("tp=2", "tp=3", "tp=4", "dp=2,tp=2")


def errors(model: str, mesh: str, plan: Plan, **config: object) -> Report:
    pytest.importorskip("transformers") if model.startswith("hf:") else None
    example = named_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in example.model.parameters():
            if parameter.dim() == 1:  # a bias of zero, or a norm of one, would hide that it is added or used wrongly
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = check(example.model, example.batch, Mesh.parse(mesh), plan)
    assert report.grads and report.worst <= TOLERANCE, report
    return report


# by default on an uneven mesh, the others in the form of Megatron; and on a mesh of one rank
PLAIN = ("hf:gpt2", "hf:bert", "gpt", "moe", "t5", "cnn", "mlp")
ALONE = ("hf:llama", "mlp")


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        (model, mesh)
        if (model, mesh) in {*product(PLAIN, ["dp=3,tp=2"]), *product(ALONE, ["dp=1,tp=1"])}
        else pytest.param(model, mesh, marks=pytest.mark.slow)
        for model, mesh in product(HUGGING_FACE + OURS, MESHES)
    ],
)
def test_equals_the_model(model: str, mesh: str) -> None:
    errors(model, mesh, Plan(check_numerics=False))


@pytest.mark.parametrize("mesh", slow_but([1], LAYER_MESHES))
@pytest.mark.parametrize("model", slow_but([0, 2, 3], LAYERS))
def test_equals_the_model_of_torch_layers(model: str, mesh: str) -> None:
    program = errors(f"models.{model}", mesh, Plan(tensor=WHOLE.get(model, {}), check_numerics=False)).program
    assert {transfer.name for transfer in sent(program) if transfer.axis == "dp"} <= {"all_reduce"}
    shares = held(program)
    assert shares.split.get("tp", shares.whole) >= LAYERS[model] * shares.whole


@pytest.mark.parametrize("mesh", slow_but([1], ["tp=2", "dp=2,tp=2"]))
@pytest.mark.parametrize("model", slow_but([1], ["models.transformer", "models.transformer:tiny_classifier"]))
def test_equals_the_model_of_torch_layers_with_the_sequence_split(model: str, mesh: str) -> None:
    errors(model, mesh, Plan(sequence="megatron", check_numerics=False))


@pytest.mark.parametrize("mesh", slow_but([3], MEGATRON))
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, marks=pytest.mark.slow) if model in (*PLAIN, "hf:t5") else model
        for model in HUGGING_FACE + OURS
    ],
)
def test_equals_the_model_with_the_sequence_split(model: str, mesh: str) -> None:
    errors(model, mesh, Plan(sequence="megatron", check_numerics=False))


@pytest.mark.parametrize("plan", slow_but([0], [Plan(), Plan(sequence="megatron")]), ids=["plain", "megatron"])
def test_fewer_key_value_heads_than_ranks(plan: Plan) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    errors("hf:llama", "tp=4", plan, **config)


@pytest.mark.parametrize("mesh", slow_but([2], ["tp=2", "dp=2,tp=3", "tp=4"]))
def test_vocabulary_and_width_that_do_not_divide(mesh: str) -> None:
    errors("models.gpt", mesh, Plan(), vocab=97)
    errors("models.llama", mesh, Plan(), ff=130, vocab=101)
