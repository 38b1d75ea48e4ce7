"""Numbers in ONNX graphs with all of their digits.

torch's exporter writes every number as a float32 and casts that, so that a float64 model multiplies by 0.35355338.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
import onnxscript
import torch

WIDE = onnx_ir.DataType.DOUBLE


def exact_numbers(opset: int) -> dict[Any, Callable[..., Any]]:
    """What stands for ``aten.scalar_tensor``, for ``custom_translation_table`` of torch.onnx."""
    standard = onnxscript.values.Opset("", opset)

    def scalar_tensor(
        s: float, dtype: int = onnx_ir.DataType.FLOAT, layout: str = "", device: str = "", pin_memory: bool = False
    ) -> Any:
        kind = onnx_ir.DataType(dtype) if dtype != -1 else onnx_ir.DataType.FLOAT
        number = standard.Constant(value=onnx_ir.tensor(np.array(s, dtype=np.float64)))
        return number if kind is WIDE else standard.Cast(number, to=kind)

    return {torch.ops.aten.scalar_tensor.default: scalar_tensor}
