"""The whole parameters and buffers that an export cuts into parts: of a model, or of safetensors files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from autopar.checkpoint.safetensors_file import SafetensorsFile
from autopar.errors import ExportError
from autopar.ir.stacked_parameters import is_stacked, member_names

Source: TypeAlias = nn.Module | Mapping[str, Tensor] | str | Path


@dataclass(frozen=True)
class InFile:
    """Where the data of a whole tensor is: ``offset``, ``size`` in bytes, of a safetensors file."""

    path: Path
    name: str
    offset: int
    size: int
    dtype: torch.dtype


class WholeTensors:
    """Tensors by name, read from files as needed. A stack (``experts.*.up.weight``) is made of its members.

    ``made``: buffers that the model makes itself, for names that are nowhere else. ``model``: whose tensors they are,
    where that is known.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        files: Mapping[str, Path] | None = None,
        model: nn.Module | None = None,
        made: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self._tensors, self._files, self._made = tensors, files or {}, made or {}

    @classmethod
    def of(cls, source: Source | Sequence[Source], made: Mapping[str, Tensor] | None = None) -> WholeTensors:
        """Those of a model, of a mapping, or of the ``*.safetensors`` file or files at a path.

        Of several sources the first that has a name is taken: files, then the model whose buffers are in no file.
        Raises ExportError for a path without such files.
        """
        found = cls._of(source)
        return cls(found._tensors, found._files, found.model, made)

    @classmethod
    def _of(cls, source: Source | Sequence[Source]) -> WholeTensors:
        if isinstance(source, Sequence) and not isinstance(source, str):
            return cls._merged([cls._of(one) for one in source])
        if isinstance(source, nn.Module):
            named: dict[str, Tensor] = dict(source.named_parameters(remove_duplicate=False))
            named |= dict(source.named_buffers(remove_duplicate=False))
            return cls({name: tensor.detach() for name, tensor in named.items()}, model=source)
        return cls(source) if isinstance(source, Mapping) else cls({}, dict(_names_in(Path(source))))

    @classmethod
    def _merged(cls, sources: Sequence[WholeTensors]) -> WholeTensors:
        tensors: dict[str, Tensor] = {}
        files: dict[str, Path] = {}
        for source in reversed(sources):
            files = {name: path for name, path in files.items() if name not in source._tensors} | {**source._files}
            tensors = {name: x for name, x in tensors.items() if name not in source._files} | {**source._tensors}
        return cls(tensors, files)

    def find(self, names: Iterable[str], shape: tuple[int, ...]) -> Tensor:
        """The tensor under one of ``names``. Raises ExportError where there is none, or one of another shape."""
        wanted = list(names)
        for name in wanted:
            found = self._get(name)
            if found is None and is_stacked(name):
                members = [self._get(member) for member in member_names(name, shape[0])]
                there = [member for member in members if member is not None]
                found = torch.stack(there) if len(there) == len(members) else None
            if found is not None:
                if tuple(found.shape) != shape:
                    raise ExportError(f"'{name}' is {list(found.shape)}, the program was made for {list(shape)}")
                return found
        raise ExportError(
            f"no tensor was given for '{wanted[0]}'\n"
            "Way out: weights_from= the model, its state dict or its safetensors files; or weights='none'.\n"
            "A buffer that is in none of these files (not persistent), and not in the program, is the model's: "
            "weights_from=[files, model]."
        )

    def has(self, names: Iterable[str]) -> bool:
        """Whether there is a tensor under one of ``names``."""
        return any(name in known for name in names for known in (self._tensors, self._files, self._made))

    def in_file(self, names: Iterable[str]) -> InFile | None:
        """Where the tensor under one of ``names`` is stored; None for one that is in no file, or in several pieces."""
        for name in names:
            if name in self._files:
                return _entry(self._files[name], name)
        return None

    def _get(self, name: str) -> Tensor | None:
        if name in self._tensors:
            return self._tensors[name]
        if name not in self._files:
            return self._made.get(name)
        with safe_open(self._files[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found


def _names_in(path: Path) -> Iterator[tuple[str, Path]]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise ExportError(
            f"weights from {path}: there is no safetensors file\nWay out: give such a file, or its folder."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                yield from ((name, file) for name in opened.keys())  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{file} cannot be read: {error}") from None


def _entry(path: Path, name: str) -> InFile:
    file = SafetensorsFile(path)
    file.close()
    entry = file.entries[name]
    return InFile(path, name, entry.start, math.prod(entry.shape) * entry.dtype.itemsize, entry.dtype)
