"""What a forward pass may not do, since a graph could not: each is refused with the line of the user's that does it.

Python's and numpy's random numbers and clocks give another value in each call, and a graph would keep the first.
``torch.autograd.grad`` inside forward asks for a gradient of something that is not yet a graph. ``part.to(device)``
moves a part of the model; where nothing moves it does nothing. ``h.register_hook`` changes or reads a gradient of
autograd's, and the backward pass of a program is its own. Other threads do as they like meanwhile.
"""

from __future__ import annotations

import os
import random
import secrets
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from autopar.errors import TraceError
from autopar.observation.source_lines import UNKNOWN_LINE, is_users_file, line_of_user

CLOCKS = (
    "time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time",
    "process_time_ns", "thread_time", "thread_time_ns", "clock_gettime", "clock_gettime_ns", "localtime", "gmtime",
    "ctime", "asctime", "strftime",
)  # fmt: skip
_CONVERTING = ("localtime", "gmtime", "ctime", "asctime", "default_rng")
_UNTOLD = {
    "strftime": 1,
    **dict.fromkeys(_CONVERTING, 0),
}  # with more arguments nothing changes
SEEDS = ("seed", "initial_seed")
DRAWING = (uuid.__file__, secrets.__file__, random.__file__)  # of Python's library, for whoever calls them
HOOKS = ("register_hook", "register_post_accumulate_grad_hook")
CHANGES = "would be that of the first call in every call"
UNCALLED = "which a program does not call: its backward pass is not autograd's"
HOOK_ELSEWHERE = (
    "change the gradient by an autograd.Function whose backward is linear; put a hook on a parameter "
    "outside of forward (parameter.register_hook); or clip gradients after the backward pass."
)
SETS_SEED = "sets the seed of torch's random numbers ({}), and a program draws its own, others in every call"
OWN_NUMBERS = (
    "numbers that are always the same are drawn once, in __init__, and kept in a buffer (register_buffer); others need "
    "no seed in forward: set it outside of the model."
)
PASS_IT = "draw or read it outside and pass it as an argument: a tensor, which may change from call to call."


@contextmanager
def nothing_forbidden() -> Iterator[None]:
    """Within this context the user's code, not torch's, is kept from what a graph cannot do. Raises TraceError."""
    before, elsewhere = random.getstate(), set[Any]()
    with ExitStack() as stack:
        for module, name, what in _changing():
            said = f"asks for {what} ({name}), which {CHANGES}"
            stack.enter_context(mock.patch.object(module, name, _refused(module, name, said, PASS_IT, elsewhere)))
        for owner, name in ((torch.autograd, "grad"), (torch.autograd, "backward"), (Tensor, "backward")):
            stack.enter_context(mock.patch.object(owner, name, _differentiates(getattr(owner, name), name)))
        for name in HOOKS:
            said = f"puts a hook on the gradient of a tensor ({name}), {UNCALLED}"
            refused = _refused(Tensor, name, said, HOOK_ELSEWHERE, elsewhere)
            stack.enter_context(mock.patch.object(Tensor, name, refused))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _moved(nn.Module._apply)))
        stack.enter_context(_seeds_kept(elsewhere))
        yield
    if random.getstate() != before and random not in elsewhere:
        random.setstate(before)
        raise TraceError(
            f"forward draws random numbers from Python's random module, which {CHANGES}\nWay out: {PASS_IT}"
        )


def _changing() -> Iterator[tuple[ModuleType, str, str]]:
    """(module, name in it, what it gives)."""
    for name in CLOCKS:
        yield time, name, "the time"
    for name in random.__all__:
        if isinstance(getattr(getattr(random, name), "__self__", None), random.Random):
            yield random, name, "a random number of Python's"
    for module in (os, random):  # for uuid, secrets, random.SystemRandom
        yield module, "urandom" if module is os else "_urandom", "a random number of the system's"
    for module in (torch, torch.random):
        for name in SEEDS:
            yield module, name, "a seed of torch's"
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        yield numpy, "default_rng", "random numbers of numpy's"
    for name in dir(numpy) if numpy is not None else ():
        if isinstance(getattr(getattr(numpy, name), "__self__", None), numpy.RandomState):
            yield numpy, name, "a random number of numpy's"


def _refused(owner: Any, name: str, said: str, way_out: str, elsewhere: set[Any]) -> Callable[..., Any]:
    """``elsewhere`` takes ``owner`` where another thread calls it."""
    original, thread = getattr(owner, name), threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            elsewhere.add(owner)
            return original(*args, **kwargs)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename in DRAWING:
            frame = frame.f_back
        is_told = name in _UNTOLD and len(args) + len(kwargs) > _UNTOLD[name] and None not in args
        if is_told or frame is None or not is_users_file(frame.f_code.co_filename):
            return original(*args, **kwargs)
        raise TraceError(f"forward {said}\n  at {line_of_user(frame)}\nWay out: {way_out}")

    return call


@contextmanager
def _seeds_kept(elsewhere: set[Any]) -> Iterator[None]:
    """Within this context forward sets no seed of torch's; a state of its generator that it takes it puts back."""
    thread, taken = threading.get_ident(), list[tuple[Tensor, str]]()
    get, put = torch.get_rng_state, torch.set_rng_state

    def get_rng_state() -> Tensor:
        state, frame = get(), sys._getframe(1)
        if threading.get_ident() == thread and is_users_file(frame.f_code.co_filename):
            taken.append((state, line_of_user(frame)))
        return state

    def set_rng_state(new_state: Tensor) -> None:
        known = [one for one in taken if one[0] is new_state]
        if known:
            taken.remove(known[0])
        frame = sys._getframe(1)
        if not known and threading.get_ident() == thread and is_users_file(frame.f_code.co_filename):
            raise _sets_seed("set_rng_state", line_of_user(frame))
        put(new_state)

    with ExitStack() as stack:
        for module in (torch, torch.random):
            said = SETS_SEED.format("manual_seed")
            seed = _refused(module, "manual_seed", said, OWN_NUMBERS, elsewhere)
            for name, new in (
                ("manual_seed", seed),
                ("get_rng_state", get_rng_state),
                ("set_rng_state", set_rng_state),
            ):
                stack.enter_context(mock.patch.object(module, name, new))
        problem = None
        try:
            yield
        except Exception as raised:
            problem = raised
    if isinstance(problem, TraceError):
        raise problem
    if taken:
        said = f"asks for a seed of torch's (get_rng_state), which {CHANGES}, and does not put it back (set_rng_state)"
        raise TraceError(f"forward {said}\n  at {taken[0][1]}\nWay out: {PASS_IT}") from problem
    if problem is not None:
        raise problem


def _sets_seed(name: str, line: str) -> TraceError:
    return TraceError(f"forward {SETS_SEED.format(name)}\n  at {line}\nWay out: {OWN_NUMBERS}")


def _differentiates(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    thread = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        if threading.get_ident() != thread or not is_users_file(frame.f_code.co_filename):
            return original(*args, **kwargs)
        line = line_of_user(frame)
        if line == UNKNOWN_LINE:
            return original(*args, **kwargs)
        raise TraceError(
            f"forward differentiates: it calls {name}(...), and a program has no second derivatives\n  at {line}\n"
            "Way out: write the derivative as operators (torch.func, or by hand), or take it outside of the model."
        )

    return call


def _moved(original: Callable[..., Any]) -> Callable[..., Any]:
    thread = threading.get_ident()

    def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if threading.get_ident() != thread:
            moved: nn.Module = original(self, fn, recurse)
            return moved
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            one = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if (one.dtype, one.device) != (tensor.dtype, tensor.device):
                line = line_of_user(sys._getframe(1))
                raise TraceError(
                    f"forward moves a part of the model: '{name}' of a {type(self).__name__}, {tensor.dtype} on "
                    f"{tensor.device}, would be {one.dtype} on {one.device}\n  at {line}\n"
                    "Way out: move the whole model before it is parallelised."
                )
        return self

    return _apply
