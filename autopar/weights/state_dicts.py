"""State dicts of a parallel module: those of torch, which say so where they are written as if they were whole."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.communication.connect import Connection
from autopar.notes import warn

PARTS = (
    "torch.save of model.state_dict() writes this rank's parts (DTensors): a plain model cannot load them, and ranks "
    "that write to one path overwrite each other\n"
    "Way out: torch.save(model.full_state_dict(), path) for whole tensors (all ranks call full_state_dict, one saves); "
    "autopar.Checkpoints for a run to go on from."
)


class StateDict(OrderedDict[str, Any]):
    """``OrderedDict`` in all but this: pickled while it has parts, it warns, and becomes an ordinary one."""

    def __reduce__(self) -> Any:
        if any(isinstance(value, DTensor) for value in self.values()):
            warn(PARTS)
        return OrderedDict, (), vars(self) or None, None, iter(self.items())

    def __copy__(self) -> StateDict:
        return _with_attributes(StateDict(self), vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> StateDict:
        made = StateDict((key, copy.deepcopy(value, memo)) for key, value in self.items())
        return _with_attributes(made, copy.deepcopy(vars(self), memo))


def warning_state_dict(found: Mapping[str, Tensor]) -> StateDict:
    """``found``, what ``nn.Module.state_dict`` returned, with its versions (``_metadata``)."""
    return _with_attributes(StateDict(found), vars(found))


def loaded(connection: Connection | None, load: Callable[[], Any]) -> Any:
    """What ``load()`` returns, torch's ``load_state_dict``; on a pipeline with the keys that any stage misses.

    There it is collective, and where some ranks raise (torch refuses, or a hook), those raise that and the others
    RuntimeError.
    """
    if connection is None or not connection.mesh.is_pipelined:
        return load()
    found, refusal, own = None, "", None
    try:
        found = load()
    except RuntimeError as problem:
        refusal = str(problem)
    except Exception as problem:
        refusal = f"load_state_dict on rank {connection.comm.rank}: {type(problem).__name__}: {problem}"
        own = problem
    everyone = connection.comm.agreement.everyone((refusal, found.missing_keys if found else []))
    refusals = list(dict.fromkeys(refusal for refusal, _ in everyone if refusal))
    if own is not None:
        raise own
    if found is None or refusals:
        raise RuntimeError("\n".join(refusals))
    found.missing_keys[:] = list(dict.fromkeys(key for _, missing in everyone for key in missing))
    return found


def _with_attributes(made: StateDict, attributes: Mapping[str, Any]) -> StateDict:
    vars(made).update(attributes)
    return made


def _unflattened(values: Any, keys: Any) -> StateDict:
    return StateDict(zip(keys, values))


pytree.register_pytree_node(
    StateDict,
    lambda found: (list(found.values()), list(found)),
    _unflattened,
    serialized_type_name="autopar.StateDict",
    flatten_with_keys_fn=lambda found: ([(pytree.MappingKey(k), v) for k, v in found.items()], list(found)),
    to_dumpable_context=list,
    from_dumpable_context=list,
)
