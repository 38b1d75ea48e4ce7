"""``autopar fit``: the meshes and plans on which a model fits a number of devices, and why it does not on others."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar.commands.bundles import expanded
from autopar.commands.memory_tables import MemoryChoices
from autopar.commands.options import Json, ModelChoices, ModelName
from autopar.commands.plan_options import PlanChoices
from autopar.commands.tables import print_json, stderr, stdout, table

if TYPE_CHECKING:  # which import torch
    from autopar.fitting.estimate import Estimate
    from autopar.fitting.fit import Fitting
    from autopar.fitting.meshes import Refused, Wanted
    from autopar.fitting.prices import Prices

VARIED, WEIGHTS = ("zero", "recompute", "sequence"), "microbatch_weights"
SHOWN_OF_ALIKE = 6  # meshes that are refused for one reason


@expanded
def fit_command(
    model: ModelName,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="how many devices there are")],
    per_node: Annotated[int, typer.Option("--per-node", min=1, help="how many of them have fast links")] = 8,
    shown: Annotated[int, typer.Option("--shown", min=1, help="meshes whose programs are compiled and shown")] = 6,
    axes: Annotated[
        str | None, typer.Option("--axes", metavar="NAMES", help="axes to try, of pp,dp,ep,sp,tp; default: what helps")
    ] = None,
    *,
    plan: PlanChoices,
    choices: ModelChoices,
    memory: MemoryChoices,
    as_json: Json = False,
) -> None:
    """List the meshes and plans on which MODEL fits: memory, bytes sent by axis, bubble; and why others do not fit.

    --batch is that of a step on all devices, --length the tokens of a row. Candidates are priced by blocks, in closed
    forms, and printed as they are known; those that are shown are compiled. zero, recompute and sequence are varied
    unless you choose them. ep is tried for models with experts, sp for long rows.
    """
    from autopar.fitting.meshes import Wanted, read_axes
    from autopar.fitting.prices import ROWS, Prices, rows_of
    from autopar.memory.device import Device, read_size

    search = _Search(model, as_json)
    device = memory.device or Device(read_size("80GB"))
    example = replace(choices, batch=ROWS).example(model)
    prices = Prices(example.model, lambda rows: rows_of(example.batch, rows), plan.plan())
    wanted = Wanted(
        gpus, per_node, choices.batch or gpus, memory.optimizer, device, plan.plan(),
        frozenset(name for name in (*VARIED, WEIGHTS) if name in plan.given), _length(example.batch),
        None if axes is None else read_axes(axes),
    )  # fmt: skip
    search.run(prices, wanted, shown)
    if as_json:
        print_json(search.document(wanted))
        return
    search.print_tables(wanted)


def _length(batch: Mapping[str, Any]) -> int | None:
    """Tokens of a row: the second dim of the tensors of whole numbers."""
    from torch import Tensor

    sizes = [x.shape[1] for x in batch.values() if isinstance(x, Tensor) and x.dim() > 1 and not x.is_floating_point()]
    return max(sizes, default=None)


@dataclass
class _Search:
    """What is known until now; unless it is ``quiet``, each candidate is printed as soon as it is known."""

    model: str
    quiet: bool
    found: list[Estimate] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    left: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    def run(self, prices: Prices, wanted: Wanted, shown: int) -> None:
        """Guess, price all meshes, then compile those that are estimated to be fastest."""
        from autopar.fitting.counted import compiled
        from autopar.fitting.meshes import tried_axes
        from autopar.fitting.weights import settled

        with stderr().status(f"pricing the blocks of {self.model}"):
            wanted, notes = settled(prices, wanted)
            _, left = tried_axes(prices.of_model, wanted)
            self.left = (*left, *notes)
            self._guessed(prices, wanted, shown)
            self._say("estimated from blocks that are compiled for each way to split them, best-first by guess:")
            fitting = list(self._priced(prices, wanted))
        self._passed("priced")
        fitting.sort(key=lambda one: one.best.seconds)
        self._say(f"{len(fitting)} meshes fit by estimate; the first {min(shown, len(fitting))} are compiled")
        for number, one in enumerate(fitting[:shown]):
            with stderr().status(f"compiling {one.mesh} ({number + 1} of {min(shown, len(fitting))})"):
                real = compiled(one, prices, wanted)
            self._take(real, wanted)
        self.found += [one.best for one in fitting[shown:]]
        self.found.sort(key=lambda one: one.seconds)
        self._passed("all")

    def _guessed(self, prices: Prices, wanted: Wanted, shown: int) -> None:
        """The first table, from the price of one rank; there within seconds."""
        from autopar.fitting.fit import guesses

        self._say(f"{_title(self.model, wanted)}\nestimated from one rank, not compiled:")
        for one in guesses(prices, wanted)[:shown]:
            mesh, plan, memory, free, _, bubble = _cells(one, wanted)
            self._say(f"{mesh}  {plan}: about {memory}, {free} free, bubble {bubble}")
        self._passed("guessed")

    def _priced(self, prices: Prices, wanted: Wanted) -> Iterator[Fitting]:
        from autopar.fitting.fit import Fitting, fits

        for one in fits(prices, wanted):
            if isinstance(one, Fitting):
                self._say(_line(one.best, wanted))
                yield one
            else:
                self.refused.append(one)

    def _take(self, real: Estimate | Refused, wanted: Wanted) -> None:
        from autopar.fitting.meshes import Refused

        if isinstance(real, Refused):
            self.refused.append(real)
            self._say(f"{_axes(real)}  does not fit after all: {real.why}")
        else:
            self.found.append(real)
            self._say(_line(real, wanted))

    def _passed(self, what: str) -> None:
        self.seconds[what] = time.perf_counter() - self.start

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line, flush=True)

    def print_tables(self, wanted: Wanted) -> None:
        from autopar.fitting.estimate import BETWEEN_NODES

        console = stdout(150)
        columns = ("mesh", "plan", "memory", "free", "sent in a step", "bubble", "time")
        fastest = self.found[0].seconds if self.found else 1.0
        rows = [(*_cells(one, wanted), f"{one.seconds / fastest:.2f}") for one in self.found]
        console.print()
        console.print(table(_title(self.model, wanted), columns, rows))
        console.print("memory: of tensors on the largest rank; ? is estimated, the others are compiled", soft_wrap=True)
        console.print("free: what a device has left of it, for kernels, fragments and buffers of NCCL", soft_wrap=True)
        links = f"{BETWEEN_NODES / 1e9:.0f} GB/s where an axis leaves its node"
        about = "a roofline of the operators of a block, the pipeline's bubble, and bytes over links"
        said = f"sorted by the estimated time of a step: {about} ({links}), none of it hidden; only ratios matter"
        console.print(said, soft_wrap=True)
        for line in self.left:
            console.print(line, soft_wrap=True)
        console.print()
        console.print(table("these do not", ("mesh", "why"), list(_reasons(self.refused))))
        took = self.seconds
        said = f"guessed in {took['guessed']:.0f} s, priced in {took['priced']:.0f} s, compiled in {took['all']:.0f} s"
        print(said, file=sys.stderr)

    def document(self, wanted: Wanted) -> dict[str, Any]:
        return {
            "model": self.model,
            "devices": wanted.devices,
            "device_bytes": wanted.device.bytes,
            "optimizer": wanted.optimizer,
            "batch": wanted.rows,
            "length": wanted.length,
            "fits": [_json(one, wanted) for one in self.found],
            "refused": [{"mesh": dict(one.mesh.axes), "why": one.why} for one in self.refused],
            "not_tried": list(self.left),
            "took_seconds": dict(self.seconds),
        }


def _title(model: str, wanted: Wanted) -> str:
    from autopar.ir.traffic import size_text

    device = f"{wanted.devices} devices of {size_text(wanted.device.bytes)}"
    return f"{model} on {device}, {wanted.rows} rows a step, {wanted.optimizer}"


def _line(one: Estimate, wanted: Wanted) -> str:
    mesh, plan, memory, free, sent, bubble = _cells(one, wanted)
    return f"{mesh}  {plan}: {memory}, {free} free, bubble {bubble}, sends {sent}"


def _cells(one: Estimate, wanted: Wanted) -> tuple[str, ...]:
    from autopar.fitting.fit import in_words
    from autopar.ir.traffic import size_text

    return (
        _axes(one),
        in_words(one),
        size_text(one.memory) + ("" if one.compiled else " ?"),
        size_text(-wanted.device.over(one.memory)),
        ", ".join(f"{axis} {size_text(size)}" for axis, size in one.sent.items() if size) or "0",
        f"{one.bubble:.1%}",
    )


def _reasons(refused: Sequence[Refused]) -> Iterator[tuple[str, str]]:
    """(meshes, why); those with one reason together."""
    by_reason: dict[str, list[str]] = {}
    for one in refused:
        by_reason.setdefault(one.why, []).append(_axes(one))
    for why, alike in by_reason.items():
        more = f"; and {len(alike) - SHOWN_OF_ALIKE} more" if len(alike) > SHOWN_OF_ALIKE else ""
        yield "; ".join(alike[:SHOWN_OF_ALIKE]) + more, why


def _axes(one: Estimate | Refused) -> str:
    return ",".join(f"{axis}={size}" for axis, size in one.mesh.axes)


def _json(one: Estimate, wanted: Wanted) -> dict[str, Any]:
    return {
        "mesh": dict(one.mesh.axes),
        "plan": {name: getattr(one.plan, name) for name in (*VARIED, "microbatches", WEIGHTS, "schedule")},
        "rows": one.rows,
        "memory_bytes": one.memory,
        "free_bytes": -wanted.device.over(one.memory),
        "compiled": one.compiled,
        "sent_bytes": dict(one.sent),
        "bubble": one.bubble,
        "seconds": one.seconds,
    }
