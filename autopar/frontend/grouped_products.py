"""``torch.nn.functional.grouped_mm`` where torch refuses it: in float64, and of any type but bfloat16 without numbers.

There transformers calls an operator of its own instead. In a trace that becomes one of ours too, so that a graph can be
read where transformers is not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from autopar.operators.experts import EXPERT_LINEAR


class GroupedProducts(TorchFunctionMode):
    """Within this context, grouped products (rows with one matrix a group) run in float64; in a trace, and with fake
    tensors, of any dtype.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        if getattr(func, "_qualified_op_name", "") == _FALLBACK and torch.compiler.is_exporting():  # type: ignore[no-untyped-call]
            return _traced(*args, **kwargs)
        if func is torch._grouped_mm:
            exporting = torch.compiler.is_exporting()  # type: ignore[no-untyped-call]
            fake = any(isinstance(arg, FakeTensor) for arg in args)  # it has no numbers to loop by
            product, refused = (_traced, _REFUSED_IN_A_TRACE) if exporting or fake else (_looped, _REFUSED)
            if _is_plain(*args, **kwargs) and args[0].dtype in refused:
                return product(args[0], args[1], kwargs.get("offs", args[-1]))
        return func(*args, **kwargs)


_FALLBACK = "transformers::grouped_mm_fallback"  # (rows, weight, ends)
_REFUSED = (torch.float64,)
_REFUSED_IN_A_TRACE = (torch.float64, torch.float32, torch.float16)


def _is_plain(rows: Tensor, weight: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> bool:
    """(N, I) times (E, I, O); rows of group e end before ``offs[e]``."""
    return rows.dim() == 2 and weight.dim() == 3 and offs is not None and bias is None and out_dtype is None


def _traced(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    places = torch.arange(rows.shape[0], dtype=offs.dtype, device=offs.device)
    found: Tensor = EXPERT_LINEAR(rows, weight, torch.searchsorted(offs, places, right=True))
    return found


def _looped(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The products one after the other, by torch's operators alone; the reference for ours."""
    ends = offs.tolist()
    parts = [rows[start:end] @ matrix for matrix, start, end in zip(weight, [0, *ends], ends)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], weight.shape[2])])
