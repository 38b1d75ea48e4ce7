"""What a checkpoint has beside tensors of its own: values that are read back without running any code of theirs.

torch's format for them is a pickle, and a pickle may call anything. Here it may not: tensors, numpy's arrays, and what
Python builds in. Anything else takes ``Checkpoints(..., trusted=True)``.
"""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import safe_globals

from autopar.errors import CheckpointError

METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
}  # fmt: skip
KINDS = (torch.dtype, torch.layout, torch.memory_format)
_ARRAYS: list[Any] = [numpy.ndarray, numpy.dtype, numpy.empty(0).__reduce__()[0], numpy.float64(0).__reduce__()[0]]
_DTYPES: list[Any] = [type(numpy.dtype(code)) for code in "?bBhHiIlLqQefdFD"]


def packed(value: Any) -> bytes:
    """One item of a checkpoint, from any value."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def packed_plain(what: str, value: Any, trusted: bool) -> bytes:
    """As :func:`packed`. Raises CheckpointError for a value that only a trusted checkpoint gives back."""
    try:
        found = packed(value)
    except (pickle.PicklingError, AttributeError, TypeError) as problem:
        raise CheckpointError(f"{what}: it cannot be saved: {problem}") from None
    if not trusted:
        try:
            unpacked(found)
        except pickle.UnpicklingError as problem:
            raise CheckpointError(
                f"{what}: {problem}\nOr save numbers, texts, tensors, numpy arrays, and lists and dicts of these."
            ) from None
    return found


def unpacked(value: bytes, trusted: bool = False) -> Any:
    """The value of :func:`packed`. Raises UnpicklingError where that would run code, unless ``trusted``."""
    try:
        with safe_globals([*_ARRAYS, *_DTYPES]):
            return torch.load(io.BytesIO(value), map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as problem:
        raise pickle.UnpicklingError(
            f"the checkpoint holds {_culprit(problem)}, which only code that stands in it could restore\n"
            "Way out: where all who could write to it are trusted, Checkpoints(..., trusted=True)."
        ) from None


def read_metadata(content: bytes) -> Metadata:
    """torch's table of a checkpoint. Raises UnpicklingError where it names anything else, and what pickle raises."""
    found = _OfMetadata(io.BytesIO(content)).load()
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError(f"a {type(found).__name__} in place of torch's Metadata")
    return found


class _OfMetadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), KINDS):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of tensors has")


def _culprit(problem: Exception) -> str:
    """The name that torch has refused, from its long message."""
    found = re.search(r"GLOBAL (\S+)", str(problem))
    return found[1] if found else f"something else than values ({str(problem).splitlines()[-1]:.200})"
