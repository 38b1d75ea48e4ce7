"""Which operators a text may call: those that compute tensors from tensors and do nothing else.

A program on disk is data of somebody else. Its operators are looked up in torch's registry, which has some that open
files, print, change settings of the process, or read memory by addresses in their arguments.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from typing import Any

import torch

NAMESPACES = ("aten", "prims", "autopar")
EVERY = ("*",)  # every registered operator: for programs that this process has made itself

# The types of arguments and results of operators that only compute. Storages, streams, packed weights and TorchScript's
# own types (of aten.save, aten.format, ...) are none.
_SCALARS = r"int|float|bool|number|complex|str|Device|ScalarType|Layout|MemoryFormat|SymInt|SymBool|Generator"
_TYPE = re.compile(rf"(Optional\[)*(List\[)?(Optional\[)?(Tensor|{_SCALARS})\]*")
_RESULT = re.compile(r"(List\[)?(Tensor|int|SymInt)\]?")

_STOPS = re.compile(r"aten::_assert_\w+")  # they give nothing, and raise where a value is not what the model expects

_REFUSED = {
    r"aten::from_file": "it opens files",
    r"\w+::_?test_\w+": "it is for torch's own tests",
    r"\w+::_make_(dep_)?token|aten::_cudnn_init_dropout_state": "it changes the state of the process",
    # tensors of other formats trust the indices, offsets and sizes in their parts: wrong ones read other memory
    r"\w+::\w*(sparse|nested|mkldnn|jagged|_coo|_csr|_csc|_bsr|_bsc)\w*": "it trusts addresses",
    r"\w+::(?!_?fake_)\w*(quantize|fbgemm|int_repr|_weight_int|q_per_channel)\w*": "it is for quantized tensors",
}


def why_not(target: Any, allowed: Collection[str] = ()) -> str | None:
    """Why a text may not call the registered operator ``target``; None where it may.

    ``allowed``: further namespaces (``mylib``) or operators (``mylib::scale``) that the reader trusts.
    """
    schema = target._schema
    namespace = schema.name.partition("::")[0]
    if allowed is EVERY or namespace in allowed or schema.name in allowed:
        return None
    if namespace not in NAMESPACES:
        return f'it is of the library {namespace}; where you trust it: load(directory, operators=["{namespace}"])'
    if schema.is_mutable:
        return "it writes to its arguments"
    types = [str(argument.type) for argument in schema.arguments]
    results = [str(result.type) for result in schema.returns]
    if not all(map(_TYPE.fullmatch, types)) or not all(map(_RESULT.fullmatch, results)):
        return "it takes or gives other things than tensors and numbers"
    if not any("Tensor" in result for result in results) and not _STOPS.fullmatch(schema.name):
        return "it gives no tensor"
    return next((reason for names, reason in _REFUSED.items() if re.fullmatch(names, schema.name)), None)


def misfit(target: Any, positional: int, keywords: Collection[str]) -> str | None:
    """Why ``positional`` arguments and those named ``keywords`` are none of ``target``'s; None where they fit."""
    if not isinstance(target, torch._ops.OpOverload):
        try:
            inspect.signature(target).bind(*range(positional), **dict.fromkeys(keywords))
        except TypeError as error:
            return f"arguments of op.{target.__name__} ({error})"
        return None
    arguments = target._schema.arguments
    names = [argument.name for argument in arguments]
    if positional > sum(not argument.kwarg_only for argument in arguments):
        return f"at most {sum(not argument.kwarg_only for argument in arguments)} positional arguments"
    unknown = next((word for word in keywords if word not in names), None)
    if unknown is not None:
        return f"an argument of {target._schema.name} ({', '.join(names)})"
    missing = [
        argument.name
        for position, argument in enumerate(arguments)
        if position >= positional and argument.name not in keywords and not argument.has_default_value()
    ]
    return f"argument {missing[0]} of {target._schema.name}" if missing else None
