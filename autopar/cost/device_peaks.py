"""The most floating-point operations per second that devices promise, for products of dense matrices.

Numbers are those of the vendors' data sheets, without sparsity, in Tflop/s. ``tf32`` stands for float32 products for
which ``torch.backends.cuda.matmul.fp32_precision`` allows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """``name``: a pattern for what ``torch.cuda.get_device_name`` says. ``tflops``: by dtype. ``source``: of these."""

    name: str
    tflops: Mapping[str, float]
    source: str


def _row(name: str, half: float, tf32: float, single: float, source: str) -> Peak:
    """A device that multiplies bfloat16 as fast as float16."""
    return Peak(name, {"bfloat16": half, "float16": half, "tf32": tf32, "float32": single}, source)


PEAKS = (  # the first pattern that is found counts
    _row(r"H200 NVL", 835.5, 417.5, 60.0, "NVIDIA H200 data sheet, 2024"),
    _row(r"H200|GH200", 989.5, 494.5, 67.0, "NVIDIA H200 data sheet, 2024"),
    _row(r"H100 PCIe", 756.0, 378.0, 51.0, "NVIDIA H100 data sheet, 2023"),
    _row(r"H100 NVL", 835.5, 417.5, 60.0, "NVIDIA H100 data sheet, 2024"),
    _row(r"H100", 989.5, 494.5, 67.0, "NVIDIA H100 data sheet, 2023"),
    _row(r"A100", 312.0, 156.0, 19.5, "NVIDIA A100 data sheet, 2021"),
    _row(r"A40\b", 149.7, 74.8, 37.4, "NVIDIA A40 data sheet, 2021"),
    _row(r"A30\b", 165.0, 82.0, 10.3, "NVIDIA A30 data sheet, 2021"),
    _row(r"A10\b", 125.0, 62.5, 31.2, "NVIDIA A10 data sheet, 2021"),
    _row(r"L40S", 362.0, 183.0, 91.6, "NVIDIA L40S data sheet, 2023"),
    _row(r"L4\b", 121.0, 60.0, 30.3, "NVIDIA L4 data sheet, 2023"),
    Peak(r"V100-SXM", {"float16": 125.0, "float32": 15.7}, "NVIDIA V100 data sheet, 2020"),
    Peak(r"V100", {"float16": 112.0, "float32": 14.0}, "NVIDIA V100 data sheet, 2020"),
    Peak(r"\bT4\b", {"float16": 65.0, "float32": 8.1}, "NVIDIA T4 data sheet, 2019"),
    _row(r"MI300X|MI325X", 1307.4, 653.7, 163.4, "AMD Instinct MI300X data sheet, 2023"),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of ``device`` for products of ``dtype``; None for a device or dtype that is not known."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype, torch.backends.cuda.matmul.fp32_precision == "tf32")


def peak_of(name: str, dtype: torch.dtype, allows_tf32: bool = False) -> float | None:
    """As :func:`peak_flops`, by the device's name."""
    found = next((peak for peak in PEAKS if re.search(peak.name, name)), None)
    if found is None:
        return None
    word = str(dtype).removeprefix("torch.")
    number = found.tflops.get("tf32" if word == "float32" and allows_tf32 and "tf32" in found.tflops else word)
    return None if number is None else number * 1e12
