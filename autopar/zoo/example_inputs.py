"""Example inputs as a command line describes them: ``--input ids=BxT:int64 --input x=4x8 --input t=4:int64:0..999``.

An input is NAME=SHAPE, with a dtype (float32 by default) and, of integers, a range with both ends. In a shape ``B`` is
the number of rows and ``T`` the number of tokens; ``scalar`` has no dims. ``NAME=true``, ``false`` or ``none`` is that
value itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopar.errors import near_names

CONSTANTS = {"true": True, "false": False, "none": None}
SHORT = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16",
    "i64": "int64", "i32": "int32", "long": "int64", "int": "int64", "float": "float32", "half": "float16",
}  # fmt: skip
DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
WAY_OUT = "Way out: --input x=4x8, --input ids=BxT:int64, --input steps=4:int64:0..999, for example."


@dataclass(frozen=True)
class Described:
    """One input. ``shape``: sizes, or ``B`` and ``T``. ``low``, ``high``: both ends of the range of integers."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    low: int | None = None
    high: int | None = None

    @property
    def has_open_range(self) -> bool:
        return self.high is None and not (self.dtype.is_floating_point or self.dtype.is_complex) and (
            self.dtype is not torch.bool
        )  # fmt: skip

    def tensor(self, rows: int, length: int, generator: torch.Generator, below: int) -> Tensor:
        """A random tensor; integers without a range are from 0 to ``below`` - 1."""
        sizes = {"B": rows, "T": length}
        shape = [sizes[size] if isinstance(size, str) else size for size in self.shape]
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(shape, generator=generator).to(self.dtype)
        low, high = (0, below - 1) if self.high is None else (self.low or 0, self.high)
        if self.dtype is torch.bool:
            low, high = 0, 1
        return torch.randint(low, high + 1, shape, generator=generator).to(self.dtype)


Inputs = Mapping[str, Described | bool | None]


def described(texts: Iterable[str]) -> dict[str, Described | bool | None]:
    """The inputs of ``["ids=BxT:int64", "return_dict=true"]``, by name. Raises ValueError."""
    found: dict[str, Described | bool | None] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--input {text}: it is not of the form NAME=SHAPE:DTYPE\n{WAY_OUT}")
        if name in found:
            raise ValueError(f"--input {text}: '{name}' is given twice\n{WAY_OUT}")
        found[name] = CONSTANTS[rest.lower()] if rest.lower() in CONSTANTS else _described(name, rest, text)
    return found


def _described(name: str, rest: str, text: str) -> Described:
    shape, _, more = rest.partition(":")
    dtype, _, limits = more.partition(":")
    known = SHORT.get(dtype, dtype or "float32").removeprefix("torch.")
    if known not in DTYPES:
        raise ValueError(f"--input {text}: no dtype '{dtype}'{near_names(dtype, DTYPES)}\nWay out: {', '.join(DTYPES)}")
    sizes = () if shape == "scalar" else tuple(shape.split("x"))
    if not all(size in ("B", "T") or size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"--input {text}: the shape '{shape}' is no list of sizes, 4x8\n{WAY_OUT}")
    kind: torch.dtype = getattr(torch, known)
    limit = RANGE.fullmatch(limits)
    if limits and (limit is None or int(limit[1]) > int(limit[2])):
        raise ValueError(f"--input {text}: the range '{limits}' is not of the form LOW..HIGH\n{WAY_OUT}")
    if limit is not None and (kind.is_floating_point or kind.is_complex):
        raise ValueError(f"--input {text}: a range is for integers\n{WAY_OUT}")
    low, high = (int(limit[1]), int(limit[2])) if limit is not None else (None, None)
    return Described(name, tuple(size if size in ("B", "T") else int(size) for size in sizes), kind, low, high)


def check_names(model: nn.Module, inputs: Inputs, name: str) -> None:
    """Raise ValueError for an input that ``forward`` does not take, and for one that it needs and does not get."""
    takes = inspect.signature(model.forward).parameters
    if any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in takes.values()):
        return
    for key in inputs:
        if key not in takes:
            raise ValueError(
                f"--input {key}: the forward of {name} has no such argument{near_names(key, takes)}\n"
                f"Way out: --input {' --input '.join(f'{known}=...' for known in takes)}"
            )
    absent = [
        key for key, entry in takes.items()
        if entry.default is entry.empty and key not in inputs and entry.kind is not inspect.Parameter.VAR_POSITIONAL
    ]  # fmt: skip
    if absent:
        raise ValueError(f"the forward of {name} needs {', '.join(absent)}\nWay out: --input {absent[0]}=4x8, ...")


def of_language(model: nn.Module) -> tuple[str, ...]:
    """The inputs of a model whose forward takes ``input_ids``, and ``labels`` too if it does; () for any other."""
    takes = inspect.signature(model.forward).parameters
    needed = {name for name, entry in takes.items() if entry.default is entry.empty and entry.kind not in VARIADIC}
    known = [name for name in ("input_ids", "labels") if name in takes]
    return tuple(f"{name}=BxT:int64" for name in known) if "input_ids" in known and needed <= {*known} else ()


def forward_of(model: nn.Module) -> str:
    """``--input ids=SHAPE --input mask=SHAPE``: the arguments that forward needs, as options."""
    takes = inspect.signature(model.forward).parameters.values()
    needed = [entry.name for entry in takes if entry.default is entry.empty and entry.kind not in VARIADIC]
    return " ".join(f"--input {name}=4x8" for name in needed) or "--input x=4x8"
