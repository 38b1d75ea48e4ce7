"""Pipeline schedules: the door to what a schedule is, how one is made by name, and how messages are inserted."""

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
