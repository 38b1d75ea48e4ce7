"""What torch keeps of the last model that it exported: the nodes of the graph, and with them tensors and stack traces.

This is the one file that knows ``_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT`` , which torch looks into
while it exports, and clears when it next does.
"""

from __future__ import annotations

from torch.fx.experimental import proxy_tensor


def forget_last_trace() -> None:
    """Let go of it; nothing where this torch has no such table."""
    getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
