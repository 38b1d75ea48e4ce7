"""What is known of one training step, for lines of text, logs, dashboards and hooks of a user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from autopar.ir.load import ExpertLoad
from autopar.ir.traffic import size_text


@dataclass(frozen=True)
class StepRecord:
    """One step as rank 0 saw it.

    Attributes:
        step: its number; the first is 0.
        loss: of the whole batch; None where a script does not say it.
        grad_norm: of all gradients of the model, before they are clipped; None where a script does not say it.
        seconds: of forward, backward and the optimizer.
        tokens_per_second: of all ranks together; None where a script does not say how many there are.
        rows_per_second: the same of rows, where nothing says what a token is.
        peak_memory_bytes: the most that rank 0 has held until now: torch's allocations on a CUDA device, elsewhere the
            resident memory of the process.
        communication_share: the part of ``seconds`` in which rank 0 waited in collectives and messages, 0 to 1. What
            runs while the rank computes does not count.
        sent_bytes: by axis of the mesh, what rank 0 has sent.
        mfu: model flops utilisation, 0 to 1: the operations that the model needs (``autopar/cost/model_flops.py``),
            by what all devices could do in ``seconds``; None where the peak of the device is not known.
        peak_memory_bytes_most: the same of the rank that has held most; None in a script.
        evaluation_loss: after the step, of the data of an evaluation, where one was due.
        reference_loss: of the unmodified model on one device, where ``autopar train`` compares.
        expert_load: of each layer of experts, where the plan counts it.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    seconds: float
    tokens_per_second: float | None
    peak_memory_bytes: int
    communication_share: float = 0.0
    sent_bytes: Mapping[str, int] = field(default_factory=dict)
    mfu: float | None = None
    peak_memory_bytes_most: int | None = None
    reference_loss: float | None = None
    evaluation_loss: float | None = None
    rows_per_second: float | None = None
    expert_load: Mapping[str, ExpertLoad] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; without what is not known."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        found["sent_bytes"] = dict(self.sent_bytes)
        found["expert_load"] = {layer: load.to_json() for layer, load in self.expert_load.items()} or None
        return {name: value for name, value in found.items() if value is not None}

    def numbers(self) -> dict[str, float]:
        """What a dashboard draws, by name; bytes by axis as ``sent_bytes/dp``."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "step"}
        single = {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}
        return single | {f"sent_bytes/{axis}": float(count) for axis, count in self.sent_bytes.items()}

    def line(self, steps: int | None = None) -> str:
        """One line of text; ``steps``: of the whole run."""
        number = f"{self.step + 1}/{steps}" if steps is not None else f"{self.step + 1}"
        parts = [
            f"step {number}",
            None if self.loss is None else f"loss {self.loss:.4f}",
            None if self.evaluation_loss is None else f"evaluation loss {self.evaluation_loss:.4f}",
            None if self.grad_norm is None else f"grad norm {self.grad_norm:.3g}",
            None if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s",
            None if self.rows_per_second is None else f"{self.rows_per_second:,.0f} rows/s",
            size_text(self.peak_memory_bytes_most or self.peak_memory_bytes),
            f"{self.communication_share:.0%} in collectives",
            None if self.mfu is None else f"mfu {self.mfu:.1%}",
        ]
        return "  ".join(part for part in parts if part is not None)
