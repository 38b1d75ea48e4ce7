"""Tensor parallelism: where collectives go, what overrides do, what is refused."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from autopar.check import check
from autopar.compiler import compile_program
from autopar.errors import IndivisibleError
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.passes.split_tensors import split_tensors
from autopar.plan import Plan
from autopar.zoo.named import named_model
from tests.conftest import Golden
from tests.selection import one_each

MLP = """
program mesh(tp=2)
  up     = param up.weight           : f32[32,8]
  up_b   = param up.bias             : f32[32]
  down   = param down.weight         : f32[8,32]
  down_b = param down.bias           : f32[8]
  x      = input                     : f32[4,8] nograd
  h      = aten.linear(x, up, up_b)  : f32[4,32]
  a      = aten.gelu(h)              : f32[4,32]
  y      = aten.linear(a, down, down_b) : f32[4,8]
  return y
"""


def llama(layers: int, plan: Plan, mesh: str = "tp=2") -> Program:
    plan = replace(plan, overlap_mb=0.0)  # collectives in one piece, to be counted
    pytest.importorskip("transformers")
    example = named_model("hf:llama", {"num_hidden_layers": layers})
    return compile_program(example.model, Mesh.parse(mesh), plan, (), example.batch)


def collectives(program: Program) -> Counter[str]:
    """Collectives of forward and backward that move data, by axis and kind."""
    text = str(program).partition("forward:")[2].partition("inference:")[0]
    kinds = re.findall(r"comm\.(\w+)\(\w+, (\w+)", text)
    free = ("enter", "release", "keep_first", "split", "split_replicated", "pad")
    return Counter(f"{kind}@{axis}" for kind, axis in kinds if kind not in free)


def test_column_then_row(golden: Golden) -> None:
    golden("split_tensors_mlp", split_tensors(parse(MLP)))


def test_one_llama_layer_reads_like_megatron(golden: Golden) -> None:
    golden("llama_layer_tp2", llama(1, Plan()))


def test_one_llama_layer_with_the_sequence_split(golden: Golden) -> None:
    golden("llama_layer_tp2_megatron", llama(1, Plan(sequence="megatron")))


def test_a_llama_layer_has_two_all_reduces_each_way() -> None:
    per_layer = collectives(llama(3, Plan())) - collectives(llama(2, Plan()))
    assert per_layer == {"all_reduce@tp": 4}  # 2 forward, 2 backward
    ends = collectives(llama(1, Plan())) - per_layer
    assert ends == {"all_reduce@tp": 5}  # embedding; maximum, sum and target of the loss; entry of the head


def test_a_llama_layer_with_the_sequence_split() -> None:
    plan = Plan(sequence="megatron", bucket_mb=0)
    per_layer = collectives(llama(3, plan)) - collectives(llama(2, plan))
    norms = {"all_reduce@tp": 2}  # gradients of the two norm weights, which every rank applies to its own tokens
    assert per_layer == {"reduce_scatter@tp": 4, "all_gather@tp": 4, **norms}


def test_one_gradient_reduction_per_parameter_on_dp() -> None:
    program = llama(2, Plan(bucket_mb=0), "dp=2,tp=2")
    found = collectives(program)
    assert found["all_reduce@dp"] == len(program.required_role.grads) + 2  # and the loss with its count


def weight_layouts(program: Program) -> dict[str, str]:
    return dict(re.findall(r"= param (\S+?)(?: also \S+)? +: \w+(\[.*\])", str(program).partition("forward:")[0]))


def test_gradients_are_reduced_in_buckets() -> None:
    found = collectives(llama(2, Plan(), "dp=2,tp=2"))
    assert found["all_reduce@dp"] == 1 + 2  # all gradients of 25 MB or less together, the loss, its count


def test_weights_are_split_and_norms_are_not() -> None:
    layouts = weight_layouts(llama(1, Plan()))
    whole = {name for name, layout in layouts.items() if "@tp" not in layout}
    assert whole == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }


def test_overrides_by_name_win() -> None:
    plan = Plan(tensor={"*mlp.up_proj*": "row", "*mlp.gate_proj*": "replicate", "*embed_tokens*": "column"})
    layouts = weight_layouts(llama(1, plan))
    assert re.match(r"\[\d+,\d+@tp\]", layouts["model.layers.0.mlp.up_proj.weight"])
    assert "@tp" not in layouts["model.layers.0.mlp.gate_proj.weight"]
    assert re.match(r"\[\d+,\d+@tp\]", layouts["model.embed_tokens.weight"])


def test_the_tp_plan_of_hugging_face_is_our_own_choice() -> None:
    pytest.importorskip("transformers")
    example = named_model("hf:llama")
    plan = Plan.from_tp_plan(example.model.tp_plan)  # type: ignore[arg-type]
    assert len(plan.tensor) >= 7
    theirs = compile_program(example.model, Mesh(tp=2), plan, (), example.batch)
    assert weight_layouts(theirs) == weight_layouts(llama(len(example.model.model.layers), Plan()))  # type: ignore


def test_fused_qkv_is_split_inside_each_of_its_three_parts() -> None:
    example = named_model("models.gpt")
    program = compile_program(example.model, Mesh(tp=2), Plan(), (), example.batch)
    assert re.match(r"\[\(3 \d+@tp\),\d+\]", weight_layouts(program)["blocks.0.attn.qkv.weight"])


def test_heads_that_do_not_divide_are_refused_by_name() -> None:
    example = named_model("models.llama", {"heads": 6, "kv_heads": 6, "width": 96})
    with pytest.raises(IndivisibleError, match=r"6.*tp=4|tp=4.*6") as caught:
        compile_program(example.model, Mesh(tp=4), Plan(), (), example.batch)
    assert "replicate" in str(caught.value) and len(str(caught.value).splitlines()) < 15


def test_heads_that_do_not_divide_may_be_replicated() -> None:
    example = named_model("models.llama", {"heads": 6, "kv_heads": 6, "width": 96})
    with pytest.warns(UserWarning, match="has 6 heads, which tp=4 does not divide; every rank does it whole"):
        report = check(example.model, example.batch, Mesh(tp=4), Plan(on_indivisible="replicate"))
    assert report.passed
    assert sum("@tp" in layout for layout in weight_layouts(report.program).values()) > 4, "the rest is split"


class Middle(nn.Module):
    """One attention of one head among many weights, as in the middle of a VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 256), nn.Linear(256, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, v = self.kv(x).chunk(2, -1)
        x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(x)[:, None], k[:, None], v[:, None])[:, 0])
        return self.down(nn.functional.gelu(self.up(x))).square().mean()


def test_what_is_little_of_the_model_stays_whole_with_a_warning() -> None:
    batch = {"x": torch.randn(4, 6, 16)}
    with pytest.warns(UserWarning, match="has 1 heads, which tp=2 does not divide; every rank does it whole"):
        report = check(Middle(), batch, Mesh(tp=2))
    layouts = weight_layouts(report.program)
    assert report.passed and "@tp" in layouts["up.weight"]
    with pytest.raises(IndivisibleError, match="has 1 heads"):
        check(Middle(), batch, Mesh(tp=2), Plan(on_indivisible="error"))


class Scores(nn.Module):
    """Attention without parameters of its own: those around it have them."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Apart(Middle):
    """As Middle, with a wide attention whose scores are a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"qkv": nn.Linear(16, 3 * width), "scores": Scores(), "o": nn.Linear(width, 16)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.attention["qkv"](x).chunk(3, -1)
        x = x + self.attention["o"](self.attention["scores"](*parts))
        return self.down(nn.functional.gelu(self.up(x))).square().mean()


def test_an_attention_without_parameters_counts_those_around_it() -> None:
    batch = {"x": torch.randn(4, 6, 16)}
    with pytest.warns(UserWarning, match="attention at attention.scores has 1 heads"):
        compile_program(Apart(16), Mesh(tp=2), Plan(check_numerics=False), (), batch)
    with pytest.raises(IndivisibleError, match="attention at attention.scores has 1 heads") as caught:
        compile_program(Apart(256), Mesh(tp=2), Plan(check_numerics=False), (), batch)
    assert "'attention.*': 'replicate'" in str(caught.value)
    plan = Plan(check_numerics=False, tensor={"attention.*": "replicate"})
    assert compile_program(Apart(256), Mesh(tp=2), plan, (), batch)


def test_the_way_out_of_an_attention_that_does_not_divide_is_one() -> None:
    """The plan that the refusal proposes, for one attention after the other, compiles, and is exact."""
    example = named_model("models.llama", {"heads": 6, "kv_heads": 6, "width": 96})
    tensor: dict[str, str] = {}
    for _ in range(2):
        with pytest.raises(IndivisibleError, match="has 6 heads") as caught:
            strict = Plan(tensor=tensor, on_indivisible="error")
            compile_program(example.model, Mesh(tp=4), strict, (), example.batch)
        proposed = re.search(r"Plan\(tensor=\{'([^']+)': 'replicate'\}\)", str(caught.value))
        assert proposed and proposed[1] not in tensor
        tensor[proposed[1]] = "replicate"
    report = check(example.model, example.batch, Mesh(tp=4), Plan(tensor=tensor))
    layouts = weight_layouts(report.program)
    assert report.passed and "@tp" not in "".join(text for name, text in layouts.items() if ".attn." in name)
    assert sum("@tp" in layout for layout in layouts.values()) > 4, "the rest is split"


PROJECTED = """
program mesh(tp=2)
  w = param w                    : f32[3,8]
  b = param b                    : f32[8]
  x = input                      : f32[5,3] nograd
  y = aten.addmm(b, x, w)        : f32[5,8]
  return y
"""


def test_a_form_that_does_not_divide_names_the_shape_of_the_weight() -> None:
    """Of an ``addmm`` that is the last operand, behind the bias and the rows."""
    program = parse(PROJECTED)
    asked = replace(program, plan=replace(program.plan, tensor={"w": "row"}))
    with pytest.raises(IndivisibleError, match=r"asks for 'row' at y .*its weight \(3, 8\)"):
        split_tensors(asked)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(3, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x).softmax(-1).square().sum()


def test_a_weight_with_no_dim_that_divides_is_refused() -> None:
    batch = {"x": torch.randn(4, 3)}
    with pytest.raises(IndivisibleError, match="'only.weight'"):
        compile_program(Odd(), Mesh(tp=4), Plan(), (), batch)
    program = compile_program(Odd(), Mesh(tp=4), Plan(tensor={"only.*": "replicate"}), (), batch)
    assert not collectives(program)


def test_pinned_layouts_are_kept() -> None:
    from autopar.ir.node import value

    plan = Plan(tensor={"*mlp.up_proj*": "row"})
    first = llama(1, plan)
    pinned = {entry.target: value(node).layout for node, entry in first.placeholders(*{e.kind for e in first.inputs})}
    example = named_model("hf:llama", {"num_hidden_layers": 1}, length=12)
    again = compile_program(example.model, Mesh(tp=2), Plan(), (), example.batch, layouts=pinned)
    assert weight_layouts(again) == weight_layouts(first)


def test_explain_names_the_choice_and_its_alternatives() -> None:
    program = llama(1, Plan())
    text = program.explain("model.layers.0.self_attn.o_proj.weight")
    assert "tp      split by columns over tp, because that costs least on a device of 300 Tflop/s" in text
    assert re.search(r"whole on every rank would cost [\d.]+ us a step more", text)
    assert "not split by rows: not possible here" in text
    with pytest.raises(ValueError, match=r"near it: .*q_proj"):
        program.explain("model.layers.0.self_attn.q_prj.weight")


class OddVocabulary(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocabulary, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, vocabulary)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(self.embed(tokens)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss + logits.logsumexp(-1).square().mean() + logits.mean(-1).square().mean() + logits.square().mean()


@pytest.mark.parametrize("vocabulary, mesh", one_each([5, 7, 8], [Mesh(tp=2), Mesh(tp=3), Mesh(dp=2, tp=2)]), ids=str)
def test_uneven_parts_are_not_exchanged_as_equal_ones(vocabulary: int, mesh: Mesh) -> None:
    """From parts of the vocabulary to parts of the sequence: an all-to-all would count padding as elements."""
    torch.manual_seed(0)
    batch = {name: torch.randint(vocabulary, (4, 6)) for name in ("tokens", "labels")}
    plan = Plan(sequence="megatron", on_indivisible="replicate")
    assert check(OddVocabulary(vocabulary), batch, mesh, plan).passed
