"""What models do along the sequence apart from attention: exact, split, and with the traffic of its kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.check import Reference, Report
from autopar.compiler import compile_program
from autopar.errors import IndivisibleError
from autopar.mesh import Mesh
from autopar.plan import Plan
from tests.selection import one_each, slow_but
from tests.split import along

EXACT = 1e-12
ROW = along.BATCH * along.WIDTH * 8  # bytes of one position of hidden states


def checked(name: str, mesh: str, causal: bool = True, **choices: Any) -> Report:
    found = along.reference(along.ENDS[name], causal).check(Mesh.parse(mesh), Plan(**choices))
    assert found.worst <= EXACT, found
    return found


def sent(report: Report, phase: str, name: str) -> tuple[int, int]:
    """(operations, bytes) that a rank sent over sp."""
    found = [t for t in report.step.traffic if (t.phase, t.axis, t.name) == (phase, "sp", name)]
    return sum(t.operations for t in found), sum(t.bytes for t in found)


@pytest.mark.parametrize("causal", slow_but([0], [True, False]), ids=["zigzag", "plain"])
@pytest.mark.parametrize("name", slow_but(range(0, len(along.ENDS), 3), along.ENDS))
def test_exact_on_any_number_of_ranks(name: str, causal: bool) -> None:
    for ways in (1, 2, 3, 4):
        checked(name, f"sp={ways}", causal)


MESHES: list[tuple[str, dict[str, Any]]] = [
    ("dp=2,sp=2", {"zero": 3}),
    ("sp=2,tp=2", {}),
    ("sp=2", {"zero": 3, "recompute": "full"}),
    ("dp=2,sp=2,tp=2", {"zero": 2, "attention": "ring"}),
    ("dp=2,sp=2", {"attention": "ulysses"}),
]


SOME = [
    "shifted", "weighted_smoothed", "each_token", "two_ahead", "differences", "prompt", "last_token", "twice", "scans",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mesh", "choices"),
    one_each(SOME, MESHES),
    ids=[f"{name}-{mesh}-{i}" for name in SOME for i, (mesh, _) in enumerate(MESHES)],
)
def test_with_other_axes(name: str, mesh: str, choices: dict[str, Any]) -> None:
    checked(name, mesh, **choices)


@pytest.mark.parametrize(
    "name", slow_but([2, 3, 4], ["shifted", "each_token", "shorter", "shift_by_cat", "causal", "last_token"])
)
def test_with_a_pipeline(name: str) -> None:
    checked(name, "pp=2,sp=2", microbatches=2)


ATTENTION = 2 * ROW * along.LENGTH  # bytes of whole keys and values


@pytest.mark.parametrize("name, ways", one_each([end.__name__ for end in along.LOSSES[:-1]], [2, 4]))
def test_a_shifted_loss_sends_only_numbers(name: str, ways: int) -> None:
    found = checked(name, f"sp={ways}", False, attention="gather")
    assert sent(found, "forward", "all_gather") == (2, (ways - 1) * ATTENTION // ways)
    assert sent(found, "forward", "all_gather_invariant") == (0, 0)
    shifts = (1, along.BATCH * 8) if name == "reversed_shift" else (0, 0)
    assert sent(found, "forward", "shift")[0] <= shifts[0] * 4
    assert sent(found, "forward", "all_reduce")[1] <= 64


# positions beside a chunk that travel forward, for each chunk of a rank
HALOS = {"causal": 3, "padded_in_front": 3, "centred": 2, "dilated": 4, "two_dims": 2, "shorter": 2, "strided": 1}
HALOS |= {"twice": 6, "token_shift": 1, "shift_by_cat": 1, "prompt": 3, "turned": 3}


@pytest.mark.parametrize(
    ("name", "causal"),
    one_each(HALOS, [True, False]),
    ids=[f"{name}-{order}" for name in HALOS for order in ("zigzag", "plain")],
)
def test_only_the_positions_beside_a_part_travel(name: str, causal: bool) -> None:
    for ways in (2, 4):
        found = checked(name, f"sp={ways}", causal, attention="gather")
        chunks = 2 if causal else 1
        assert sent(found, "forward", "shift")[1] == chunks * HALOS[name] * ROW
        assert sent(found, "backward", "shift")[1] == chunks * HALOS[name] * ROW
        assert sent(found, "forward", "all_gather")[1] == (ways - 1) * ATTENTION // ways


def test_halos_longer_than_a_part_take_several_shifts() -> None:
    """Dilated taps reach 4 positions, a part has 3."""
    end, ways = along.ENDS["dilated"], 4
    found = along.reference(end, False, 12).check(Mesh(sp=ways), Plan(attention="gather"))
    assert found.worst <= EXACT
    assert sent(found, "forward", "shift")[1] == 4 * ROW


@pytest.mark.parametrize("ways", [2, 4])
def test_scans_gather_the_totals_of_parts(ways: int) -> None:
    found = checked("scans", f"sp={ways}", False, attention="gather")
    totals = 3 * (ways - 1) * ROW
    assert sent(found, "forward", "all_gather") == (5, (ways - 1) * ATTENTION // ways + totals)
    assert sent(found, "backward", "reduce_scatter") == (5, (ways - 1) * ATTENTION // ways + totals)


def test_one_row_comes_from_one_rank() -> None:
    found = checked("last_token", "sp=4", False, attention="gather")
    assert sent(found, "forward", "all_reduce")[1] <= 2 * along.BATCH * along.VOCABULARY * 8
    assert sent(found, "forward", "all_gather_invariant") == (0, 0)


@pytest.mark.parametrize("name", ["shifted", "shift_by_cat", "causal", "twice", "last_token"])
def test_a_sequence_as_long_as_other_dims(name: str) -> None:
    found = along.reference(along.ENDS[name], True, along.WIDTH).check(Mesh(dp=2, sp=2), Plan())
    assert found.worst <= EXACT


class Prefixed(along.Along):
    """Rows of a prompt in front of the sequence: attention has more positions than the inputs."""

    def __init__(self, count: int) -> None:
        super().__init__(along.shifted, True)
        self.prompt = nn.Parameter(torch.randn(count, along.WIDTH))

    def embedded(self, ids: Tensor) -> Tensor:
        return torch.cat([self.prompt.expand(len(ids), -1, -1), super().embedded(ids)], 1)

    def finished(self, h: Tensor, labels: Tensor) -> Tensor:
        return along.shifted(self, h[:, len(self.prompt) :], labels)


def test_a_prompt_makes_the_sequence_longer() -> None:
    torch.manual_seed(0)
    reference = Reference(Prefixed(16).double(), along.batch())
    for ways in (2, 4):
        found = reference.check(Mesh(sp=ways), Plan(attention="gather"))
        assert found.worst <= EXACT
        assert sent(found, "forward", "all_gather_invariant") == (0, 0)
    with pytest.raises(IndivisibleError, match="49 positions"):
        compile_program(Prefixed(1), Mesh(sp=2), Plan(), (), along.batch())


def test_only_a_window_of_a_window_is_returned_whole() -> None:
    """The loss uses all positions, and the user gets what the model returns."""
    found = checked("with_logits", "sp=4")
    logits = along.BATCH * along.LENGTH * along.VOCABULARY * 8
    assert sent(found, "forward", "all_gather_invariant")[1] == 3 * logits // 4
