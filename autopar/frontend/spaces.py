"""Modules and classes that code holds as values: ``self.config.SCALE`` of a class, ``settings`` under another name.

Nobody is told when an attribute of a module or of a class is read. Of one that forward has met, all is taken for read
that its functions name as an attribute of anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType

from autopar.frontend.code_names import is_users, is_users_class

Space = ModuleType | type


class Spaces:
    """Those that were met, and the names in the functions that were followed.

    ``read``: reads attributes of one of them, which may meet others and follow more functions.
    """

    def __init__(self, read: Callable[[Space, Iterable[str]], None]) -> None:
        self._read = read
        self._met: dict[int, tuple[Space, int]] = {}  # with how many of the names were looked for in it
        self._names: dict[str, None] = {}

    def meet(self, value: Space) -> None:
        """``value`` is at hand."""
        own = is_users_class(value) if isinstance(value, type) else is_users(value.__name__)
        if own:
            self._met.setdefault(id(value), (value, 0))

    def name(self, names: Iterable[str]) -> None:
        """A function reads attributes of these ``names``, which are sorted, of whatever it is."""
        self._names.update(dict.fromkeys(names))

    def settle(self) -> None:
        """Read what is named of what was met."""
        is_settled = False
        while not is_settled:
            is_settled = True
            for key, (space, looked_at) in list(self._met.items()):
                if looked_at < len(self._names):
                    self._met[key], is_settled = (space, len(self._names)), False
                    self._read(space, list(self._names)[looked_at:])
