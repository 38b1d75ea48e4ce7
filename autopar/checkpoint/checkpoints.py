"""Checkpoints of a training run: saved on one mesh and ZeRO stage, loaded on any other, or into the unmodified model.

checkpoints = autopar.Checkpoints("run/checkpoints", keep=3)
resumed = checkpoints.load(model, optimizer)                 # the latest complete one; None in an empty directory
for step in range(resumed.step if resumed else 0, 1000):
    ...
    checkpoints.save(step + 1, model, optimizer, wait=False)  # written while training goes on
checkpoints.wait()
"""

from __future__ import annotations

import shutil
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer

from autopar.checkpoint import files
from autopar.checkpoint.directory_lock import hold_directory, writer_name
from autopar.checkpoint.disk import disk_failed
from autopar.checkpoint.fit import refuse_other_model, refuse_other_optimizers
from autopar.checkpoint.hub_names import configs_of
from autopar.checkpoint.incoming import Incoming
from autopar.checkpoint.named_tensors import Named, every_tensor
from autopar.checkpoint.peers import Peers
from autopar.checkpoint.plain_values import packed_plain
from autopar.checkpoint.training_state import Gather, Owners, random_state
from autopar.checkpoint.watched_files import Progress
from autopar.dtensors.slices import Slices, slices_of
from autopar.errors import AutoparError, CheckpointError
from autopar.module import ParallelModule, held_by

ONE_PROCESS = "torch.distributed is disabled, unavailable or uninitialized"  # torch says so at each save and load


@dataclass(frozen=True)
class Resumed:
    """The loaded checkpoint: the number of the step, the ``data`` that were saved with it, and its path."""

    step: int
    data: Any
    path: Path


class Checkpoints:
    """The checkpoints of one run, in a directory that all ranks see. The latest ``keep`` of them stay.

    A checkpoint is a directory that gets its name once it is complete, so a run that is killed while it saves has the
    one before. All ranks call each method, at the same time. One process, rank 0, saves into a directory, from its
    first checkpoint until the object is gone or the process ends. A checkpoint with parameters that are not finite
    does not take the place of the last good one: that stays too.

    Loading checks names, shapes, dtypes and the checksum of every file before anything changes. It runs no code of a
    checkpoint: it gives numbers, texts, tensors, numpy arrays, and lists and dicts of these.

    Args:
        trusted: ``data`` may be of any class that can be pickled. Whoever can write to ``directory`` can then run code
            in this process.
    """

    def __init__(self, directory: str | Path, keep: int = 3, *, trusted: bool = False) -> None:
        if keep < 1:
            raise ValueError(f"Checkpoints(keep={keep}): at least the latest one has to stay")
        self.directory, self.keep, self.trusted = Path(directory), keep, trusted
        self._peers: Peers | None = None
        self._saving: Future[Any] | None = None
        self._partial: Path | None = None  # of the checkpoint that is being written
        self._writer = ""  # a name for it, known once this run has the directory's lock

    def steps(self) -> list[int]:
        """The steps of which there are complete checkpoints, ascending."""
        return list(files.complete(self.directory))

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        scheduler: Any = None,
        *,
        data: Any = None,
        wait: bool = True,
    ) -> None:
        """Save parameters, buffers, optimizer and scheduler state, random generators and ``data``.

        Args:
            step: the number that :meth:`load` gives back; the highest is the latest.
            scheduler: a learning rate scheduler, or anything else with ``state_dict`` and ``load_state_dict``.
            data: where the run is in its data, in plain values (see ``trusted``); each rank gets its own back.
            wait: False: copy the state to host memory and write it in another thread, see :meth:`wait`.

        Raises CheckpointError for a step that is there already, a state that cannot be saved, a full disk or a
        directory that another run saves to, RankFailedError.
        """
        self.wait()
        self.claim(model)
        peers, path = self._together(model), files.path_of(self.directory, step)
        self._partial = files.partial_of(path, self._writer)
        with peers.agreed("saving a checkpoint"):
            if path.exists():
                raise CheckpointError(
                    f"there is a checkpoint of step {step} already: '{path}'\n"
                    "Way out: continue from the latest one (load), or save to another directory."
                )
            optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
            owners = Owners(model, optimizers, _gather(model, peers))
            state = _state(model, owners, peers, scheduler, data, self.trusted)
        also = {f"model.{entry.name}": [f"model.{n}" for n in entry.names[1:]] for entry in _persistent(model)}
        manifest, finite = _manifest(step, model, owners, peers), _are_finite(model)
        writer = files.Writer(self._partial, path, manifest, also, self.keep, peers, finite)
        how: dict[str, Any] = {"storage_writer": writer, "planner": files.SavePlanner()}
        how |= {"process_group": peers.group, "no_dist": peers.group is None}
        if wait:
            with self._failures(peers), _no_word_of_one_process():
                save(state, **how)
        else:
            # it comes from torch's thread then, whenever that gets there; filters are those of all threads anyway
            warnings.filterwarnings("ignore", message=ONE_PROCESS)
            self._saving = async_save(state, async_stager=_HostCopies(), **how)  # type: ignore[assignment]

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete; raises what :meth:`save` would have."""
        saving, self._saving = self._saving, None
        if saving is not None:
            assert self._peers is not None
            with self._failures(self._peers):
                saving.result()

    def claim(self, model: nn.Module) -> None:
        """Take the directory for this run, as the first :meth:`save` does. All ranks of ``model`` call it.

        Raises CheckpointError, naming host and process, where another run has it; RankFailedError.
        """
        if self._writer:
            return
        peers = self._together(model)
        with peers.agreed("taking a directory for checkpoints"):
            if peers.rank == 0:
                weakref.finalize(self, hold_directory(self.directory).release)
                files.clean(self.directory)
        self._writer = peers.of_first(writer_name())

    def load(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        scheduler: Any = None,
        *,
        step: int | None = None,
    ) -> Resumed | None:
        """Load the latest checkpoint, or that of ``step``, exactly; None if there is none yet.

        ``model`` is a parallel module on any mesh, or an ordinary module in a process of its own. It may be on the meta
        device. Random generators get the state of the rank of the same number, on more ranks than saved that of rank 0.

        Raises CheckpointError, and nothing has changed then, for a checkpoint that is damaged or of another model;
        RankFailedError.
        """
        self.wait()
        peers = self._together(model)
        with peers.agreed("loading a checkpoint"):
            if step is None:
                step = peers.of_first(max(files.complete(self.directory), default=None))
            if step is None:
                return None
            path = files.path_of(self.directory, step)
            manifest = files.read_manifest(path)
            metadata = files.read_metadata(path, manifest)
            optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
            owners = Owners(model, optimizers, _gather(model, peers))
            refuse_other_model(path, _persistent(model), metadata)
            refuse_other_optimizers(path, model, owners, manifest)
            if scheduler is not None and "scheduler" not in metadata.state_dict_metadata:
                raise CheckpointError(f"'{path}' has no state of a scheduler")
        incoming = self._read(path, model, owners, peers, scheduler, manifest, metadata)
        incoming.put(manifest["calls"])
        if not manifest.get("finite", True) and peers.rank == 0:
            _warn_of_nan(path)
        return Resumed(step, incoming.data, path)

    def _read(
        self,
        path: Path,
        model: nn.Module,
        owners: Owners,
        peers: Peers,
        scheduler: Any,
        manifest: dict[str, Any],
        metadata: Metadata,
    ) -> Incoming:
        """All that this rank takes of a checkpoint; each file is verified by one of the ranks before."""
        progress, mine = Progress(), sorted(manifest["files"])[peers.rank :: peers.size]
        with peers.agreed("verifying a checkpoint"):
            verify = partial(files.verify, path, manifest, mine, progress)
            peers.side_by_side("verifying a checkpoint", verify, progress)
        rank = peers.rank if peers.rank < manifest["ranks"] else 0
        incoming = Incoming(model, _saved(model), owners, metadata, rank, scheduler)
        how: dict[str, Any] = {"process_group": peers.group, "no_dist": peers.group is None}
        how |= {"storage_reader": files.Reader(path, metadata, peers), "planner": files.LoadPlanner(self.trusted)}
        with self._failures(peers), _no_word_of_one_process():
            load(incoming.targets, **how)
        try:
            with peers.agreed("loading a checkpoint"):
                incoming.prepare(self.trusted)
        except AutoparError:
            incoming.take_back()
            raise
        return incoming

    @contextmanager
    def _failures(self, peers: Peers) -> Iterator[None]:
        """Raise torch's errors in the words of autopar, once nothing is left of a checkpoint that cannot be written."""
        try:
            yield
        except CheckpointException as problem:
            rank, (cause, _) = next(iter(problem.failures.items()))
            if peers.rank == 0 and self._partial is not None:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise _cause(rank, cause, self.directory) from cause
        except RuntimeError as problem:
            raise peers.failed("a checkpoint", problem) from None
        finally:
            self._partial = None

    def _together(self, model: nn.Module) -> Peers:
        if self._peers is None:
            self._peers = Peers(model)
        return self._peers


class _HostCopies(AsyncStager):
    """Copies of the values that a rank holds, so that training may continue."""

    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {key: _copied(value) for key, value in state_dict.items()}

    def synchronize_staging(self) -> None:
        """Nothing runs in the background."""

    def close(self) -> None:
        """Nothing is held."""


def _copied(value: Any) -> Any:
    if isinstance(value, Slices):
        return value.copied_to_cpu()
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value


def _persistent(model: nn.Module) -> list[Named]:
    """The items of a checkpoint, for the whole model."""
    return [entry for entry in every_tensor(model) if entry.persistent]


def _saved(model: nn.Module) -> list[Named]:
    """The items that this rank saves."""
    return [entry for entry in _persistent(model) if entry.held]


def _gather(model: nn.Module, peers: Peers) -> Gather | None:
    return peers.gather if isinstance(model, ParallelModule) and model.mesh.is_pipelined else None


def _state(model: nn.Module, owners: Owners, peers: Peers, scheduler: Any, data: Any, trusted: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"model": {entry.name: entry.slices for entry in _saved(model)}}
    for name, part in state["model"].items():
        if part.local.is_meta:
            raise CheckpointError(f"'{name}' has no data: the model was built on the meta device")
    if owners.optimizers:
        state["optimizer"] = owners.state()
    if scheduler is not None:
        state["scheduler"] = packed_plain("the scheduler", scheduler.state_dict(), trusted)
    return state | {f"random.{peers.rank}": random_state(), f"data.{peers.rank}": packed_plain("data=", data, trusted)}


def _manifest(step: int, model: nn.Module, owners: Owners, peers: Peers) -> dict[str, Any]:
    parallel = model if isinstance(model, ParallelModule) else None
    return {
        "step": step,
        "calls": held_by(model).calls,
        "ranks": peers.size,
        "mesh": dict(parallel.mesh.axes) if parallel else {},
        "zero": parallel.plan.zero if parallel else 0,
        "optimizers": [type(optimizer).__name__ for optimizer in owners.optimizers],
        "groups": [names for _, names in owners.groups()],
        "pretrained": configs_of(held_by(model).model),
    }


def read_tensor(path: Path, metadata: Metadata, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A whole tensor of the checkpoint ``path``, alone, on the CPU. Raises CheckpointError."""
    found = torch.empty(shape, dtype=dtype)
    peers = Peers.alone()
    how: dict[str, Any] = {"storage_reader": files.Reader(path, metadata, peers), "planner": files.LoadPlanner(False)}
    try:
        with _no_word_of_one_process():
            load({name: slices_of(found)}, no_dist=True, **how)
    except CheckpointException as problem:
        rank, (cause, _) = next(iter(problem.failures.items()))
        raise _cause(rank, cause, path) from cause
    return found


@contextmanager
def _no_word_of_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ONE_PROCESS)
        yield


def _cause(rank: int, cause: BaseException, directory: Path) -> AutoparError:
    if isinstance(cause, AutoparError):
        return type(cause)(f"rank {rank}: {cause}")
    if isinstance(cause, OSError):
        return CheckpointError(f"rank {rank}: {disk_failed(directory, cause)}")
    return CheckpointError(f"rank {rank}: {type(cause).__name__}: {cause}")


def _warn_of_nan(path: Path) -> None:
    good = files.latest_finite(path.parent)
    where = f"the latest one whose are is load(..., step={good})" if good is not None else "no other one here is better"
    warnings.warn(f"'{path}' has parameters that are not finite (NaN or infinite); {where}", stacklevel=3)


def _are_finite(model: nn.Module) -> bool:
    """Whether the parameters that this rank saves are."""
    found = [entry.slices.local for entry in _saved(model) if isinstance(entry.tensor, nn.Parameter)]
    return all(bool(local.isfinite().all()) for local in found if local.is_floating_point() or local.is_complex())
