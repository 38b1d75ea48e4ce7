"""Buffers that forward writes, over microbatches: the step is that of the batch, in which forward runs once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import InvariantError, Mesh, Plan
from autopar.check import check
from autopar.compiler import compile_program
from autopar.ir.program import Program
from autopar.proof.verify import verify
from autopar.simulate import simulate
from tests.against_one_process import difference
from tests.launch import run_ranks
from tests.selection import one_each, slow_but


class Net(nn.Module):
    """``write`` is called between two layers, and gives what the loss is multiplied with."""

    def __init__(self, write: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.write = write
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("state", torch.full((8,), 0.5))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.up(x))
        factor = self.write(self, h, mask)
        error = self.down(h).square().mean(-1)
        return {"loss": (error * mask).sum() / mask.sum() * factor, "state": h.sum(0)}


def counter(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    net.count += 1
    return 1.0 / net.count


def decay(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    net.state.mul_(0.9).add_(0.1)
    return net.state.sum()


def of_weights(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    """As the vectors of a spectral norm."""
    with torch.no_grad():
        net.state.copy_(nn.functional.normalize(net.up.weight @ net.up.weight.T @ net.state, dim=0))
    return net.state @ net.up.weight.sum(1)


def running_mean(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    before = net.state.sum()
    net.state.lerp_(h.detach().mean(0), 0.1)
    return before


def sum_of_rows(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    net.state += h.detach().sum(0)
    return torch.ones(())


def mean_of_labelled(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    found = (h.detach() * mask[:, None]).sum(0) / mask.sum()
    net.state.copy_(0.8 * net.state + 0.2 * found)
    return torch.ones(())


def tokens_seen(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    net.count += mask.bool().sum()
    return torch.ones(())


def rows_seen(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    net.count += len(h)
    return torch.ones(())


MESHES = [Mesh(pp=2), Mesh(dp=2), Mesh(pp=2, dp=2)]


KINDS: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    one.__name__: one
    for one in (counter, decay, of_weights, running_mean, sum_of_rows, mean_of_labelled, tokens_seen, rows_seen)
}


def net_and_batch(kind: Callable[[Net, Tensor, Tensor], Tensor]) -> tuple[Net, dict[str, Tensor]]:
    """Eight rows with unequal weights."""
    torch.manual_seed(0)
    mask = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1], dtype=torch.float64)
    return Net(kind).double(), {"x": torch.randn(8, 6, dtype=torch.float64), "mask": mask}


@pytest.mark.parametrize("kind", slow_but([0, 3, 6, 7], KINDS.values()))
def test_on_one_rank(kind: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
    """Microbatches of two sizes, two steps."""
    net, batch = net_and_batch(kind)
    parallel = autopar.parallelize(copy.deepcopy(net), Mesh(), Plan(microbatches=3))
    for _ in range(2):
        net.zero_grad()
        parallel.zero_grad()
        expected = net(**batch)["loss"]
        expected.backward()
        torch.testing.assert_close(parallel.train_step(**batch), expected.detach(), rtol=1e-12, atol=0)
        for name, grad in parallel.full_grads().items():
            torch.testing.assert_close(grad, net.get_parameter(name).grad, rtol=1e-10, atol=1e-14)
        for name, buffer in net.named_buffers():
            torch.testing.assert_close(parallel.get_buffer(name), buffer, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "mesh"), one_each(KINDS, MESHES, [(0, 0), (3, 2), (5, 1), (6, 0)]), ids=str)
def test_on_a_mesh(kind: str, mesh: Mesh) -> None:
    net, batch = net_and_batch(KINDS[kind])
    plan = Plan(microbatches=3 if mesh == Mesh(pp=2) else 2)
    assert check(net, batch, mesh, plan).passed
    found = verify(net, mesh, plan, example_inputs=batch)
    assert found.proved, str(found)
    if mesh.is_pipelined:
        program = compile_program(net, mesh, plan, (), batch)
        step = simulate(program, dict(net.state_dict()), (), batch)
        net(**batch)
        for name, buffer in step.buffers.items():
            torch.testing.assert_close(buffer, net.get_buffer(name), rtol=1e-12, atol=0)


def test_a_program_on_disk_knows_it_too(tmp_path: Path) -> None:
    net, batch = net_and_batch(running_mean)
    program = compile_program(net, Mesh(pp=2), Plan(microbatches=3), (), batch)
    program.save(tmp_path / "program")
    found = simulate(Program.load(tmp_path / "program"), dict(net.state_dict()), (), batch)
    wanted = net(**batch)["loss"].detach()
    torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.buffers["state"], net.get_buffer("state"), rtol=1e-12, atol=0)


def queue(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    net.state.copy_(torch.cat([net.state[1:], h.detach().amax()[None]]))
    return torch.ones(())


def balance(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    load = h.detach().abs().sum(0)
    net.state += 0.01 * torch.sign(load.mean() - load)
    return torch.ones(())


def share_of_rows(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    net.state.mul_(1 - 1 / len(h))
    return torch.ones(())


@pytest.mark.parametrize("kind", [queue, balance, share_of_rows])
def test_what_parts_do_not_tell_is_refused(kind: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
    net, batch = net_and_batch(kind)
    with pytest.raises(InvariantError, match=r"buffer 'state' is not made .* at test_buffers_in_parts"):
        compile_program(net, Mesh(pp=2), Plan(microbatches=2), (), batch)


@pytest.mark.parametrize("weights", slow_but([0], ["statistics", "rows"]))
@pytest.mark.parametrize("kind", [balance, counter])
def test_by_hand(kind: Callable[[Net, Tensor, Tensor], Tensor], weights: str) -> None:
    """Each microbatch finds what the one before has written, where the batch does not tell it or nobody wants it."""
    net, batch = net_and_batch(kind)
    batch["mask"].fill_(1)
    parallel = autopar.parallelize(copy.deepcopy(net), Mesh(), Plan(microbatches=2, microbatch_weights=weights))
    found = parallel.train_step(**batch)
    if kind is counter and weights == "statistics":
        expected = net(**batch)["loss"]
    else:
        halves = [{name: tensor.chunk(2)[i] for name, tensor in batch.items()} for i in range(2)]
        expected = sum(net(**half)["loss"] for half in halves) / 2
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(parallel.get_buffer(name), buffer, rtol=1e-12, atol=0)


def beside_a_maximum(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    """What parts do not tell, and what they would: both are written by each part."""
    net.state.copy_(torch.cat([h.detach().amax()[None], (0.5 * net.state + h.detach().sum(0))[1:]]))
    net.count += mask.bool().sum()
    return torch.ones(())


def of_squares(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    net.state.copy_(0.9 * net.state + 0.1 * h.detach().square().mean(0).sqrt())
    return torch.ones(())


@pytest.mark.parametrize("kind", [beside_a_maximum, of_squares])
def test_statistics_that_are_written_by_hand(kind: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
    """No part of them is weighed, as the loss is."""
    net, batch = net_and_batch(kind)
    plan = Plan(microbatches=2, microbatch_weights="statistics")
    parallel = autopar.parallelize(copy.deepcopy(net), Mesh(), plan)
    whole = copy.deepcopy(net)(**batch)["loss"].detach()
    torch.testing.assert_close(parallel.train_step(**batch), whole, rtol=1e-12, atol=0)
    for i in range(2):
        net(**{name: tensor.chunk(2)[i] for name, tensor in batch.items()})
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(parallel.get_buffer(name), buffer, rtol=1e-12, atol=0)


class Added(Net):
    """The loss reads a sum over rows once those of this batch are in it."""

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.up(x))
        self.state += h.detach().sum(0)
        return {"loss": self.down(h).square().mean() + self.state.mean()}


def test_the_new_value_is_that_of_the_batch_where_it_is_read() -> None:
    _, batch = net_and_batch(counter)
    net = Added(counter).double()
    parallel = autopar.parallelize(copy.deepcopy(net), Mesh(), Plan(microbatches=2))
    for _ in range(2):
        wanted = net(**batch)["loss"].detach()
        torch.testing.assert_close(parallel.train_step(**batch), wanted, rtol=1e-12, atol=0)
        torch.testing.assert_close(parallel.get_buffer("state"), net.get_buffer("state"), rtol=1e-12, atol=0)


class OfFour(Net):
    """Takes batches of four rows only."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if len(x) != 4:
            raise ValueError("four rows")
        self.count += 1
        return nn.functional.mse_loss(self.down(self.up(x)), x)


def test_a_model_that_takes_one_number_of_rows() -> None:
    _, batch = net_and_batch(counter)
    net = OfFour(counter).double()
    plan = Plan(microbatches=2, microbatch_weights="statistics")
    compile_program(net, Mesh(pp=2), plan, (), batch)
    with pytest.raises(InvariantError, match=r"a batch of 4 rows and no other"):
        compile_program(net, Mesh(pp=2), Plan(microbatches=2), (), batch)


def test_a_step_that_stops_writes_nothing() -> None:
    net, batch = net_and_batch(counter)
    parallel = autopar.parallelize(net, Mesh(), Plan(microbatches=2))
    parallel.train_step(**batch)
    calls = []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("in the second microbatch")

    handle = parallel.register_forward_hook(stop)
    with pytest.raises(KeyError):
        parallel.train_step(**batch)
    handle.remove()
    assert int(parallel.count) == 1


def test_a_forward_hook_changes_nothing() -> None:
    """Each microbatch counts for as much as without it."""
    net, batch = net_and_batch(decay)
    parallel = autopar.parallelize(copy.deepcopy(net), Mesh(), Plan(microbatches=3))
    seen: list[float] = []
    parallel.register_forward_hook(lambda module, args, output: seen.append(float(output["loss"])))
    loss = parallel.train_step(**batch)
    torch.testing.assert_close(loss, net(**batch)["loss"].detach(), rtol=1e-12, atol=0)
    assert len(seen) == 3 and abs(sum(seen) - float(loss)) < 1e-12


def after_all(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    """Written by the last stage; the first one has saved it for backward."""
    return torch.ones(())


class Late(Net):
    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.up(x)) * self.state.clone()
        error = self.down(h).square().mean(-1)
        self.state.mul_(0.5).add_(3.0 * error.detach().mean())
        return {"loss": (error * mask).sum() / mask.sum()}


def in_stages(schedule: str) -> list[float]:
    """The errors of four steps; one stage writes the buffer that another one reads."""
    found = []
    for kind in (counter, running_mean, tokens_seen, of_weights, after_all):
        net, batch = net_and_batch(kind)
        net = Late(kind).double() if kind is after_all else net
        plan = Plan(microbatches=3, schedule=schedule, cuts=("down",))
        parallel = autopar.parallelize(copy.deepcopy(net), Mesh(pp=2), plan)
        for step in range(4):
            net.zero_grad()
            parallel.zero_grad()
            expected = net(**batch)["loss"]
            expected.backward()
            if step == 2:
                loss = parallel(**batch)["loss"]
                loss.backward()
            else:
                loss = parallel.train_step(**batch)
            found.append(difference(loss, expected))
            for name, grad in parallel.full_grads().items():
                found.append(difference(grad, net.get_parameter(name).grad))
            for name, buffer in parallel.named_buffers():
                found.append(difference(buffer, net.get_buffer(name)))
    return found


@pytest.mark.parametrize("schedule", slow_but([0], ["1f1b", "gpipe"]))
def test_on_real_stages(schedule: str) -> None:
    for errors in run_ranks(in_stages, 2, schedule):
        assert max(errors) <= 1e-12, errors
