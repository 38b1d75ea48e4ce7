"""Why a program is not kept, and why one that is kept does not serve."""

from __future__ import annotations


class Unstorable(Exception):
    """Another process could not tell whether a program is its own, or could not read it; the text says what of it."""


class NotMet(Exception):
    """What an entry says does not hold here; the text says what."""
