"""The command line: one file per command. ``autopar.__main__`` puts them together."""

from __future__ import annotations
