"""The recording of a real step on one rank: when each collective, message and computation of its program ran.

A collective is noted by the communicator, under the name of its node in the graph; what lies between two of them is one
stretch of computation. One that is started early goes from its start until it was waited for: when it ended in between
is not known here. On a device, where work is launched asynchronously, times are those of the launches;
``torch.profiler`` has those of the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.node import origin


@dataclass
class Noted:
    """Something that the rank did, in seconds of this process's clock (``time.perf_counter``).

    ``stream``: ``compute``, or the group of a collective, or the direction of a message. ``operation``: the name of the
    collective in the table, ``send``, ``receive``; "" for computing.
    """

    stream: str
    name: str
    operation: str
    start: float
    end: float
    about: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """What one rank did since it was made, in ``noted``; ``base``: the start, in seconds of this process's clock."""

    def __init__(self) -> None:
        self.base = time.perf_counter()
        self.noted: list[Noted] = []
        self._run = ""
        self._since: float | None = None  # from when on this rank computes
        self._node, self._module = "", ""
        self._latest: Noted | None = None
        self._started: dict[Hashable, Noted] = {}  # address of a result, or id of a message -> what is under way

    @contextmanager
    def running(self, run: str) -> Iterator[None]:
        """The rank runs a graph of its program in between."""
        start = time.perf_counter()
        outer, self._run, self._since = self._run, run, start
        try:
            yield
        finally:
            end = time.perf_counter()
            self._computed(end, "")
            self.add("runs", run, start, end)
            self._run, self._since = outer, None
            self._node = self._module = ""

    def called(self, node: str, module: str = "") -> None:
        """The next collective is that of ``node``, of a module of the model."""
        self._node, self._module = node, module

    @contextmanager
    def issuing(self, stream: str, operation: str, size: int) -> Iterator[None]:
        """A collective or message, of which this rank sends ``size`` bytes, runs or is started in between."""
        now = time.perf_counter()
        name, module = self._node or operation, self._module
        self._node = self._module = ""
        self._computed(now, name, module)
        about = {"module": module} if module else {}
        self._latest = Noted(stream, name, operation, now, now, {"sent": size, "run": self._run, **about})
        self.noted.append(self._latest)
        try:
            yield
        finally:
            self._latest.end = time.perf_counter()
            self._resume()

    def is_under_way(self, key: Hashable) -> None:
        """What was issued last has only started: it has ended when :meth:`waiting` for ``key`` has."""
        assert self._latest is not None
        self._started[key] = self._latest

    @contextmanager
    def waiting(self, key: Hashable, name: str = "") -> Iterator[None]:
        """The rank waits, in between, for what was started. ``name``: what a message turned out to be."""
        noted = self._started.pop(key, None)
        self._node = self._module = ""
        module = noted.about.get("module", "") if noted is not None else ""
        self._computed(time.perf_counter(), noted.name if noted is not None else name, module)
        try:
            yield
        finally:
            self._resume()
            if noted is not None:
                noted.end = time.perf_counter()
                noted.name = name or noted.name

    def add(self, stream: str, name: str, start: float, end: float) -> None:
        """Something that was timed elsewhere."""
        self.noted.append(Noted(stream, name, "", start, end))

    def _computed(self, now: float, until: str, module: str = "") -> None:
        """The rank has computed up to the collective ``until``, which is of ``module``."""
        if self._since is not None and now > self._since:
            about = {key: said for key, said in (("until", until), ("until_module", module)) if said}
            self.noted.append(Noted("compute", self._run, "", self._since, now, about))

    def _resume(self) -> None:
        if self._since is not None:
            self._since = time.perf_counter()


class Named:
    """A communicator as the Python of one graph sees it: it tells the recorder the node of each call.

    The Python of a graph calls the collectives in the order of the nodes, one call for each.
    """

    def __init__(self, communicator: Any, recorder: Recorder, graph: fx.Graph) -> None:
        self._communicator, self._recorder = communicator, recorder
        self._nodes = iter([node for node in graph.nodes if node.target in comm.TARGETS])

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._communicator, name)
        return partial(self._call, name, found) if name in comm.NAMES else found

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for node in self._nodes:  # the position on an axis may be written as a number
            if comm.TARGETS[node.target] == name:
                moves = name in comm.MOVING
                self._recorder.called(node.name if moves else "", origin(node).module if moves else "")
                break
        return method(*args, **kwargs)


def epoch() -> float:
    """Seconds from the zero of this process's clock back to that of the machine's clock, which all processes share."""
    pairs = [(time.perf_counter(), time.time(), time.perf_counter()) for _ in range(9)]
    before, there, after = min(pairs, key=lambda pair: pair[2] - pair[0])
    return there - (before + after) / 2
