"""The collectives on real gloo processes against the simulator's, what a dead peer looks like, what a launch needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.communication import functional_collectives as torch_collectives
from autopar.communication.communicator import Communicator
from autopar.communication.connect import Connection, connect
from autopar.errors import LaunchError, RankFailedError
from autopar.ir.traffic import moved_bytes
from autopar.mesh import Mesh
from autopar.simulator.lockstep import collective
from tests.dispatched import Dispatched
from tests.launch import run_ranks, try_ranks
from tests.traffic import sent_since

MESH = Mesh(dp=2, tp=2)
CPU = torch.device("cpu")
TIMEOUT = 60.0  # seconds

Case = tuple[str, tuple[int, ...], tuple[Any, ...]]  # collective, shape of a part, arguments after the axis


def cases() -> list[Case]:
    found: list[Case] = [("all_reduce", (2, 3), (op,)) for op in ("sum", "max", "min")]
    found += [(name, (2, 3), ()) for name in ("enter", "release", "keep_first")]
    for dim in (0, 1):
        for outer, ratio, length in ((1, [1], 8), (1, [1], 7), (3, [1], 12), (1, [2, 1, 1], 16)):
            where = (2, dim, outer, ratio, length)
            part = tuple(-(-length // 2) if d == dim else 3 for d in range(2))
            whole = tuple(length if d == dim else 3 for d in range(2))
            found += [(name, part, where) for name in ("all_gather", "all_gather_invariant", "pad")]
            found += [(name, whole, where) for name in ("reduce_scatter", "split", "split_replicated")]
    ends = ([0, 1, 1], [1, 1, 1]), ([1, 3, 1], [0, 1, 2, 1, 1])
    found += [("shift", (2, 3), (2, by)) for by in (1, -1, 3)]
    orders = ([1, 1, 1], [1, -2, 1]), ([0, -2, 1], [0, 1, 1])
    found += [("reorder", (8, 4), (2, *of)) for of in orders]
    return [*found, *(("all_to_all", (8, 6), (2, *end)) for end in ends)]


def part(shape: tuple[int, ...], rank: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).mul(8).to(dtype)


def run_cases() -> list[Any]:
    connection = connect(MESH, 60.0, CPU)
    comm = connection.comm
    found = []
    for axis in ("dp", "tp"):
        for name, shape, arguments in cases():
            # a tensor that is not contiguous, as a transpose in a graph gives
            x = part(shape, connection.rank).t().contiguous().t()
            before = comm.traffic
            result = getattr(comm, name)(x, axis, *arguments)
            sent = [(t.axis, t.name, t.operations, t.bytes) for t in sent_since(before, comm.traffic)]
            found.append((result, result.is_contiguous(), sent))
    return found


def test_collectives_equal_the_simulators() -> None:
    found = run_ranks(run_cases, 4)
    for rank in range(4):
        results = iter(found[rank])
        for axis in ("dp", "tp"):
            group = MESH.group(rank, axis)
            for name, shape, arguments in cases():
                parts = [part(shape, peer) for peer in group]
                expected = collective(name, parts, (axis, *arguments))[group.index(rank)]
                result, contiguous, sent = next(results)
                assert torch.equal(result, expected), (name, shape, arguments)
                assert contiguous or name in ("enter", "release"), name
                count = moved_bytes(name, 2, parts[0].numel() * 8)
                if arguments[-1:] != (7,):  # padding travels too
                    assert sent == ([(axis, name, 1, count)] if count else []), name


def run_shifts() -> tuple[list[float], int]:
    comm = connect(Mesh(tp=3), 60.0, CPU).comm
    found = [float(comm.shift(torch.tensor(float(comm.rank)), "tp", 3, by)) for by in (1, -1, 2, 3, 0, -5)]
    return found, sum(transfer.operations for transfer in comm.traffic)


def test_shifts_around_a_ring_of_three() -> None:
    for rank, (found, operations) in enumerate(run_ranks(run_shifts, 3)):
        assert found == [(rank - by) % 3 for by in (1, -1, 2, 3, 0, -5)] and operations == 4  # 3 and 0 send nothing


def run_dtypes() -> list[bool]:
    connection = connect(Mesh(tp=2), 60.0, CPU)
    equal = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        parts = [part((4, 3), rank, dtype) for rank in range(2)]
        mine = parts[connection.rank]
        equal.append(torch.equal(connection.comm.all_reduce(mine, "tp"), parts[0] + parts[1]))
        equal.append(torch.equal(connection.comm.all_gather(mine, "tp", 2, 0, length=8), torch.cat(parts)))
    return equal


def test_dtypes() -> None:
    assert all(all(equal) for equal in run_ranks(run_dtypes, 2))


def run_counted() -> tuple[dict[str, int], int, int]:
    """Operators of c10d, the bytes of their messages, and the bytes that the communicator has counted."""
    comm = connect(Mesh(tp=2), 60.0, CPU).comm
    with Dispatched() as counter:
        comm.all_reduce(torch.ones(4), "tp")
        comm.all_gather(torch.ones(4), "tp", 2, 0, length=8)
        comm.reduce_scatter(torch.ones(4), "tp", 2, 0, length=4)
        comm.all_to_all(torch.ones(4, 2), "tp", 2, (1, 1, 1), (0, 1, 1))
        comm.shift(torch.ones(4), "tp", 2, 1)
        comm.enter(torch.ones(4), "tp")
        comm.all_reduce(torch.ones(4), "dp")  # an axis of one rank
    return dict(counter.times), counter.sent, sum(transfer.bytes for transfer in comm.traffic)


def test_torch_is_asked_for_what_is_counted() -> None:
    for times, sent, counted in run_ranks(run_counted, 2):
        assert times == {"send": 5, "recv": 5}, "on gloo small collectives are messages"
        assert sent == counted == 16 + 16 + 8 + 16 + 16


# ---------------------------------------------------------------- peers that fail


def lose_a_peer(victim: int) -> tuple[str, float]:
    connection = connect(Mesh(dp=3), TIMEOUT, CPU)
    connection.comm.all_reduce(torch.ones(4), "dp")
    started = time.monotonic()
    if connection.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            connection.comm.all_reduce(torch.ones(4), "dp")
    except RankFailedError as problem:
        return str(problem), time.monotonic() - started


def test_a_killed_peer_ends_the_others_with_the_reason() -> None:
    results = try_ranks(lose_a_peer, 3, 1, timeout=2 * TIMEOUT)
    assert results[1] is None
    for rank in (0, 2):
        message, seconds = results[rank]
        assert seconds < TIMEOUT  # by the closed connection
        assert f"rank {rank} waited in all_reduce over axis 'dp'" in message and "Way out" in message
        assert len(message.splitlines()) < 8


def be_late(late: int) -> str:
    connection = connect(Mesh(tp=2), 1.5, CPU)
    if connection.rank == late:
        time.sleep(4.0)
        return "late"
    try:
        connection.comm.all_gather(torch.ones(4), "tp", 2, 0, length=8)
    except RankFailedError as problem:
        return str(problem)
    return "no error"


def test_a_peer_that_does_not_come_is_a_timeout() -> None:
    on_time, _ = run_ranks(be_late, 2, 1, timeout=60.0)
    assert "rank 0 waited in all_gather over axis 'tp' for rank 1" in on_time and "within 1.5 s" in on_time


def test_a_missing_rank_at_the_start() -> None:
    process = start("connect(autopar.Mesh(dp=2), 2.0, torch.device('cpu'))", "0", 29731)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "rank 0 waited in the start of the process group" in stderr, stderr


def start(script: str, rank: str, port: int) -> subprocess.Popen[str]:
    """One rank of two, as torchrun would start it."""
    place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [
        sys.executable,
        "-c",
        "import torch, autopar\nfrom autopar.communication.connect import connect\n" + script,
    ]
    return subprocess.Popen(command, env=os.environ | place, stderr=subprocess.PIPE, text=True)


KILLED = """
import os, signal
comm = connect(autopar.Mesh(dp=2), 30.0, torch.device("cpu")).comm
comm.all_reduce(torch.ones(2), "dp")
if comm.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
comm.all_reduce(torch.ones(2), "dp")
"""


def test_what_a_user_sees_of_it() -> None:
    ranks = [start(KILLED, rank, 29733) for rank in "01"]
    _, stderr = ranks[0].communicate(timeout=100)
    ranks[1].communicate(timeout=100)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert ranks[0].returncode == 1 and len(lines) < 15, stderr
    assert "RankFailedError" in stderr and "Traceback" not in stderr


LEFT = """
import sys, time
comm = connect(autopar.Mesh(dp=2), 3.0, torch.device("cpu")).comm
comm.all_reduce(torch.ones(2), "dp")
if comm.rank == 1:
    time.sleep(1000)
total = comm.start_all_reduce(torch.ones(1000), "dp")  # kept: what nobody has any more is waited for by the next
whole = comm.start_all_gather(torch.ones(1000), "dp", 2, 0)
sys.exit(3)
"""


def test_a_script_that_ends_amid_collectives_does_not_wait_for_a_peer_beyond_the_timeout() -> None:
    ranks = [start(LEFT, rank, 29735) for rank in "01"]
    try:
        _, stderr = ranks[0].communicate(timeout=100)
        assert ranks[1].poll() is None, "the peer neither ends nor joins"
    finally:
        ranks[1].kill()
        ranks[1].communicate(timeout=100)
    assert ranks[0].returncode == 3 and "terminate called" not in stderr, stderr


class Coming:
    """A message that is under way until somebody waits."""

    def wait(self, timeout: timedelta) -> None: ...


def test_messages_of_a_step_that_stopped_keep_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "irecv", lambda *_, **__: Coming())
    comm = Communicator(Mesh(pp=2), {"pp": None}, 0, TIMEOUT, CPU)  # type: ignore[dict-item]
    room = torch.zeros(8)
    work, held = comm.receive(room, 1), weakref.ref(room)
    del room
    assert held() is not None, "its peer will write there"
    comm.finish(work, "a message")
    assert held() is None


# ---------------------------------------------------------------- launching


def test_one_process_is_no_mesh_of_four() -> None:
    with pytest.raises(LaunchError, match="torchrun --nproc-per-node 4"):
        connect(MESH, 10.0, CPU)


def start_with_too_few() -> str:
    try:
        connect(MESH, 10.0, CPU)
    except LaunchError as problem:
        return str(problem)
    return "no error"


def test_world_size_has_to_fit() -> None:
    for message in run_ranks(start_with_too_few, 2):
        assert "mesh(dp=2 tp=2) has 4 ranks, and torchrun started 2 processes" in message
        assert "torchrun --nproc-per-node 4" in message


def bring_a_device_mesh() -> tuple[dict[str, int], torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh

    device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    connection: Connection = connect(Mesh.from_device_mesh(device_mesh), 60.0, CPU, device_mesh)
    assert connection.mesh == Mesh(dp=2, sp=2) and connection.device_mesh is device_mesh
    return connection.comm.coordinates, connection.comm.all_reduce(torch.tensor(float(connection.rank)), "sp")


def test_a_device_mesh_of_the_user() -> None:
    found = run_ranks(bring_a_device_mesh, 4)
    assert [place for place, _ in found] == [Mesh(dp=2, sp=2).coordinates(rank) for rank in range(4)]
    assert [float(total) for _, total in found] == [1.0, 1.0, 5.0, 5.0]


def disagree() -> str:
    from autopar.ir.parse import parse

    connection = connect(Mesh(tp=2), 30.0, CPU)
    program = parse("program mesh(tp=2)\n  x = input : f32[4]\n  return x")
    connection.agree(program)
    other = parse(f"program mesh(tp=2)\n  x = input : f32[{4 + connection.rank}]\n  return x")
    try:
        connection.agree(other)
    except LaunchError as problem:
        return str(problem)
    return "no error"


def test_ranks_with_different_programs_say_so() -> None:
    assert all("different programs" in message for message in run_ranks(disagree, 2))


def test_names_that_torch_is_about_to_change() -> None:
    assert torch_collectives._reduce_scatter._schema.name.startswith("_c10d_functional::")
    assert torch_collectives._all_gather_into.__name__ in ("all_gather_single", "all_gather_into_tensor")
