"""One checkpoint on disk: a directory in the format of torch.distributed.checkpoint, complete or not there at all.

step-00000040/              its name once everything in it is written and synced
    checkpoint.json         step, mesh, names of the optimizers, size and checksum of every other file, and of its own
    .metadata               torch's: the place of each rectangle of each tensor (a pickle of plain values)
    __0_0.distcp ...        the rectangles, one file per rank that wrote any
.step-00000060.node-3-4711.partial/     being written, or left behind by a process that was killed
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from autopar.checkpoint import plain_values
from autopar.checkpoint.disk import sync_directory
from autopar.checkpoint.peers import Peers
from autopar.checkpoint.plain_values import unpacked
from autopar.checkpoint.watched_files import Progress, WatchedFiles, checksum
from autopar.dtensors.slices import Slices
from autopar.errors import CheckpointError
from autopar.plain_files import read_plain

MANIFEST, METADATA = "checkpoint.json", ".metadata"
FORMAT, WITHOUT_CHECKSUMS = 2, 1
LARGEST = 1 << 30  # bytes of a manifest, or of torch's table
_NAME = re.compile(r"step-(\d{8,})")


def complete(directory: Path) -> dict[int, Path]:
    """The complete checkpoints in ``directory`` by step, ascending."""
    if not directory.is_dir():
        return {}
    named = [(match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return dict(sorted((int(match[1]), path) for match, path in named if (path / MANIFEST).is_file()))


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def partial_of(path: Path, writer: str) -> Path:
    return path.with_name(f".{path.name}.{writer}.partial")


def remove(path: Path) -> None:
    """Delete a checkpoint; one that is half deleted does not look like a complete one."""
    trash = path.with_name(f".{path.name}.removed")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash)


def clean(directory: Path) -> None:
    """Delete the leftovers of killed processes; for the process that has the lock of the directory."""
    for kind in ("partial", "removed"):
        for path in directory.glob(f".step-*.{kind}"):
            shutil.rmtree(path)


def latest_finite(directory: Path) -> int | None:
    """The latest step whose checkpoint has finite parameters, as far as is known."""
    found = complete(directory)
    return next((step for step in reversed(found) if _is_finite(found[step])), None)


def _is_finite(path: Path) -> bool:
    try:
        return bool(read_manifest(path).get("finite", True))
    except CheckpointError:
        return False


def _rotate(directory: Path, keep: int, new: Path) -> None:
    """Delete all but the latest ``keep``, the new one, and the last with finite parameters."""
    found = complete(directory)
    spared = {*list(found)[-keep:], latest_finite(directory)}
    for step, path in found.items():
        if step not in spared and path != new:
            remove(path)


@dataclass(frozen=True)
class Seal:
    """What a rank knows of a file that it has written. ``finite``: all its parameters are."""

    file: str
    bytes: int
    checksum: int
    finite: bool


class Writer(FileSystemWriter):
    """Writes to a partial directory; when all ranks have finished, rank 0 gives it its name and deletes old ones.

    ``also``: name -> further names of the same tensor, which is written once. ``keep``: how many checkpoints stay.
    ``finite``: whether the parameters of this rank are.
    """

    def __init__(
        self,
        place: Path,
        path: Path,
        manifest: Mapping[str, Any],
        also: Mapping[str, Sequence[str]],
        keep: int,
        peers: Peers,
        finite: bool,
    ) -> None:
        super().__init__(place, sync_files=False)  # closing a file syncs it
        self.fs: WatchedFiles = WatchedFiles()
        self._final, self._manifest, self._also, self._keep = path, dict(manifest), also, keep
        self._peers, self._finite = peers, finite

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        """The results also have a :class:`Seal` for each file of this rank. Raises OSError."""
        result: Future[list[WriteResult]] = Future()
        work = partial(self._written, plan, planner)
        result.set_result(self._peers.side_by_side("writing a checkpoint", work, self.fs.progress))
        return result

    def _written(self, plan: SavePlan, planner: Any) -> list[WriteResult]:
        try:
            results = super().write_data(plan, planner).value()
        except Exception as problem:
            raise (self.fs.problem or problem) from None  # torch fails again as it closes the file
        seals = [Seal(name, *of_file, self._finite) for name, of_file in self.fs.written.items()]
        return [*results, *(WriteResult(MetadataIndex(seal.file), seal.bytes, seal) for seal in seals)]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0 alone, after all ranks have written and synced their files."""
        found = [result for written in results for result in written]
        seals = [result.storage_data for result in found if isinstance(result.storage_data, Seal)]
        found = [result for result in found if not isinstance(result.storage_data, Seal)]
        super().finish(metadata, [[*found, *self._again(metadata, found)]])
        place = Path(self.path)
        of_metadata = Seal(METADATA, (place / METADATA).stat().st_size, checksum(place / METADATA), True)
        self._manifest["finite"] = all(seal.finite for seal in seals)
        self._manifest["files"] = {
            seal.file: {"bytes": seal.bytes, "crc32": seal.checksum}
            for seal in sorted([*seals, of_metadata], key=lambda seal: seal.file)
        }
        _write_manifest(place / MANIFEST, {"format": FORMAT, **self._manifest})
        sync_directory(place)
        place.rename(self._final)
        sync_directory(self._final.parent)
        _rotate(self._final.parent, self._keep, self._final)

    def _again(self, metadata: Metadata, written: list[WriteResult]) -> list[WriteResult]:
        more = []
        for result in written:
            for name in self._also.get(result.index.fqn, ()):
                metadata.state_dict_metadata[name] = metadata.state_dict_metadata[result.index.fqn]
                metadata.planner_data[name] = tuple(name.split(".", 1))  # "model", then the name in the model
                more.append(replace(result, index=replace(result.index, fqn=name)))
        return more


class Reader(FileSystemReader):
    """Reads the tensors of a checkpoint whose table is read already."""

    def __init__(self, path: Path, metadata: Metadata, peers: Peers) -> None:
        super().__init__(path)
        self.fs: WatchedFiles = WatchedFiles()
        self._metadata, self._peers = metadata, peers

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        work = partial(super().read_data, plan, planner)
        return self._peers.side_by_side("reading a checkpoint", work, self.fs.progress)


class SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index) if isinstance(found, Slices) else found


class LoadPlanner(DefaultLoadPlanner):
    """For a flat state dict of :class:`Slices`; any other item is replaced by that of the checkpoint.

    ``trusted``: such an item may run code while it is read.
    """

    def __init__(self, trusted: bool) -> None:
        super().__init__(flatten_state_dict=False)
        self._trusted = trusted

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Any:
        found: Slices = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = unpacked(value.getvalue(), self._trusted)


def _write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps({**content, "crc32": _checksum_of(content)}, indent=1)
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _checksum_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path``, whose files must all have their full size. Raises CheckpointError."""
    try:
        content = json.loads(read_plain(path / MANIFEST, LARGEST))
        manifest: dict[str, Any] = content
        version, found = manifest["format"], manifest.pop("crc32", None)
        files = {
            name: size["bytes"] if version != WITHOUT_CHECKSUMS else size for name, size in manifest["files"].items()
        }
        _refuse_paths(files)
    except FileNotFoundError:
        raise CheckpointError(f"'{path}' is no complete checkpoint of autopar: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"'{path / MANIFEST}' is not what autopar writes: {error!r:.200}") from None
    if version not in (FORMAT, WITHOUT_CHECKSUMS):
        raise CheckpointError(f"'{path}' has format {version}, and this autopar reads format {FORMAT}")
    if version == FORMAT and found != _checksum_of(manifest):
        raise damaged(path, f"{MANIFEST} has other contents than it was written with")
    for name, size in files.items():
        there = (path / name).stat().st_size if (path / name).is_file() else None
        if there != size:
            state = "is missing" if there is None else f"has {there:,} bytes"
            raise damaged(path, f"{name} {state}, it was written with {size:,} bytes")
    return manifest


def _refuse_paths(names: Iterable[str]) -> None:
    """Raise ValueError for a name that leads to a file of another directory."""
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"{name!r:.80} is no name of a file in this directory")


def verify(path: Path, manifest: Mapping[str, Any], names: Iterable[str], progress: Progress) -> None:
    """Compare the files ``names`` with their checksums, where there are any. Raises CheckpointError, OSError."""
    for name in names if manifest["format"] != WITHOUT_CHECKSUMS else ():
        if checksum(path / name, progress.advance) != manifest["files"][name]["crc32"]:
            raise damaged(path, f"{name} has other contents than it was written with")


def damaged(path: Path, what: str) -> CheckpointError:
    others = [str(step) for step, other in complete(path.parent).items() if other != path]
    earlier = f"load another one, load(..., step={others[-1]})" if others else "there is no other one here"
    return CheckpointError(f"checkpoint '{path}' is damaged: {what}\nWay out: {earlier}, or delete this one.")


def read_metadata(path: Path, manifest: Mapping[str, Any]) -> Metadata:
    """torch's table. Raises CheckpointError."""
    try:
        content = read_plain(path / METADATA, LARGEST)
        wanted = manifest["files"][METADATA]
        if manifest["format"] != WITHOUT_CHECKSUMS and zlib.crc32(content) != wanted["crc32"]:
            raise ValueError("it has other contents than it was written with")
        return plain_values.read_metadata(content)
    except Exception as error:  # unpickling of damaged bytes raises anything
        raise damaged(path, f"{METADATA} cannot be read ({error!r:.200})") from None
