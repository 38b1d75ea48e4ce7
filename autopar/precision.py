"""Precision: the dtypes of computing, of reducing gradients and of outputs, where they differ from the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from autopar.errors import unknown_name

if TYPE_CHECKING:
    import torch


NAMES = {  # as they are also written -> as torch calls them
    **dict.fromkeys(("float64", "f64", "fp64", "double"), "float64"),
    **dict.fromkeys(("float32", "f32", "fp32", "float"), "float32"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float16", "f16", "fp16", "half"), "float16"),
}


@dataclass(frozen=True, init=False)
class Precision:
    """Mixed precision with the meaning of FSDP2's ``MixedPrecisionPolicy``; None leaves things as the model has them.

    The parameters keep their own dtype (float32: the master copy), and so do their gradients and what the optimizer
    makes of them. Buffers are not cast. What the model casts itself (norms, logits) keeps its meaning.

    Attributes:
        param: parameters and floating inputs are cast to it before they are gathered and used.
        reduce: gradients are summed over ranks in it, and added up in it under ``no_sync``. None: in the dtype in which
            they are computed, which is ``param`` (FSDP2's default); ``float32`` costs twice the bytes of ``bfloat16``.
        output: floating outputs, the loss too, are cast to it.

    Raises ValueError for what is neither a floating torch dtype nor the name of one (``"bfloat16"``, ``"bf16"``).
    """

    param: str | None
    reduce: str | None
    output: str | None

    def __new__(cls, *values: object, **choices: object) -> Precision:
        for name in choices:
            if name not in ("param", "reduce", "output"):
                raise ValueError(unknown_name("Precision has no choice", name, ("param", "reduce", "output")))
        return super().__new__(cls)

    def __init__(
        self,
        param: torch.dtype | str | None = None,
        reduce: torch.dtype | str | None = None,
        output: torch.dtype | str | None = None,
    ) -> None:
        for name, given in (("param", param), ("reduce", reduce), ("output", output)):
            object.__setattr__(self, name, _name_of(name, given))

    @property
    def param_dtype(self) -> torch.dtype | None:
        return _dtype(self.param)

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        return _dtype(self.reduce)

    @property
    def output_dtype(self) -> torch.dtype | None:
        return _dtype(self.output)

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)

    @classmethod
    def from_json(cls, choices: Mapping[str, str | None]) -> Precision:
        """The inverse of :meth:`to_json`. Raises ValueError for an unknown choice."""
        known = cls().to_json()
        for name in choices:
            if name not in known:
                raise ValueError(unknown_name("Precision has no choice", name, known))
        return cls(**choices)


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)  # type: ignore[no-any-return]


def _name_of(choice: str, given: torch.dtype | str | None) -> str | None:
    name = str(given).removeprefix("torch.")
    if given is not None and name not in NAMES:
        known = ", ".join(dict.fromkeys(NAMES.values()))
        raise ValueError(f"Precision({choice}={given!r}): it is a floating dtype\nWay out: one of {known}, or None.")
    return None if given is None else NAMES[name]
