"""Nested structures of inputs and outputs (pytrees) as JSON and back, without importing the classes that the JSON
names.

The form is that of ``torch.utils._pytree.treespec_dumps``. A class that is unknown to the reader, such as a model's own
output class, becomes a dict or a tuple; only classes of an installed ``transformers`` are imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
from contextlib import suppress
from typing import Any

from torch.utils import _pytree as pytree

PLAIN = (
    "builtins.tuple",
    "builtins.list",
    "builtins.dict",
    "collections.OrderedDict",
    "collections.deque",
    "torch.fx.immutable_collections.immutable_list",
    "torch.fx.immutable_collections.immutable_dict",
    "torch.Size",
)
DICTS = ("builtins.dict", "collections.OrderedDict", "torch.fx.immutable_collections.immutable_dict")
_MODULES = r"modeling_outputs|cache_utils|models\.\w+\.modeling_\w+"  # that define classes of outputs
IMPORTABLE = re.compile(rf"transformers\.({_MODULES})\.[A-Za-z]\w*", re.ASCII)
PROTOCOL = 1


def structure_to_json(spec: pytree.TreeSpec | None) -> Any:
    """``spec`` as JSON values; None stays None. Raises ValueError for a structure that has no such form."""
    try:
        return None if spec is None else [PROTOCOL, _dumped(spec)]
    except TypeError as error:
        raise ValueError(f"the structure {spec} cannot be written as JSON: {error}") from error


def structure_from_json(data: Any) -> tuple[pytree.TreeSpec | None, list[str]]:
    """The structure, and the names of classes that are unknown here and were replaced by dicts or tuples.

    Raises ValueError for anything that is no such structure.
    """
    if data is None:
        return None, []
    unknown: list[str] = []
    try:
        protocol, tree = data
        if protocol != PROTOCOL:
            raise ValueError(f"protocol {protocol}, this version reads {PROTOCOL}")
        return pytree.treespec_loads(json.dumps([PROTOCOL, _known(tree, unknown)])), unknown
    except (AttributeError, KeyError, TypeError, NotImplementedError, RecursionError) as error:
        raise ValueError(f"no structure of inputs or outputs: {type(error).__name__}: {error}") from error


def _dumped(spec: pytree.TreeSpec) -> dict[str, Any]:
    if spec.is_leaf():
        return {"type": None, "context": None, "children_spec": []}
    children = [_dumped(child) for child in spec.children()]
    entry = pytree.SUPPORTED_SERIALIZED_TYPES.get(spec.type)
    if entry is None or entry.serialized_type_name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND or _nameless(spec):
        cls = spec.context if _nameless(spec) else spec.type  # written under its name, read back as a dict or tuple
        name = f"{cls.__module__}.{cls.__qualname__}"
        _, keys = _stand_in(spec.context, len(children))
        return {"type": name, "context": json.dumps(keys), "children_spec": children}
    dump = entry.to_dumpable_context or json.dumps
    return {"type": entry.serialized_type_name, "context": dump(spec.context), "children_spec": children}


def _nameless(spec: pytree.TreeSpec) -> bool:
    """Whether this is a named tuple of a class that was never registered under a name."""
    return _is_namedtuple(spec) and spec.context not in pytree.SUPPORTED_SERIALIZED_TYPES


def _is_namedtuple(spec: pytree.TreeSpec) -> bool:
    entry = pytree.SUPPORTED_SERIALIZED_TYPES.get(spec.type)
    return entry is not None and entry.serialized_type_name == "collections.namedtuple"


def _stand_in(context: Any, children: int) -> tuple[type, Any]:
    """A dict where the context names the children, else a tuple."""
    keys = getattr(context, "_fields", context)
    named = isinstance(keys, (list, tuple)) and len(keys) == children and all(isinstance(key, str) for key in keys)
    return (dict, list(keys)) if named else (tuple, None)


def _known(tree: Any, unknown: list[str]) -> dict[str, Any]:
    """The JSON of a structure in which everything that is unknown, or would be imported by name, is replaced."""
    children = [_known(child, unknown) for child in tree["children_spec"]]
    name, context = tree["type"], tree["context"]
    if name is None:
        return {"type": None, "context": None, "children_spec": []}
    if not isinstance(name, str):
        raise ValueError(f"a class that is called {str(name):.80}")
    if name not in PLAIN and not _class_is_known(name, context):
        unknown.append(context if name == "collections.namedtuple" and isinstance(context, str) else name)
        kind, keys = _stand_in(_json_context(context), len(children))
        name, context = f"builtins.{kind.__name__}", json.dumps(keys)
    keys = _json_context(context)
    if name in DICTS and (not isinstance(keys, list) or len(keys) != len(children)):
        raise ValueError(f"a dict of {len(children)} values with the keys {str(keys):.80}")
    if "__enum__" in json.dumps(context):
        raise ValueError("keys that are enumeration members are not supported")  # torch would import their class
    return {"type": name, "context": context, "children_spec": children}


def _json_context(context: Any) -> Any:
    try:
        return json.loads(context)
    except (TypeError, ValueError):
        return context.get("dict_context") if isinstance(context, dict) else None


def _class_is_known(name: str, context: Any) -> bool:
    if name == "collections.namedtuple":
        return isinstance(context, str) and context in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    if name == "collections.defaultdict":  # torch imports the factory of a defaultdict
        return False
    if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and IMPORTABLE.fullmatch(name):
        _import_of_transformers(name.rpartition(".")[0])
    return name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE


def _import_of_transformers(module: str) -> None:
    """Import a module of the installed library; never one of the working directory, which may be the program's own."""
    with suppress(Exception):  # it is not installed, or another version, or lacks what it needs itself
        spec = importlib.util.find_spec("transformers")
        folder = os.path.dirname(os.path.dirname(spec.origin)) if spec is not None and spec.origin else os.getcwd()
        if os.path.realpath(folder) != os.path.realpath(os.getcwd()):
            importlib.import_module(module)
