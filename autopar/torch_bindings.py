"""Operators that torch also binds as a Python function with the same arguments, which is about 1 us faster to call.

A rank program calls ``torch.mm(a, b)`` for ``aten.mm``; what reaches the dispatcher is the same operator (tested).
"""

from __future__ import annotations

from typing import Any

import torch

aten: Any = torch.ops.aten

BINDINGS: dict[Any, str] = {
    aten.abs.default: "torch.abs",
    aten.add.Tensor: "torch.add",
    aten.addmm.default: "torch.addmm",
    aten.amax.default: "torch.amax",
    aten.bitwise_and.Tensor: "torch.bitwise_and",
    aten.bmm.default: "torch.bmm",
    aten.cat.default: "torch.cat",
    aten.clamp.default: "torch.clamp",
    aten.clone.default: "torch.clone",
    aten.cos.default: "torch.cos",
    aten.div.Tensor: "torch.div",
    aten.embedding.default: "torch.embedding",
    aten.exp.default: "torch.exp",
    aten.expand.default: "torch.Tensor.expand",
    aten.gather.default: "torch.gather",
    aten.gelu.default: "torch.nn.functional.gelu",
    aten.linear.default: "torch.nn.functional.linear",
    aten.log.default: "torch.log",
    aten.mean.dim: "torch.mean",
    aten.mm.default: "torch.mm",
    aten.mul.Tensor: "torch.mul",
    aten.native_layer_norm.default: "torch.native_layer_norm",
    aten.neg.default: "torch.neg",
    aten.permute.default: "torch.permute",
    aten.pow.Tensor_Scalar: "torch.pow",
    aten.relu.default: "torch.relu",
    aten.reshape.default: "torch.reshape",
    aten.rsqrt.default: "torch.rsqrt",
    aten.scatter_add.default: "torch.scatter_add",
    aten.select.int: "torch.select",
    aten.sigmoid.default: "torch.sigmoid",
    aten.sin.default: "torch.sin",
    aten.sqrt.default: "torch.sqrt",
    aten.squeeze.dim: "torch.squeeze",
    aten.stack.default: "torch.stack",
    aten.sub.Tensor: "torch.sub",
    aten.sum.default: "torch.sum",
    aten.sum.dim_IntList: "torch.sum",
    aten.t.default: "torch.t",
    aten.tanh.default: "torch.tanh",
    aten.transpose.int: "torch.transpose",
    aten.unsqueeze.default: "torch.unsqueeze",
    aten.view.default: "torch.Tensor.view",
    aten.where.self: "torch.where",
    aten.zeros_like.default: "torch.zeros_like",
}
