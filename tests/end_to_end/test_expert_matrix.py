"""Every mixture of experts on every combination of axes, its rows dealt out evenly and all to the same experts: loss,
outputs and every gradient of two steps, with the router's loss where the model has one, against the unmodified model.

    python -m tests.end_to_end.test_expert_matrix                  the table: the worst error of each
    python -m tests.end_to_end.test_expert_matrix mixtral moe      of these models
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar import zoo
from autopar.check import TOLERANCE, Reference, Report
from autopar.mesh import Mesh
from autopar.models import moe
from autopar.plan import Plan
from autopar.zoo.named import Example, named_model

LAYERS, ROWS, LENGTH = 2, 12, 16
EXPERTS, UNEVEN = 12, 10  # of a layer: the ranks of ep=3 have 4, 4, 2 of ten
EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
BALANCE = 0.1  # the weight of the router's loss

OF_HUGGING_FACE = (
    "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "gpt_oss", "granitemoe",
    "llama4_text", "phimoe", "glm4_moe", "ernie4_5_moe",
)  # fmt: skip
MODELS = (*OF_HUGGING_FACE, "moe", "list")


@dataclass(frozen=True)
class Combination:
    mesh: str
    plan: Mapping[str, Any]
    experts: int = EXPERTS


COMBINATIONS: dict[str, Combination] = {
    "ep=1": Combination("ep=1", {}),
    "ep=2": Combination("ep=2", {}),
    "ep=3": Combination("ep=3", {}, UNEVEN),
    "ep=4": Combination("ep=4", {"record_load": True}),
    "dp,ep": Combination("dp=2,ep=2", {}),
    "ep,tp": Combination("ep=2,tp=2", {}),
    "ep,sp": Combination("ep=2,sp=2", {}),
    "pp,ep": Combination("pp=2,ep=2", {"microbatches": 3}),
    "pp,ep 1": Combination("pp=2,ep=2", {"microbatches": 1}),
    "zero 1": Combination("dp=2,ep=2", {"zero": 1}),
    "zero 2": Combination("dp=2,ep=2", {"zero": 2}),
    "zero 3": Combination("dp=2,ep=2", {"zero": 3}),
    "all five": Combination("pp=2,dp=2,ep=2,sp=2,tp=2", {"zero": 3, "microbatches": 3}),
}


# ---------------------------------------------------------------- the models


class Gated(nn.Module):
    """w2(silu(w1(x)) * w3(x))"""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class Listed(nn.Module):
    """As people write it: a loop over a list, each expert run on the rows that chose it."""

    def __init__(self, config: moe.Config) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = nn.ModuleList(Gated(config.width, config.ff) for _ in range(config.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        probabilities = self.router(rows).softmax(dim=-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            y.index_add_(0, token, expert(rows[token]) * weights[token, place, None])
        shares = F.one_hot(chosen, len(self.experts)).sum(1)
        return y.view(x.shape), moe.balance_loss(probabilities, shares, self.top_k)


def with_list(model: moe.Mixtral) -> nn.Module:
    for block in model.blocks:
        block.moe = Listed(model.config)
    model.initialise()
    return model


def example(name: str, experts: int) -> Example:
    if name in ("moe", "list"):
        model = moe.build("tiny", layers=LAYERS, experts=experts, balance=BALANCE)
        return Example(name, with_list(model) if name == "list" else model, moe.example_batch(model, ROWS, LENGTH))
    known = zoo.architecture(name)
    (field,) = (field for field in EXPERT_FIELDS if field in known.fields)
    config = {"num_hidden_layers": LAYERS, field: experts}
    if hasattr(known.config_of(config), "router_aux_loss_coef"):
        config |= {"output_router_logits": True, "router_aux_loss_coef": BALANCE}
    return named_model(f"hf:{name}", config, batch=ROWS, length=LENGTH)


class WithoutBalance(nn.Module):
    """Beside the loss, no output that is made of all rows at once, which microbatches do not tell."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = self.model(input_ids=input_ids, labels=labels)
        return {"loss": found["loss"], "logits": found["logits"]}


@lru_cache(maxsize=3)  # of one model after the other
def references(name: str, experts: int, in_parts: bool = False) -> dict[str, Reference]:
    """The model with the weights that it starts with, and with others, of which programs know nothing.

    ``in_parts``: for several microbatches.
    """
    torch.manual_seed(0)
    found = example(name, experts)
    usual = Reference(WithoutBalance(found.model) if in_parts else found.model, found.batch)
    skewed = copy.copy(usual)
    skewed.state = {**usual.state, **shifted(usual.model)}
    return {"usual": usual, "skewed": skewed.stepping_as(usual.model)}


def shifted(model: nn.Module) -> dict[str, Tensor]:
    """Embeddings that are nearly the same for each token, so that each chooses the same experts, by name."""
    (tokens,) = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    common = torch.randn(tokens.shape[1], generator=torch.Generator().manual_seed(3), dtype=tokens.dtype)
    moved = (tokens + 50 * tokens.std() * common).detach()
    return {name: moved for name, one in model.named_parameters(remove_duplicate=False) if one is tokens}


# ---------------------------------------------------------------- the errors


def reports(name: str, combination: Combination) -> dict[str, Report]:
    """By routing; of one program."""
    on, choices = Mesh.parse(combination.mesh), dict(combination.plan)
    balanced = has_balance(references(name, combination.experts)["usual"])
    in_parts = balanced and choices.get("microbatches", 1) > 1
    of = references(name, combination.experts, in_parts)
    if in_parts:
        choices["microbatch_weights"] = "statistics"  # of the router: those of a microbatch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        program = of["usual"].program(on, Plan(check_numerics=False, **choices))
        return {routing: reference.compare(program) for routing, reference in of.items()}


def has_balance(reference: Reference) -> bool:
    output, config = reference.whole(0).output, reference.model.config
    return "aux_loss" in output or bool(getattr(config, "balance", 0.0))


def idle(report: Report) -> list[bool]:
    """Of each layer: whether some rank got no row."""
    return [min(load.ranks) == 0 for load in report.step.expert_load.values()]


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_equals_the_model(name: str, combination: str) -> None:
    if name in OF_HUGGING_FACE:
        pytest.importorskip("transformers")
    found = reports(name, COMBINATIONS[combination])
    assert {routing: report.worst for routing, report in found.items() if not report.passed} == {}
    if COMBINATIONS[combination].plan.get("record_load"):
        assert idle(found["usual"]) and not any(idle(found["usual"]))
        assert idle(found["skewed"]) and all(idle(found["skewed"]))


# ---------------------------------------------------------------- the table


def cell(name: str, combination: Combination) -> str:
    """The worst error, usual and skewed; or the first line of what was raised."""
    try:
        found = reports(name, combination)
    except Exception as error:  # it stands in the table
        return f"{type(error).__name__}: {error}".splitlines()[0][:150]
    return " ".join(f"{report.worst:.0e}" + "!" * (report.worst > TOLERANCE) for report in found.values())


def main(names: list[str]) -> None:
    print(f"{'model':14}" + "".join(f"{title:>13}" for title in COMBINATIONS))
    for name in names:
        print(f"{name:14}", end="", flush=True)
        for combination in COMBINATIONS.values():
            print(f"{cell(name, combination):>13}", end="", flush=True)
        print()
        references.cache_clear()


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODELS))
