"""The batches of a user's loader, one after the other, with the place of a run for its checkpoints.

A loader is anything that ``for batch in loader`` goes through, several times: a ``DataLoader``, a list. A batch is a
dict (the arguments of the model by name), a tuple or a list (its positional arguments), or a tensor (the only one).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.data.batch_source import Batch, Counts
from autopar.data.parts import Share
from autopar.data.random_numbers import seeded
from autopar.ir.batch import data_ways, input_dims
from autopar.mesh import SEQUENCE, Mesh
from autopar.plan import Plan

END = object()
TOKENS = "input_ids"
PLACE = ("batches", "loader", "seed", "passes", "of_pass", "state")  # what a checkpoint has of the place of a run


class LoaderStream:
    """Batches of ``loader``, which messages call ``name`` (``--data mine.py:loader``), again when it ends.

    Random numbers that the loader draws come of ``seed``, the number of its pass and that of the batch: the same on
    every rank, and after a restart. A loader with ``state_dict`` and ``load_state_dict`` (torchdata's
    ``StatefulDataLoader``) goes on from its state; of any other the batches before are read and left out.

    With ``Plan(inputs="local")`` each rank's loader gives the rows of that rank.
    """

    def __init__(self, loader: Iterable[Any], name: str, mesh: Mesh, plan: Plan, seed: int = 0) -> None:
        self._loader: Any = loader
        self._name, self._seed = name, seed
        self._mesh, self._plan = mesh, plan
        self._pass: Iterator[Any] | None = None
        self._passes = self._given = self._read = 0  # passes that ended; batches of the present one, and of all
        self._resumed = False  # the present pass began before the run
        self._ahead: list[Batch] = []  # the first batch, where it was looked at

    def first(self, share: Share | None = None) -> Batch:
        """The first batch of the run, which stays the first."""
        if not self._ahead:
            self._ahead.append(self._next())
        return self._ahead[0]

    def __call__(self, number: int, share: Share | None = None) -> Batch:
        """The batch ``number``, each in its turn. Raises ValueError for what is no batch, and at the end of a loader
        that cannot be gone through again. ``share`` is for streams that cut whole batches.
        """
        assert number == self._read, f"batch {number} is asked for after {self._read}"
        found = self._ahead.pop() if self._ahead else self._next()
        self._read += 1
        return found

    def once(self, most: int | None, share: Share | None = None) -> Iterator[Batch]:
        """The batches of one pass from its beginning, at most so many; of random numbers that are always the same.

        Raises ValueError where there is none.
        """
        with seeded(self._seed, 0):
            batches = iter(self._loader)
        number = 0
        while number != most:
            with seeded(self._seed, 0, number):
                found = next(batches, END)
            if found is END:
                break
            number += 1
            yield checked(found, self._name)
        if number == 0:
            raise _empty(self._name)

    def counts(self, batch: Batch) -> Counts:
        """Of the whole batch of which ``batch`` is what this rank passes."""
        local = self._plan.inputs == "local"
        tensors = _tensors(batch)
        dims = input_dims(tensors, self._plan)
        rows = next((x.shape[of.batch] for (_, x), of in zip(tensors, dims) if of.batch is not None), 1)
        ways = data_ways(self._mesh) if local else 1
        tokens = batch.get(TOKENS) if isinstance(batch, dict) else None
        if not isinstance(tokens, Tensor):
            return Counts(rows * ways, None)
        return Counts(rows * ways, tokens.numel() * ways * (self._mesh.size(SEQUENCE) if local else 1))

    # ------------------------------------------------------------ the place of a run

    def place(self, batches: int) -> dict[str, Any]:
        """The position of a run after so many batches, for its checkpoints."""
        with seeded(self._seed, self._passes):  # a loader that has not begun begins here
            state = self._loader.state_dict() if is_stateful(self._loader) else None
        return dict(zip(PLACE, (batches, self._name, self._seed, self._passes, self._given, state), strict=True))

    def batches_before(self, place: Any) -> int:
        """Go on after the batches that were read when ``place`` was saved; gives their number.

        Raises ValueError for a place in a text, for another seed, and for a loader that has become shorter.
        """
        if not isinstance(place, dict) or set(place) != set(PLACE):
            raise ValueError(
                f"the checkpoint has no place in batches, and {self._name} is a loader\n"
                "Way out: --data with what the run was started with, or another directory of checkpoints."
            )
        if place["seed"] != self._seed:
            raise ValueError(
                f"the checkpoint was made with --seed {place['seed']}, and this run has "
                f"--seed {self._seed}\nWay out: --seed {place['seed']}"
            )
        self._go_to(place["passes"], place["of_pass"], place["state"])
        self._read = int(place["batches"])
        return self._read

    def _go_to(self, passes: int, given: int, state: Any) -> None:
        if state is not None and is_stateful(self._loader):
            self._loader.load_state_dict(state)
            self._ahead, self._pass, self._resumed = [], None, True
            self._passes, self._given = passes, given
            return
        ahead = self._ahead if passes == 0 else []
        if not ahead:
            self._pass = None
        self._ahead, self._passes, self._given = [], passes, 0 if not ahead else len(ahead)
        while self._given < given:
            if self._read_one() is END:
                raise ValueError(
                    f"{self._name} ended after {self._given} batches, and the checkpoint was made after {given} "
                    "of a pass: it is another loader, or has become shorter\n"
                    "Way out: --data with what the run was started with, or another directory of checkpoints."
                )
        if ahead and not given:
            self._ahead = ahead

    # ------------------------------------------------------------ reading

    def _next(self) -> Batch:
        found = self._read_one()
        if found is END and (self._given or self._resumed):
            self._passes, self._given, self._pass, self._resumed = self._passes + 1, 0, None, False
            found = self._read_one()
        if found is END:
            raise _empty(self._name) if not self._passes else _ended(self._name, self._read)
        return checked(found, self._name)

    def _read_one(self) -> Any:
        if self._pass is None:
            with seeded(self._seed, self._passes):
                self._pass = iter(self._loader)
        with seeded(self._seed, self._passes, self._given):
            found = next(self._pass, END)
        self._given += found is not END
        return found


def is_stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def checked(batch: Any, name: str) -> Batch:
    """``batch``, of the loader called ``name``, as arguments. Raises ValueError for anything else."""
    found: Batch
    if isinstance(batch, Tensor):
        found = (batch,)
    elif isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        found = dict(batch)
    elif isinstance(batch, (tuple, list)):
        found = tuple(batch)
    else:
        raise ValueError(f"{name} gives {_kind(batch)}, which is no batch\n{BATCHES}")
    tensors = [tensor for _, tensor in _tensors(found)]
    if not tensors:
        inside = ", ".join(_kind(leaf) for leaf in pytree.tree_leaves(found)[:4]) or "nothing"
        raise ValueError(f"{name} gives a batch without a tensor: it has {inside}\n{BATCHES}")
    if any(tensor.dim() and not tensor.shape[0] for tensor in tensors):
        raise ValueError(f"{name} gives a batch without rows\nWay out: a loader that leaves it out.")
    return found


BATCHES = (
    "Way out: batches of tensors (torch.from_numpy, or a DataLoader, which makes them): a dict by name, a tuple in the "
    "order of forward, or one tensor."
)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def _tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    """The tensors of a batch, each with the name of its argument; that of a positional one is ""."""
    named = batch.items() if isinstance(batch, dict) else [("", entry) for entry in batch]
    leaves = [(name, leaf) for name, value in named for leaf in pytree.tree_leaves(value)]
    return [(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor)]


def _empty(name: str) -> ValueError:
    return ValueError(
        f"{name} gives no batch: it is empty\n"
        "Way out: fewer rows in a batch (--batch) if the loader drops a smaller last one, or more data."
    )


def _ended(name: str, batches: int) -> ValueError:
    return ValueError(
        f"{name} ended after {batches} batches, and gave none when it was gone through again\n"
        "Way out: return what can be gone through again, a DataLoader rather than a generator; or fewer --steps."
    )
