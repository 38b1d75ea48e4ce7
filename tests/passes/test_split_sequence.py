"""Sequence parallelism: exact in every form, with the traffic of its form, the dims found, and what is refused."""

from __future__ import annotations

import warnings
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.check import Reference, Report
from autopar.compiler import compile_program
from autopar.errors import AutoparError, IndivisibleError, NothingSplitError, SequenceError
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.zoo.named import named_model
from tests import hugging_face
from tests.selection import one_each, slow_but

EXACT = 1e-12
FORMS = ("ring", "gather", "ulysses", "auto")


@cache
def reference(name: str, padding: str = "") -> Reference:
    model, batch = hugging_face.build(name)
    return Reference(model, batch | masks(batch, padding))


def masks(batch: dict[str, Tensor], padding: str) -> dict[str, Tensor]:
    """Further inputs: rows of unequal lengths, or several documents in a row."""
    if padding == "packed":
        rows = [[*range(7), *range(9)], [*range(12), *range(4)]]
        return {"position_ids": torch.tensor(rows)}
    if not padding:
        return {}
    mask = torch.ones_like(batch["input_ids"])
    mask[0, slice(0, 5) if padding == "left" else slice(11, None)] = 0
    return {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def checked(name: str, mesh: str, padding: str = "", **choices: Any) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = reference(name, padding).check(Mesh.parse(mesh), Plan(**choices))
    assert found.worst <= EXACT, found
    return found


def sent(report: Report, phase: str, name: str, axis: str = "sp") -> tuple[int, int]:
    """(operations, bytes) that a rank sent."""
    found = [t for t in report.step.traffic if (t.phase, t.axis, t.name) == (phase, axis, name)]
    return sum(t.operations for t in found), sum(t.bytes for t in found)


@pytest.mark.parametrize(
    ("name", "form"),  # llama in every form below
    slow_but([4, 6], product(["llama", "t5", "gpt2", "bert", "bart", "mistral", "gemma2"], FORMS)),
)
def test_every_model_in_every_form(name: str, form: str) -> None:
    checked(name, "sp=2", attention=form)


@pytest.mark.parametrize("form, ways", one_each(FORMS, [1, 2, 4, 8], [(0, 2), (1, 2), (2, 2), (3, 0)]))
def test_any_number_of_ranks(form: str, ways: int) -> None:
    if form == "ulysses" and ways == 8:
        pytest.skip("4 heads")
    checked("llama", f"sp={ways}", attention=form)


@pytest.mark.parametrize("mesh", slow_but([1, 3], ["sp=4", "sp=8", "dp=2,sp=4", "pp=2,sp=4"]))
def test_hybrid(mesh: str) -> None:
    found = checked("llama", mesh, attention="hybrid")
    assert sent(found, "forward", "all_to_all", "sp:inner2")[0]


@pytest.mark.parametrize("padding, form", one_each(["left", "right", "packed"], FORMS, [(0, 0), (1, 2), (2, 1)]))
def test_padding_and_documents(padding: str, form: str) -> None:
    """Rows of unequal lengths have unequal token counts on each rank; left padding leaves rows without any key."""
    for ways in (2, 4):
        checked("llama", f"sp={ways}", padding, attention=form)


MESHES: list[tuple[str, dict[str, Any]]] = [
    ("dp=2,sp=2", {}),
    ("dp=2,sp=2", {"zero": 3}),
    ("sp=2,tp=2", {}),
    ("sp=2,tp=2", {"sequence": "megatron"}),
    ("pp=2,sp=2", {"microbatches": 2}),
    ("pp=2,sp=2,tp=2", {"zero": 1}),
    ("dp=2,sp=2,tp=2", {"zero": 2}),
    ("pp=2,dp=2,sp=2,tp=2", {"zero": 3, "recompute": "selective"}),
    ("sp=2", {"zero": 3, "recompute": "full"}),
]


@pytest.mark.parametrize(
    ("form", "mesh", "choices"),
    one_each(["ring", "ulysses", "gather"], MESHES, [(0, 7), (1, 1), (2, 3)]),
    ids=[
        f"{form}-{mesh}-{number}" for form in ("ring", "ulysses", "gather") for number, (mesh, _) in enumerate(MESHES)
    ],
)
def test_with_all_other_axes(form: str, mesh: str, choices: dict[str, Any]) -> None:
    checked("llama", mesh, attention=form, **choices)


@pytest.mark.parametrize("form", slow_but([0], FORMS))
def test_windows_of_an_image(form: str) -> None:
    """Swin: the splits of one window's positions reach the next layer's as another order of them."""
    example = named_model("hf:swin", batch=4)
    found = Reference(example.model, example.batch).check(Mesh(sp=2), Plan(attention=form))
    assert found.worst <= EXACT, found


OTHERS = ["models.transformer", "hf:deepseek_v2", "hf:gpt_neox", "hf:gemma3", "hf:modernbert"]


@pytest.mark.parametrize("name", slow_but([1], OTHERS))
def test_other_architectures(name: str) -> None:
    example = named_model(name, batch=4)
    checked_example = Reference(example.model, example.batch)
    for form in ("ring", "ulysses"):
        assert checked_example.check(Mesh(sp=2), Plan(attention=form)).worst <= EXACT


@pytest.mark.parametrize("ways", slow_but([1], [2, 4]))
def test_traffic_of_each_form(ways: int) -> None:
    """Llama: 2 layers, K and V of 2 rows x 2 heads x 16 positions x 16 numbers of 8 bytes."""
    layers, keys = 2, 2 * (2 * 2 * 16 * 16 * 8) // ways  # K + V of one rank
    ring = checked("llama", f"sp={ways}", attention="ring")
    assert sent(ring, "forward", "shift") == (2 * layers * (ways - 1), layers * (ways - 1) * keys)
    assert sent(ring, "backward", "shift")[1] == layers * ((ways - 1) * keys + ways * keys)
    gather = checked("llama", f"sp={ways}", attention="gather")
    assert sent(gather, "forward", "all_gather") == (2 * layers, layers * (ways - 1) * keys)
    assert sent(gather, "backward", "reduce_scatter") == (2 * layers, layers * (ways - 1) * keys)
    ulysses = checked("llama", f"sp={ways}", attention="ulysses")
    assert sent(ulysses, "forward", "all_to_all")[0] == sent(ulysses, "backward", "all_to_all")[0] == 4 * layers


def test_recomputing_all_does_not_send_keys_around_a_third_time() -> None:
    usual = checked("llama", "sp=4", attention="ring")
    again = checked("llama", "sp=4", attention="ring", recompute="full")
    assert sent(again, "backward", "shift") == sent(usual, "backward", "shift")


def test_fewer_heads_are_sent_and_repeated_only_for_ranks() -> None:
    """4 heads and 2 of keys: over sp=2 x tp=2 each rank has one, and no collective of tp is added."""
    alone = checked("llama", "tp=2", attention="ulysses")
    found = checked("llama", "sp=2,tp=2", attention="ulysses")
    for phase in ("forward", "backward"):
        assert sent(found, phase, "all_reduce", "tp")[0] == sent(alone, phase, "all_reduce", "tp")[0]


def compiled(name: str, mesh: str = "sp=2", **choices: Any) -> Program:
    model, batch = hugging_face.build(name, torch.float32)
    found = compile_program(model, Mesh.parse(mesh), Plan(check_numerics=False, **choices), (), batch)
    assert isinstance(found, Program)
    return found


def test_inputs_are_split_where_that_is_found_and_labels_are_cut_behind_their_shift() -> None:
    program = compiled("t5")
    layouts = {entry.target: str(value(node).layout) for node, entry in program.placeholders(InputKind.INPUT)}
    assert layouts["input_ids"].endswith("@sp]") or "@sp~" in layouts["input_ids"]
    assert "sp" not in layouts["labels"]


def test_the_choice_is_explained() -> None:
    program = compiled("llama", attention="ring")
    text = program.explain("ring_attention")
    assert "sp      ring attention, zig-zag order" in text
    assert "gather attention would cost" in text and "not hybrid attention: no group of neighbours" in text


def test_plain_order_where_zig_zag_gives_no_balance() -> None:
    assert "~" not in str(compiled("bert", attention="ring"))
    assert "~" not in str(compiled("llama", attention="ulysses"))
    assert "@sp~" in str(compiled("llama", attention="ring"))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu().sum()


def refused(error: type[AutoparError], call: Any) -> str:
    with pytest.raises(error) as found:
        call()
    text = str(found.value)
    assert "Way out" in text and len(text.splitlines()) < 15
    return text


def test_refusals() -> None:
    text = refused(IndivisibleError, lambda: compiled("llama", "sp=3"))
    assert "16 positions" in text and "sp=3" in text and "pad the inputs by 2 to 18" in text
    text = refused(SequenceError, lambda: compiled("llama", "sp=8", attention="ulysses"))
    assert "model.layers.0.self_attn" in text and "4 heads do not divide by 8 ranks" in text
    text = refused(IndivisibleError, lambda: compiled("vit"))
    assert "17 positions" in text
    text = refused(SequenceError, lambda: compiled("resnet"))
    assert "no attention" in text and "pixel_values [2, 3, 32, 32]" in text
    text = refused(SequenceError, lambda: compile_program(Mlp(), Mesh(sp=2), Plan(), (torch.randn(4, 8),)))
    assert "x [4, 8]" in text


def test_an_axis_that_splits_nothing_is_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(8, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x)[0]
            return found.square().sum()

    text = refused(
        NothingSplitError, lambda: compile_program(Recurrent(), Mesh(sp=2), Plan(), (torch.randn(4, 32, 8),))
    )
    assert "of the computation" in text and "recurrent_layer" in text


def test_other_axes_that_split_nothing_are_refused_by_the_same_check() -> None:
    plan = Plan(batch_dims={"x": None})
    text = refused(NothingSplitError, lambda: compile_program(Mlp(), Mesh(dp=2), plan, (torch.randn(4, 8),)))
    assert "dp=2 splits 0% of the computation" in text

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1).square().sum()

    text = refused(NothingSplitError, lambda: compile_program(Plain(), Mesh(tp=2), Plan(), (torch.randn(4, 8),)))
    assert "tp=2 splits 0% of the computation" in text
