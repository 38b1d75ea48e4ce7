"""Pipeline schedules: instruction lists for the ranks, made by name or written by hand, with and without messages."""

from __future__ import annotations

from autopar.schedules.instructions import (
    Compute,
    Flow,
    Instruction,
    Kind,
    Link,
    Message,
    Receive,
    Schedule,
    Send,
    chain,
)
from autopar.schedules.messages import with_messages
from autopar.schedules.named import NAMES, make_schedule, stages_per_rank

__all__ = [
    "NAMES",
    "Compute",
    "Flow",
    "Instruction",
    "Kind",
    "Link",
    "Message",
    "Receive",
    "Schedule",
    "Send",
    "chain",
    "make_schedule",
    "stages_per_rank",
    "with_messages",
]
