"""Models, or modules in them, that ``torch.compile`` has wrapped: they run its graphs, which cannot be traced."""

from __future__ import annotations

from torch import nn


def refuse_compiled(model: nn.Module) -> None:
    """Raise ValueError where ``model`` or a module in it runs what ``torch.compile`` makes of it."""
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        if type(module).__name__ == "OptimizedModule":
            said, way_out = f"{where} is an OptimizedModule", f"give it as it was before: {where}._orig_mod."
        elif getattr(module, "_compiled_call_impl", None) is not None:
            said, way_out = f"{where}.compile() was called", "leave that line out."
        else:
            continue
        raise ValueError(
            f"{said}: it runs what torch.compile makes of it, and autopar makes programs of its own\nWay out: {way_out}"
        )
