"""A large program that is proved by a small one: sizes that keep what matters, and the comparison line by line."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.models import llama
from autopar.proof import subject
from autopar.proof.alike import likeness
from autopar.proof.in_double import in_double, is_exact
from autopar.proof.reduced import Reduced, reduced, reduced_mesh, reduced_rows, reduced_sizes
from autopar.proof.verify import verify
from autopar.simulate import simulate
from autopar.zoo.named import named_model


class Blocks(nn.Module):
    def __init__(self, count: int, width: int, acts: bool = True) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(count))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(count))
        self.head, self.acts = nn.Linear(width, width), acts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.ups, self.downs):
            h = torch.tanh(up(x)) if self.acts else up(x)
            x = x + down(h).sigmoid() * 2
        return self.head(x).square().mean()


def test_a_large_program_is_the_small_one_with_more_blocks() -> None:
    large, small = Blocks(7, 16), Blocks(2, 8)
    reduced = Reduced(small, Mesh(dp=2, tp=2), (torch.randn(4, 8),), "2 blocks")
    found = verify(large, Mesh(dp=8, tp=4), example_inputs=(torch.randn(16, 16),), reduced=reduced)
    assert found.proved, found
    assert "times a block is repeated there" in str(found) and "computed on 2 blocks" in str(found)


def test_a_small_program_that_is_another_proves_nothing() -> None:
    reduced = Reduced(Blocks(2, 8, acts=False), Mesh(dp=2, tp=2), (torch.randn(4, 8),))
    found = verify(Blocks(7, 16), Mesh(dp=8, tp=4), example_inputs=(torch.randn(16, 16),), reduced=reduced)
    assert not found.proved and not found.refusals
    assert "the reduced program is another one" in found.unproved[0]


def test_one_block_that_differs_is_seen() -> None:
    """In the middle of the large one, where a block of equal lines would be taken for a repetition."""
    large = Blocks(5, 8)
    large.downs[3] = nn.Linear(16, 8, bias=False)
    programs = [compile_program(one, Mesh(dp=2), Plan(), (torch.randn(4, 8),)) for one in (large, Blocks(2, 8))]
    found = likeness(programs[0].graph, programs[1].graph)
    assert found.difference


def test_the_last_block_is_the_last_one() -> None:
    """What follows it may be decided together with it, and that is to be so in the small program too."""
    programs = [compile_program(Blocks(n, 8), Mesh(dp=2), Plan(), (torch.randn(4, 8),)) for n in (5, 2)]
    pairs = likeness(programs[0].graph, programs[1].graph).pairs
    found = [pairs[name] for name in ("linear", "linear_1", "linear_2", "linear_3", "linear_4")]
    assert found == ["linear", "linear_1", "linear_8", "linear_9", "linear_10"]


def test_a_program_that_is_handed_in_is_not_reduced() -> None:
    model, inputs = Blocks(2, 8), (torch.randn(4, 8),)
    program = compile_program(model, Mesh(dp=2), Plan(), inputs)
    with pytest.raises(ValueError, match="proved at its own sizes"):
        verify(
            model, Mesh(dp=2), example_inputs=inputs, program=program, reduced=Reduced(model, Mesh(dp=2), inputs)
        )  # fmt: skip


@pytest.mark.parametrize(
    "mesh, sizes, wanted",
    [
        (Mesh(pp=8, dp=4, tp=8), {}, {"heads": 4, "kv_heads": 2, "layers": 2, "ff": 32}),
        (Mesh(tp=16), {}, {"heads": 2, "kv_heads": 1}),  # each head of keys is on two ranks
        (Mesh(tp=8), {"vocab": 1001}, {"vocab": 49}),  # 8 does not divide it: 2 does not either
        (Mesh(dp=3), {"ff": 28672}, {"ff": 33}),
        (Mesh(pp=2, tp=2), {"layers": 1}, {"layers": 1}),
    ],
    ids=str,
)
def test_sizes_keep_what_divides(mesh: Mesh, sizes: dict[str, int], wanted: dict[str, int]) -> None:
    found = reduced_sizes(replace(llama.PRESETS["llama_70b"], **sizes), mesh)
    assert {name: found[name] for name in wanted} == wanted
    assert found["width"] == found["heads"] * 8


def test_sizes_of_latent_attention_and_experts() -> None:
    config = SimpleNamespace(
        num_attention_heads=128, qk_rope_head_dim=64, head_dim=64, n_routed_experts=256, n_group=8, topk_group=4,
        num_experts_per_tok=8, first_k_dense_replace=3, num_hidden_layers=61, hidden_size=7168,
    )  # fmt: skip
    found = reduced_sizes(config, Mesh(ep=8, tp=2))
    assert found["head_dim"] == found["qk_rope_head_dim"] and found["n_routed_experts"] % (2 * found["n_group"]) == 0
    assert found["num_hidden_layers"] == 5 and found["first_k_dense_replace"] == 3


def test_meshes_and_rows() -> None:
    assert reduced_mesh(Mesh(pp=16, dp=128, tp=8)) == Mesh(pp=2, dp=2, tp=2)
    assert reduced_rows(4096, Mesh(dp=128)) == 4 and reduced_rows(128, Mesh(dp=128)) == 2
    assert reduced_rows(130, Mesh(dp=4)) % 2 == 1  # rows that do not divide stay so
    assert reduced_sizes(SimpleNamespace(other=3), Mesh(tp=2)) == {}


def test_a_program_in_float64() -> None:
    model, x = Blocks(2, 8), torch.randn(4, 8)
    program = compile_program(model, Mesh(dp=2, tp=2), Plan(precision="bf16"), (x,))
    doubled: Any = in_double(program)
    assert "f32" not in str(doubled) and "bf16" not in str(doubled) and "bf16" in str(program) and is_exact(program)
    exact = model.double()
    step = simulate(doubled, dict(exact.state_dict()), (x.double(),))
    loss = exact(x.double())
    assert step.loss is not None and torch.allclose(step.loss, loss, rtol=1e-12, atol=0.0)


def test_a_large_model_is_built_anew_from_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, and one of Hugging Face; what has no config that is known counts as not proved."""
    monkeypatch.setattr(subject, "MOST_ELEMENTS", 100_000)
    mesh = Mesh(dp=4, tp=4)
    config = llama.Config(vocab=96, context=16, width=128, layers=5, heads=16, kv_heads=8, ff=256)
    ours = llama.Llama(config)
    found = verify(ours, mesh, example_inputs=llama.example_batch(ours, 8, 16), layers=("relations", "field"))
    assert found.proved and "heads=4 kv_heads=2" in found.reduced, str(found)
    assert found.layers[1].facts["times a block is repeated there"] == 3
    plan = Plan(microbatches=2)  # the loss of the last stage looks labels up in a part of the vocabulary
    found = verify(ours, Mesh(pp=2, tp=4), plan, example_inputs=llama.example_batch(ours, 8, 16), layers=("relations",))
    assert found.proved, str(found)
    blocks = verify(Blocks(3, 128), mesh, example_inputs=(torch.randn(8, 128),), layers=("field",))
    assert not blocks.proved and "give the same model with smaller sizes" in blocks.unproved[0]
    with pytest.raises(ValueError, match="Blocks cannot be built with smaller sizes"):
        verify(Blocks(3, 128), mesh, example_inputs=(torch.randn(8, 128),), reduced=True)


def test_inputs_of_the_reduced_model() -> None:
    model = named_model("tiny:gpt2", {"n_layer": 4, "n_embd": 64, "n_head": 8, "vocab_size": 500}, 8, 24).model
    given = {"input_ids": torch.arange(8 * 24).view(8, 24) % 500, "labels": torch.full((8, 24), -100)}
    found = reduced(model, Mesh(dp=4, sp=4), Plan(), given)
    assert found is not None and found.mesh == Mesh(dp=2, sp=2)
    ids, labels = found.example_inputs["input_ids"], found.example_inputs["labels"]  # type: ignore[call-overload]
    assert ids.shape == labels.shape == (4, 16) and int(ids.max()) < 49 and bool((labels == -100).all())
    assert sum(parameter.numel() for parameter in found.model.parameters()) < 30_000


def test_the_reduced_model_has_the_dtypes_of_a_cast_one() -> None:
    """Buffers too, which Hugging Face makes in float32 whatever the config says."""
    given = named_model("tiny:llama", {"num_hidden_layers": 4}, 4, 8)
    model = given.model.to(torch.bfloat16)
    found = reduced(model, Mesh(dp=2), Plan(), given.batch)
    assert found is not None
    small = dict(found.model.named_buffers())
    assert small and {name: tensor.dtype for name, tensor in model.named_buffers()} == {
        name: tensor.dtype for name, tensor in small.items()
    }


def test_a_block_that_is_wired_otherwise_is_seen() -> None:
    """Each line is there; a block takes the weight of another, or adds to what went into the first."""
    batch = (torch.randn(4, 8),)
    small = compile_program(Blocks(2, 8), Mesh(dp=2), Plan(check_numerics=False), batch)
    for operator, place in (("aten.linear.default", 1), ("aten.add.Tensor", 0)):
        large = compile_program(Blocks(5, 8), Mesh(dp=2), Plan(check_numerics=False), batch)
        assert not likeness(large.graph, small.graph).difference
        nodes = [node for node in large.graph.nodes if str(node.target) == operator]
        wrong = nodes[2 * (place + 1)]  # of the third block
        wrong.args = tuple(nodes[0].args[at] if at == place else given for at, given in enumerate(wrong.args))
        assert likeness(large.graph, small.graph).difference
