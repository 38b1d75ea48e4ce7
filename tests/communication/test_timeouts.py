"""How long a group waits is what it was told last, however torch wraps it; this says so first when torch changes."""

from __future__ import annotations

import pytest
import torch

from autopar.communication.connect import connect
from autopar.communication.timeouts import set_timeout, timeout_of
from autopar.mesh import Mesh
from tests.launch import run_ranks
from tests.selection import slow_but


def timeouts() -> list[float]:
    """Seconds that a group waits: as it was made, and as it was changed; a sum by messages of each."""
    comm = connect(Mesh(dp=2), 50.0, torch.device("cpu")).comm
    group, found = comm.group("dp"), []
    assert group is not None
    for seconds in (None, 7.5):
        if seconds is not None:
            set_timeout(group, seconds)
        found.append(timeout_of(group).total_seconds())
        assert float(comm.all_reduce(torch.ones(()), "dp")) == 2.0
    return found


@pytest.mark.parametrize("detail", slow_but([1], [False, True]))
def test_the_timeout_of_a_group(detail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if detail:  # torch wraps each group in one that compares calls
        monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    assert run_ranks(timeouts, 2) == [[50.0, 7.5]] * 2
