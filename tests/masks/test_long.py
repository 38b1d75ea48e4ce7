"""Long sequences: no tensor of rows x columns in any graph, and nothing as large is evaluated."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.compiler import compile_program
from autopar.ir.node import values
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.operators import TILE
from autopar.plan import Plan
from tests.hugging_face import DECODER, transformers

LENGTH = 131_072
FORMS = {"llama": ("Llama", {}), "mistral": ("Mistral", {"sliding_window": 4096})}


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of a tensor that is computed, and not only described."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        if type(found) is torch.Tensor and found.device.type == "cpu":
            self.bytes = max(self.bytes, found.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("axes", ({"dp": 2}, {"tp": 2}), ids=("dp", "tp"))
@pytest.mark.parametrize("form", ("plain", "padded", "packed"))
@pytest.mark.parametrize("name", FORMS)
def test_nothing_is_quadratic(name: str, form: str, axes: dict[str, int]) -> None:
    model, changes = FORMS[name]
    config = getattr(transformers, f"{model}Config")(**DECODER | changes | {"max_position_embeddings": LENGTH})
    with torch.device("meta"):
        built = getattr(transformers, f"{model}ForCausalLM")(config)
        ids = torch.empty(2, LENGTH, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids}
    batch |= {"padded": {"attention_mask": ids}, "packed": {"position_ids": ids}}.get(form, {})
    with _Largest() as largest:
        program = compile_program(built, Mesh(**axes), Plan(), (), batch)
    assert isinstance(program, Program) and program.role is not None and program.role.backward is not None
    graphs = (program.graph, program.role.forward, program.role.backward, program.role.inference)
    kinds = [kind for graph in graphs for node in graph.nodes for kind in values(node)]
    assert not any(sum(size >= LENGTH // 4 for size in kind.shape) > 1 for kind in kinds)
    assert max(math.prod(kind.shape) for kind in kinds) <= 1024 * LENGTH
    assert 0 < largest.bytes <= 128 * LENGTH
    tiles = [node for node in program.role.forward.nodes if node.target is TILE]
    assert len(tiles) == (0 if (name, form) == ("llama", "plain") else 2)
