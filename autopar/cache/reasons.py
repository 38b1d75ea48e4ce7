"""Why a program is not kept."""

from __future__ import annotations


class Unstorable(Exception):
    """Another process could not tell whether a program is its own, or could not read it; the text says what of it."""
