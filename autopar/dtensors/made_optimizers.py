"""The optimizers of this process that were made so far.

Python's garbage collector knows them. To ask it goes through all objects, 40 ms with transformers imported, so only
classes are looked for that may have any: torch marks ``step`` of a class (``hooked``) when the first object is made.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

from torch.optim import Optimizer


def made_optimizers() -> list[Optimizer]:
    """All of them, those of subclasses too; and objects of classes that never call ``Optimizer.__init__``."""
    kinds = [kind for kind in _subclasses(Optimizer) if _may_have_objects(kind)]
    found = gc.get_referrers(*kinds) if kinds else []  # an object refers to its class
    return [thing for thing in found if issubclass(type(thing), Optimizer)]


def _subclasses(kind: type[Optimizer]) -> Iterator[type[Optimizer]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from _subclasses(inner)


def _may_have_objects(kind: type[Optimizer]) -> bool:
    if getattr(kind.step, "hooked", False):
        return True
    wraps = hasattr(kind, "param_groups")  # those of another optimizer, as accelerate's does
    return not wraps and not kind.__module__.startswith("torch.")
