"""Ranks that do not do the same say so, all of them, at once; those that do are not disturbed."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import autopar
from autopar import Mesh, Plan
from autopar.communication.agreement import digest_of, ranks_text
from autopar.communication.connect import Connection
from autopar.communication.digests import digest
from autopar.errors import AutoparError, RanksDifferError
from autopar.ir.program import Program
from tests.launch import run_ranks
from tests.selection import slow_but

PATIENCE = 60.0  # seconds: far above what the errors may take


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.down(torch.relu(self.up(x))) * self.scale, y)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def batch(number: int = 0, rows: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 + number)
    return torch.randn(rows, 8).double(), torch.randn(rows, 8).double()


def said(work: Callable[[int], Any], ranks: int) -> list[str]:
    """The first error on each rank, "" where there is none."""
    return run_ranks(_said, ranks, work)


def _said(work: Callable[[int], Any]) -> str:
    import os

    start = time.monotonic()
    try:
        work(int(os.environ["RANK"]))
    except AutoparError as problem:
        assert time.monotonic() - start < PATIENCE, "the others waited for it"
        assert len(str(problem).splitlines()) < 15
        return f"{type(problem).__name__}: {problem}"
    return ""


def parallel(mesh: Mesh, model: nn.Module | None = None, **choices: Any) -> Any:
    return autopar.parallelize(model or net(), mesh, Plan(timeout=200.0, **choices))


# ---------------------------------------------------------------- the start


def another_seed(rank: int) -> None:
    parallel(Mesh(dp=2), seed=rank)


def another_mesh(rank: int) -> None:
    parallel(Mesh(dp=2) if rank else Mesh(tp=2))


def another_model(rank: int) -> None:
    parallel(Mesh(dp=2), net() if rank else nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (another_seed, ["Plan(seed): 0 on rank 0, 1 on rank 1"]),
        (another_mesh, ["mesh(tp=2) on rank 0", "mesh(dp=2) on rank 1"]),
        (another_model, ["up.weight: missing on rank 0", "same code, model and plan"]),
    ],
    ids=["seed", "mesh", "model"],
)
def test_ranks_that_start_differently(work: Callable[[int], Any], words: list[str]) -> None:
    for message in said(work, 2):
        assert message.startswith("RanksDifferError") and all(word in message for word in words), message


# ---------------------------------------------------------------- calls


def another_shape_later(rank: int) -> None:
    model = parallel(Mesh(dp=2, tp=2))
    for number in range(6):
        model(*batch(number, 2 if (rank, number) == (3, 5) else 4)).backward()


def another_shape_in_parts(rank: int) -> None:
    model = parallel(Mesh(pp=2), microbatches=2)
    for number in range(4):
        x, y = batch(number, 2 if (rank, number) == (1, 3) else 4)
        model.train_step(x=x, y=y)


def evaluation_on_one_rank(rank: int) -> None:
    model = parallel(Mesh(dp=2))
    for number in range(2):
        model(*batch(number)).backward()
    if rank == 0:
        model.eval()
    model(*batch(2)).backward()


@pytest.mark.parametrize(
    ("work", "ranks", "words"),
    slow_but(
        [1, 2],
        [
            (
                another_shape_later,
                4,
                ["ranks 0, 1, 2: a call to train, x [4, 8], y [4, 8]", "rank 3: a call to train, x [2, 8]"],
            ),
            (another_shape_in_parts, 2, ["rank 0: a call to train, x [4, 8]", "rank 1: a call to train, x [2, 8]"]),
            (
                evaluation_on_one_rank,
                2,
                ["rank 0: a call to evaluate", "rank 1: a call to train", "evaluate on all ranks"],
            ),
        ],
    ),
    ids=["shape", "shape-pp", "evaluation"],
)
def test_one_rank_that_makes_another_call(work: Callable[[int], Any], ranks: int, words: list[str]) -> None:
    for message in said(work, ranks):
        assert message.startswith("RanksDifferError") and all(word in message for word in words), message


# ---------------------------------------------------------------- inputs


def own_batch(rank: int, axes: dict[str, int], inputs: str, steps: int = 1) -> None:
    model = parallel(Mesh(**axes), inputs=inputs)
    for number in range(steps):
        model(*batch(number + 1000 * rank * (number == steps - 1))).backward()


@pytest.mark.parametrize(
    ("axes", "inputs", "steps", "words"),
    [
        (
            {"tp": 2},
            "global",
            1,
            ["'x', 'y'", "rank 0, others than rank 1", 'Plan(inputs="local")'],
        ),
        ({"dp": 2}, "global", 3, ["'x', 'y'", 'Plan(inputs="local")']),
        ({"tp": 2}, "local", 1, ["'x', 'y'", "differ only on tp or pp"]),
        ({"dp": 2}, "local", 3, []),
    ],
    ids=["tp-global", "dp-global", "tp-local", "dp-local"],
)
def test_ranks_that_pass_their_own_batch(axes: dict[str, int], inputs: str, steps: int, words: list[str]) -> None:
    from functools import partial

    for message in said(partial(own_batch, axes=axes, inputs=inputs, steps=steps), 2):
        assert bool(message) == bool(words) and all(word in message for word in words), message


def shuffled(rank: int) -> None:
    x, y = batch()
    parallel(Mesh(tp=2))(x.flip(0) if rank else x, y)


def test_the_same_rows_in_another_order() -> None:
    assert all("'x'" in message and "'y'" not in message for message in said(shuffled, 2))


# ---------------------------------------------------------------- weights


def own_weights(initial: str, axes: dict[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    import os

    rank = int(os.environ["RANK"])
    model = net(rank)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module = parallel(Mesh(**axes), model, initial=initial)
    x, y = batch()
    step = module.train_step(x=x, y=y)
    return before, module.full_state_dict(), step


@pytest.mark.parametrize(
    "axes", slow_but([0, 1, 2], [{"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}]), ids=["dp", "tp", "pp", "dp-tp"]
)
def test_all_take_the_weights_of_rank_0(axes: dict[str, int]) -> None:
    results = run_ranks(own_weights, Mesh(**axes).world_size, "rank0", axes)
    wanted = results[0][0]
    x, y = batch()
    loss = net(0)(x, y)
    for _, found, step in results:
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert abs(float(step) - float(loss.detach())) < 1e-12


def asked_to_be_equal(rank: int) -> None:
    model = net()
    if rank == 1:
        model.down.bias.data.neg_()  # only the signs
    parallel(Mesh(dp=2), model, initial="checked")(*batch())


def test_weights_are_asked_to_be_equal() -> None:
    for message in said(asked_to_be_equal, 2):
        assert "down.bias differ" in message and "one on rank 0, others than rank 1" in message, message


def loaded_on_one_rank(rank: int) -> None:
    module = parallel(Mesh(dp=2))
    module.prepare(*batch())
    if rank == 1:
        module.load_state_dict(net(7).state_dict())
    module(*batch())


def test_weights_loaded_on_one_rank_after_they_were_laid_out() -> None:
    for message in said(loaded_on_one_rank, 2):
        assert "down.bias" in message and "hold the same part" in message and "load_state_dict" in message, message


# ---------------------------------------------------------------- digests


def test_a_digest_depends_on_each_bit_and_its_place() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool, torch.uint8):
        numbers = torch.randn(37) * 9
        x = numbers > 0 if dtype == torch.bool else numbers.to(dtype)
        others = [x.flip(0), x.roll(1), torch.cat([x[:-1], ~x[-1:] if dtype == torch.bool else x[-1:] + 1])]
        if dtype.is_floating_point:
            others += [-x, torch.cat([-x[:2], x[2:]])]
        found = [digest(x), *map(digest, others)]
        assert len(set(found)) == len(found) and digest(x.clone()) == found[0], dtype
    large = torch.randn(1 << 19)
    assert digest(large) != digest(large.roll(1 << 18)) and digest(torch.ones(3, 4).t()) == digest(torch.ones(12))
    assert digest(torch.arange(9)[1:]) == digest(torch.arange(1, 9)) and digest(torch.ones(0)) == 0


def test_texts_of_ranks_and_of_things() -> None:
    assert [ranks_text(ranks) for ranks in ([3], [0, 2], list(range(4, 12)))] == [
        "rank 3",
        "ranks 0, 2",
        "ranks 4 to 11",
    ]
    assert ranks_text(list(range(0, 20, 2))) == "ranks 0, 2, 4, 6, 8, 10 and 4 others"
    assert digest_of(("x", object())) == digest_of(("x", object())) != digest_of(("y", object()))


def test_the_errors_are_of_the_launch() -> None:
    assert issubclass(RanksDifferError, autopar.errors.LaunchError)


def test_the_order_of_constants_does_not_count() -> None:
    """A file gives them in another order in each process (safetensors reads them into a table without one)."""
    graph, tensors = fx.Graph(), {"cos": torch.ones(2), "sin": torch.zeros(2)}
    graph.output(())
    known, backwards, other = (
        Program(graph, Mesh(dp=2), Plan(), (), (), constants=constants)
        for constants in (tensors, dict(reversed(tensors.items())), {**tensors, "sin": torch.ones(2)})
    )
    said: list[int] = []
    agreement = SimpleNamespace(start=lambda digest, *_: said.append(digest), agrees=lambda: True)
    connection: Any = SimpleNamespace(comm=SimpleNamespace(agreement=agreement))
    for program in (known, backwards, other):
        Connection.agree(connection, program)
    assert said[0] == said[1] != said[2]
