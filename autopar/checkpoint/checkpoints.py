"""Checkpoints of a training run: saved on one mesh and ZeRO stage, loaded on any other, or into the unmodified model.

checkpoints = autopar.Checkpoints("run/checkpoints", keep=3)
resumed = checkpoints.load(model, optimizer)                 # the latest complete one; None in an empty directory
for step in range(resumed.step if resumed else 0, 1000):
    ...
    checkpoints.save(step + 1, model, optimizer, wait=False)  # written while training goes on
checkpoints.wait()
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.optim import Optimizer

from autopar.checkpoint import files
from autopar.checkpoint.initialise import initialise
from autopar.checkpoint.named_tensors import Named, every_tensor, materialise, named_tensors
from autopar.checkpoint.peers import Peers
from autopar.checkpoint.slices import Slices
from autopar.checkpoint.training_state import Gather, NewState, Owners, packed, random_state, set_random_state, unpacked
from autopar.errors import AutoparError, CheckpointError
from autopar.module import ParallelModule, held_by
from autopar.runtime.dtensor import local_of

NAMES_SHOWN = 3
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
    one before. All ranks call each method, at the same time. Loading checks names, shapes, dtypes and the sizes of the
    files, not each byte of them; it unpickles: load what you trust.
    """

    def __init__(self, directory: str | Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"Checkpoints(keep={keep}): at least the latest one has to stay")
        self.directory, self.keep = Path(directory), keep
        self._peers: Peers | None = None
        self._saving: Future[Any] | None = None

    def steps(self) -> list[int]:
        """The steps of which there are complete checkpoints, ascending."""
        return list(files.complete(self.directory))

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        *,
        scheduler: Any = None,
        data: Any = None,
        wait: bool = True,
    ) -> None:
        """Save parameters, buffers, optimizer and scheduler state, random generators and ``data``.

        Args:
            step: the number that :meth:`load` gives back; the highest is the latest.
            scheduler: a learning rate scheduler, or anything else with ``state_dict`` and ``load_state_dict``.
            data: where the run is in its data: anything that can be pickled; each rank gets its own back.
            wait: False: copy the state to host memory and write it in another thread, see :meth:`wait`.

        Raises CheckpointError for a step that is there already or a state that cannot be saved, RankFailedError.
        """
        self.wait()
        peers, path = self._together(model), files.path_of(self.directory, step)
        with _agreed(peers, "saving a checkpoint"):
            if path.exists():
                raise CheckpointError(
                    f"there is a checkpoint of step {step} already: '{path}'\n"
                    "Way out: continue from the latest one (load), or save to another directory."
                )
            optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
            owners = Owners(model, optimizers, _gather(model, peers))
            state = _state(model, owners, peers, scheduler, data)
            if peers.rank == 0:
                files.clean(self.directory)
                self.directory.mkdir(parents=True, exist_ok=True)
        also = {f"model.{entry.name}": [f"model.{n}" for n in entry.names[1:]] for entry in _persistent(model)}
        writer = files.Writer(path, _manifest(step, model, owners, peers), also, self.keep)
        how: dict[str, Any] = {"storage_writer": writer, "planner": files.SavePlanner()}
        how |= {"process_group": peers.group, "no_dist": peers.group is None}
        if wait:
            with _failures(peers), _no_word_of_one_process():
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
            with _failures(self._peers):
                saving.result()

    def load(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        *,
        scheduler: Any = None,
        step: int | None = None,
    ) -> Resumed | None:
        """Load the latest checkpoint, or that of ``step``, exactly; None if there is none yet.

        ``model`` is a parallel module on any mesh, or an ordinary module in a process of its own. It may be on the meta
        device. Random generators get the state of the rank of the same number, on more ranks than saved that of rank 0.

        Raises CheckpointError, and nothing has changed then, for a checkpoint that is damaged or of another model.
        """
        self.wait()
        peers = self._together(model)
        with _agreed(peers, "loading a checkpoint"):
            if step is None:
                step = peers.of_first(max(files.complete(self.directory), default=None))
            if step is None:
                return None
            path = files.path_of(self.directory, step)
            manifest, metadata = files.read_manifest(path), files.read_metadata(path)
            optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
            owners = Owners(model, optimizers, _gather(model, peers))
            _check_model(path, _persistent(model), metadata)
            _check_optimizers(path, model, owners, manifest)
            if scheduler is not None and "scheduler" not in metadata.state_dict_metadata:
                raise CheckpointError(f"'{path}' has no state of a scheduler")
        materialise(model, _saved(model))
        news = NewState(owners, metadata) if owners.optimizers else None
        rank = peers.rank if peers.rank < manifest["ranks"] else 0
        blobs = [f"random.{rank}", f"data.{rank}", *(["scheduler"] if scheduler is not None else [])]
        targets: dict[str, Any] = {f"model.{entry.name}": entry.slices for entry in _saved(model)}
        targets |= dict.fromkeys(blobs) | (news.targets if news else {})
        with _failures(peers), _no_word_of_one_process():
            how: dict[str, Any] = {"process_group": peers.group, "no_dist": peers.group is None}
            load(targets, storage_reader=FileSystemReader(path), planner=files.LoadPlanner(), **how)
        if news is not None:
            news.targets = targets
            news.put()
        if scheduler is not None:
            scheduler.load_state_dict(unpacked(targets["scheduler"]))
        held_by(model).calls = manifest["calls"]
        initialise(model, [entry for entry in named_tensors(model) if local_of(entry.tensor).is_meta])
        set_random_state(targets[f"random.{rank}"])
        return Resumed(step, unpacked(targets[f"data.{rank}"]), path)

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


def _state(model: nn.Module, owners: Owners, peers: Peers, scheduler: Any, data: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"model": {entry.name: entry.slices for entry in _saved(model)}}
    for name, part in state["model"].items():
        if part.local.is_meta:
            raise CheckpointError(f"'{name}' has no data: the model was built on the meta device")
    if owners.optimizers:
        state["optimizer"] = owners.state()
    if scheduler is not None:
        state["scheduler"] = packed(scheduler.state_dict())
    return state | {f"random.{peers.rank}": random_state(), f"data.{peers.rank}": packed(data)}


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
    }


def _check_model(path: Path, entries: Sequence[Named], metadata: Metadata) -> None:
    items, prefix = metadata.state_dict_metadata, "model."
    stored = {name.removeprefix(prefix): kind for name, kind in items.items() if name.startswith(prefix)}
    wanted = {name: entry for entry in entries for name in entry.names}
    missing, more = [name for name in wanted if name not in stored], [name for name in stored if name not in wanted]
    problems = [f"it lacks {_listed(missing)}"] if missing else []
    problems += [f"it has {_listed(more)}, which this model does not have"] if more else []
    there = [(name, entry) for name, entry in wanted.items() if name in stored]
    kinds = [(name, _kind(stored[name]), _kind(entry.tensor, entry.shape)) for name, entry in there]
    unlike = [f"'{name}' is {one} in it and {other} here" for name, one, other in kinds if one != other]
    problems += unlike[:NAMES_SHOWN]
    if problems:
        raise CheckpointError(f"'{path}' is a checkpoint of another model:\n  " + "\n  ".join(problems))


def _check_optimizers(path: Path, model: nn.Module, owners: Owners, manifest: dict[str, Any]) -> None:
    names = [type(optimizer).__name__ for optimizer in owners.optimizers]
    if not names:
        return
    if names != manifest["optimizers"]:
        there = ", ".join(manifest["optimizers"]) or "no optimizer"
        raise CheckpointError(f"'{path}' has the state of {there}, and this is {', '.join(names)}")
    here = [members for _, members in owners.groups()]
    if list(map(sorted, here)) != list(map(sorted, manifest["groups"])):
        sizes = [f"{len(groups)} groups of {list(map(len, groups))}" for groups in (manifest["groups"], here)]
        raise CheckpointError(
            f"'{path}' has {sizes[0]} parameters in its optimizer, and here there are {sizes[1]}, or others\n"
            "Way out: give the optimizer the parameters in the same groups."
        )
    if not held_by(model).weights.is_laid_out:
        raise CheckpointError(
            "how the parameters are split is not known yet, so their optimizer states cannot be loaded\n"
            "Way out: first model.prepare(**batch), or parallelize(..., example_inputs=batch)."
        )


def _kind(tensor: Tensor | TensorStorageMetadata | BytesStorageMetadata, shape: Sequence[int] = ()) -> str:
    """The dtype and the shape of what a checkpoint has, or of a tensor that is to have ``shape``."""
    if isinstance(tensor, BytesStorageMetadata):
        return "no tensor"
    properties, shape = (tensor, shape) if isinstance(tensor, Tensor) else (tensor.properties, tensor.size)
    return f"{str(properties.dtype).removeprefix('torch.')}{list(shape)}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:NAMES_SHOWN])
    return shown + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


@contextmanager
def _agreed(peers: Peers, what: str) -> Iterator[None]:
    """All ranks leave this block, or all raise."""
    try:
        yield
    except (AutoparError, OSError) as problem:
        peers.agree(what, problem if isinstance(problem, AutoparError) else CheckpointError(str(problem)))
    peers.agree(what)


@contextmanager
def _no_word_of_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ONE_PROCESS)
        yield


@contextmanager
def _failures(peers: Peers) -> Iterator[None]:
    """Raise torch's errors in the words of autopar."""
    try:
        yield
    except CheckpointException as problem:
        rank, (cause, _) = next(iter(problem.failures.items()))
        raise CheckpointError(f"rank {rank}: {type(cause).__name__}: {cause}") from cause
    except RuntimeError as problem:
        raise peers.failed("a checkpoint", problem) from None
