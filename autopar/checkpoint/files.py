"""One checkpoint on disk: a directory in the format of torch.distributed.checkpoint, complete or not there at all.

step-00000040/              its name once everything in it is written and synced
    checkpoint.json         step, mesh, names of the optimizers, size of every other file
    .metadata               torch's: the place of each rectangle of each tensor (a pickle)
    __0_0.distcp ...        the rectangles, one file per rank that wrote any
.step-00000060.partial/     being written, or left behind by a process that was killed
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from autopar.checkpoint.slices import Slices
from autopar.errors import CheckpointError

MANIFEST, METADATA = "checkpoint.json", ".metadata"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


def complete(directory: Path) -> dict[int, Path]:
    """The complete checkpoints in ``directory`` by step, ascending."""
    if not directory.is_dir():
        return {}
    named = [(match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return dict(sorted((int(match[1]), path) for match, path in named if (path / MANIFEST).is_file()))


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def remove(path: Path) -> None:
    """Delete a checkpoint; one that is half deleted does not look like a complete one."""
    trash = path.with_name(f".{path.name}.removed")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash)


def clean(directory: Path) -> None:
    """Delete the leftovers of killed processes."""
    for kind in ("partial", "removed"):
        for path in directory.glob(f".step-*.{kind}"):
            shutil.rmtree(path)


class Writer(FileSystemWriter):
    """Writes to a partial directory; when all ranks have finished, rank 0 gives it its name and deletes old ones.

    ``also``: name -> further names of the same tensor, which is written once. ``keep``: how many checkpoints stay.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], also: Mapping[str, Sequence[str]], keep: int) -> None:
        super().__init__(partial_of(path), sync_files=True)
        self._final, self._manifest, self._also, self._keep = path, dict(manifest), also, keep

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0 alone, after all ranks have written and synced their files."""
        super().finish(metadata, [[*written, *self._again(metadata, written)] for written in results])
        partial = Path(self.path)
        self._manifest["files"] = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        text = json.dumps({"format": FORMAT, **self._manifest}, indent=1)
        with (partial / MANIFEST).open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        sync_directory(partial)
        partial.rename(self._final)
        sync_directory(self._final.parent)
        found = complete(self._final.parent)
        for step in list(found)[: -self._keep]:
            if found[step] != self._final:
                remove(found[step])

    def _again(self, metadata: Metadata, written: list[WriteResult]) -> list[WriteResult]:
        more = []
        for result in written:
            for name in self._also.get(result.index.fqn, ()):
                metadata.state_dict_metadata[name] = metadata.state_dict_metadata[result.index.fqn]
                metadata.planner_data[name] = tuple(name.split(".", 1))  # "model", then the name in the model
                more.append(replace(result, index=replace(result.index, fqn=name)))
        return more


def sync_directory(path: Path) -> None:
    """Make files that were created, or renamed, in a directory survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index) if isinstance(found, Slices) else found


class LoadPlanner(DefaultLoadPlanner):
    """For a flat state dict of :class:`Slices`; any other item is replaced by that of the checkpoint."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Any:
        found: Slices = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path``, whose files must all have their full size. Raises CheckpointError."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
    except FileNotFoundError:
        raise CheckpointError(f"'{path}' is no complete checkpoint of autopar: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path / MANIFEST}' is not what autopar writes: {error!r}") from None
    if version != FORMAT:
        raise CheckpointError(f"'{path}' has format {version}, and this autopar reads format {FORMAT}")
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise CheckpointError(
                f"checkpoint '{path}' is damaged: {name} {state}, it was written with {size:,} bytes\n"
                f"Way out: load an earlier one, load(..., step=...), or delete this one."
            )
    return manifest


def read_metadata(path: Path) -> Metadata:
    """Raises CheckpointError."""
    try:
        return FileSystemReader(path).read_metadata()
    except Exception as error:  # unpickling of damaged bytes raises anything
        raise CheckpointError(f"checkpoint '{path}' is damaged: {METADATA} cannot be read ({error!r:.200})") from None
