"""What c10d is asked for: by operator, as it is dispatched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Dispatched(TorchDispatchMode):
    """``times``: of each operator of c10d, but waits. ``sent``: bytes of messages to other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.sent = Counter[str](), 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.partition(".")[0].rstrip("_")
            self.times.update([{"allreduce": "all_reduce"}.get(name, name)] * (name != "wait_tensor"))
            self.sent += sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)) * (name == "send")
        return func(*args, **(kwargs or {}))
