"""Operators for which torch has a Python function with the same arguments, which is about 1 us faster to call.

A rank program calls ``torch.mm(a, b)`` for ``aten.mm``; the dispatcher gets the same operator (tested).
"""

from __future__ import annotations

from typing import Any

import torch

aten: Any = torch.ops.aten

BINDINGS: dict[Any, str] = {
    aten._unsafe_view.default: "torch.reshape",
    aten.abs.default: "torch.abs",
    aten.add.Tensor: "torch.add",
    aten.add_.Tensor: "torch.Tensor.add_",
    aten.addcmul.default: "torch.addcmul",
    aten.addcmul_.default: "torch.Tensor.addcmul_",
    aten.addmm.default: "torch.addmm",
    aten.addmm_.default: "torch.Tensor.addmm_",
    aten.amax.default: "torch.amax",
    aten.bitwise_and.Tensor: "torch.bitwise_and",
    aten.bmm.default: "torch.bmm",
    aten.cat.default: "torch.cat",
    aten.clamp.default: "torch.clamp",
    aten.clone.default: "torch.clone",
    aten.cos.default: "torch.cos",
    aten.div.Tensor: "torch.div",
    aten.div_.Tensor: "torch.Tensor.div_",
    aten.embedding.default: "torch.embedding",
    aten.exp.default: "torch.exp",
    aten.exp_.default: "torch.Tensor.exp_",
    aten.expand.default: "torch.Tensor.expand",
    aten.gather.default: "torch.gather",
    aten.gelu.default: "torch.nn.functional.gelu",
    aten.linear.default: "torch.nn.functional.linear",
    aten.log.default: "torch.log",
    aten.mean.dim: "torch.mean",
    aten.mm.default: "torch.mm",
    aten.mul.Tensor: "torch.mul",
    aten.mul_.Tensor: "torch.Tensor.mul_",
    aten.native_layer_norm.default: "torch.native_layer_norm",
    aten.neg.default: "torch.neg",
    aten.neg_.default: "torch.Tensor.neg_",
    aten.permute.default: "torch.permute",
    aten.pow.Tensor_Scalar: "torch.pow",
    aten.relu.default: "torch.relu",
    aten.reshape.default: "torch.reshape",
    aten.rsqrt.default: "torch.rsqrt",
    aten.rsqrt_.default: "torch.Tensor.rsqrt_",
    aten.scatter_add.default: "torch.scatter_add",
    aten.select.int: "torch.select",
    aten.sigmoid.default: "torch.sigmoid",
    aten.sin.default: "torch.sin",
    aten.sqrt.default: "torch.sqrt",
    aten.sqrt_.default: "torch.Tensor.sqrt_",
    aten.squeeze.dim: "torch.squeeze",
    aten.stack.default: "torch.stack",
    aten.sub.Tensor: "torch.sub",
    aten.sub_.Tensor: "torch.Tensor.sub_",
    aten.sum.default: "torch.sum",
    aten.sum.dim_IntList: "torch.sum",
    aten.t.default: "torch.t",
    aten.tanh.default: "torch.tanh",
    aten.transpose.int: "torch.transpose",
    aten.unsqueeze.default: "torch.unsqueeze",
    aten.view.default: "torch.reshape",  # kernels lay out some results otherwise than was seen while compiling
    aten.where.self: "torch.where",
    aten.zeros_like.default: "torch.zeros_like",
}
