"""State-space and linear-attention models: exact; convolutions and products split, what runs whole is said."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch

from autopar.check import Reference
from autopar.compiler import compile_program
from autopar.errors import NothingSplitError
from autopar.mesh import Mesh
from autopar.plan import Plan
from tests.selection import slow_but

transformers = pytest.importorskip("transformers")
LENGTH = 32
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
MIXER = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"state_size": 4}),
    "mamba2": ("Mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 16, "chunk_size": 8, "n_groups": 1}),
    "rwkv": ("Rwkv", {"context_length": LENGTH, "attention_hidden_size": 32, "intermediate_size": 64}),
    "lfm2": ("Lfm2", {**HEADS, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **HEADS,
            **MIXER,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 32,
        },
    ),
}


@cache
def built(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    kind, fields = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **fields})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().train()
    ids = torch.randint(3, 64, (2, LENGTH))
    return model, {"input_ids": ids, "labels": ids.masked_fill(torch.arange(LENGTH) < 5, -100)}


@cache
def reference(name: str) -> Reference:
    return Reference(*built(name))


@pytest.mark.parametrize(
    "mesh", ["sp=2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("dp=2,sp=2", "sp=2,tp=2"))]
)
@pytest.mark.parametrize("name", slow_but([0], list(MODELS)))
def test_exact(name: str, mesh: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert reference(name).check(Mesh.parse(mesh), Plan()).worst <= 1e-12


def traffic(name: str, collective: str) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = reference(name).check(Mesh(sp=2), Plan(attention="gather")).step.traffic
    chosen = [t for t in found if (t.phase, t.axis, t.name) == ("forward", "sp", collective)]
    return sum(t.operations for t in chosen), sum(t.bytes for t in chosen)


@pytest.mark.slow
def test_the_convolutions_send_halos_and_a_loop_gathers_its_operands_once() -> None:
    """Mamba: two layers of width 64, four taps; the labels are shifted too. The loop over positions runs whole."""
    operations, size = traffic("mamba", "shift")
    assert operations == 3 and size == 2 * (2 * 64 * 3 * 8) + 2 * 8
    operations, _ = traffic("mamba", "all_gather_invariant")
    assert operations <= 2 * 4
    assert traffic("rwkv", "all_gather_invariant") == (4, 4 * 2 * 32 * (LENGTH // 2) * 8)  # keys and values
    assert traffic("lfm2", "all_gather_invariant") == (0, 0)


def test_what_runs_whole_is_said() -> None:
    model, batch = built("mamba2")
    with pytest.warns(
        UserWarning, match=r"sp=2: some of what this model does .*\n  backbone.layers.0.mixer: [\d,]+ bytes"
    ):
        program = compile_program(model, Mesh(sp=2), Plan(check_numerics=False), (), batch)
    chosen = [name for name, each in program.decisions["sp"].items() if each.chosen.startswith("whole on every rank")]
    assert chosen and "bytes that are gathered" in program.explain(chosen[0])


def test_fewer_chunks_than_ranks_are_refused() -> None:
    model, batch = built("mamba2")
    short = {name: tensor[:, :16] for name, tensor in batch.items()}
    with pytest.raises(NothingSplitError, match="mixer"):
        compile_program(model, Mesh(sp=4), Plan(check_numerics=False), (), short)
