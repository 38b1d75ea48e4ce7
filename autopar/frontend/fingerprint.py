"""The fingerprint of a model and a call: everything of them that the compiler may have put into a program.

Numbers and texts among the attributes of a module become constants of the graph (the number of heads, an epsilon), and
its methods become operators. So a module is known by its class, by its attributes, and by the file of its class.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.frontend.torch_layers import packs_padding
from autopar.ir.fingerprint import SEPARATOR, UNKNOWN, CallFacts, Fingerprint
from autopar.ir.text import DTYPE_NAMES

ROOT = Path(__file__).resolve().parents[1]
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.Size)
PASSING = ("training", "_is_full_backward_hook", "_is_hf_initialized", "_non_persistent_buffers_set")
CONFIG_PASSING = ("transformers_version", "_name_or_path", "name_or_path")  # they say where a model comes from
DIGITS = 16


def fingerprint(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Fingerprint:
    """That of ``model`` and the call ``model(*args, **kwargs)``; tensors may be meta tensors."""
    return of_model(model, call_facts(model, args, kwargs))


def of_model(model: nn.Module, call: CallFacts) -> Fingerprint:
    """As :func:`fingerprint`, for a ``call`` that is known already."""
    return Fingerprint(_code(model), dict(_modules(model)), dict(_tensors(model)), call)


def model_facts(model: nn.Module) -> dict[str, str]:
    """What all ranks have in common: the code, and the names, kinds and shapes of the model's tensors."""
    return {**_code(model), **dict(_tensors(model))}


# ---------------------------------------------------------------- the call


def call_facts(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallFacts:
    """What determines the program of the call ``model(*args, **kwargs)``, now: in this mode, under this autocast."""
    named = _named(model.forward, args, kwargs)
    leaves = pytree.tree_flatten_with_path(named)[0]
    inputs = tuple((f"{path[0]!s}".strip("[]'") + pytree.keystr(path[1:]), _leaf(leaf)) for path, leaf in leaves)
    mode = ["training" if model.training else "evaluation"]
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            mode.append(f"autocast to {torch.get_autocast_dtype(kind)} on {kind}")
    if packs_padding(model) and not torch.is_grad_enabled():
        mode.append("without gradients")
    return CallFacts(inputs, ", ".join(mode))


def _named(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, positional ones first, in the order in which they were given."""
    parameters = list(inspect.signature(forward).parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    further = [str(position) for position in range(len(names), len(args))]
    return {**dict(zip((*names, *further), args)), **kwargs}


def _leaf(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return f"{type(leaf).__name__} {leaf!r:.200}"
    return f"{_dtype(leaf.dtype)}{list(leaf.shape)}" + (" grad" if leaf.requires_grad else "")


# ---------------------------------------------------------------- the model


def _tensors(model: nn.Module) -> Iterator[tuple[str, str]]:
    first: dict[int, str] = {}
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            tied = f" tied to {first[id(tensor)]}" if id(tensor) in first else ""
            first.setdefault(id(tensor), name)
            trained = "" if kind == "buffer" else " trained" if tensor.requires_grad else " frozen"
            yield name, f"{kind} {_dtype(tensor.dtype)}{list(tensor.shape)}{trained}{tied}"


def _modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    configs: dict[int, str] = {}
    for path, module in model.named_modules():
        settings = [f"{key}={fact}" for key, fact in sorted(_settings(module, configs))]
        other = "" if module.training == model.training else " in training" if module.training else " in evaluation"
        yield path or "the model", SEPARATOR.join([_name(type(module)) + other, *settings])


def _settings(module: nn.Module, configs: dict[int, str]) -> Iterator[tuple[str, str]]:
    for key, value in vars(module).items():
        if key in PASSING or isinstance(value, dict) and key.startswith("_"):
            continue
        if isinstance(value, PLAIN):
            yield key, repr(value)
        elif isinstance(value, Tensor):
            yield key, _content(value)
        elif isinstance(value, (tuple, list)) and all(isinstance(item, PLAIN) for item in value):
            yield key, f"{value!r:.200}"
        elif callable(value) and hasattr(value, "__qualname__"):
            yield key, f"{getattr(value, '__module__', '')}.{value.__qualname__}"
        elif hasattr(value, "to_dict") or dataclasses.is_dataclass(value):
            if id(value) not in configs:  # all modules of a model share theirs
                configs[id(value)] = _config(value)
            yield key, configs[id(value)]
        else:
            yield key, _name(type(value))


def _content(tensor: Tensor) -> str:
    kind = f"{_dtype(tensor.dtype)}{list(tensor.shape)}"
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout is not torch.strided:
        return kind
    return f"{kind} {_digest(bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data))}"


def _config(value: Any) -> str:
    """The class of an object that holds settings, and a digest of these."""
    found = value.to_dict() if hasattr(value, "to_dict") else dataclasses.asdict(value)
    kept = {str(key): str(item) for key, item in found.items() if key not in CONFIG_PASSING}
    return f"{_name(type(value))}:{_digest(repr(sorted(kept.items())).encode())}"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _dtype(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype))


# ---------------------------------------------------------------- the code


def _code(model: nn.Module) -> dict[str, str]:
    found = {"torch": str(torch.__version__), "autopar": own_files()}
    for cls in sorted({type(module) for module in model.modules()}, key=_name):
        for base in cls.__mro__:
            if base.__module__.partition(".")[0] not in ("torch", "builtins", "abc", "typing"):
                key = _name(base) if base.__module__ == "__main__" else base.__module__
                found[f"source of {key}"] = _source(base)
    return found


def _source(cls: type) -> str:
    """A digest of the file that defines ``cls``, with the functions that it calls; of a script, of the class alone."""
    try:
        if cls.__module__ == "__main__":
            return _digest(inspect.getsource(cls).encode())
        path = getattr(sys.modules.get(cls.__module__), "__file__", None)
        return _file(path) if path else UNKNOWN
    except (OSError, TypeError):
        return UNKNOWN  # typed in at a prompt, or compiled


@cache
def _file(path: str) -> str:
    return _digest(Path(path).read_bytes())


@cache
def own_files() -> str:
    """Of all our files; some of our folders may be links."""
    digest, length = hashlib.sha256(), len(str(ROOT)) + 1
    for path in sorted(_python_files(str(ROOT))):
        with open(path, "rb", buffering=0) as stream:
            content = stream.read()
        digest.update(f"{path[length:]} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:DIGITS]


def _python_files(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                yield entry.path
            elif not entry.name.startswith((".", "__")) and entry.is_dir():
                yield from _python_files(entry.path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]
