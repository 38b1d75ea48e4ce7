"""What code asks that is another answer in another process, or on another rank: with it, a program is not kept.

The names that the functions of a trace use are followed to what they are now. Of Python's library, what is listed here
gives the same for the same arguments; a few things of torch and of the built-in functions do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType

from autopar.cache.names import IMPORT, Name
from autopar.cache.reasons import Unstorable
from autopar.observation.code_names import is_users

_SAME_FOR_SAME = re.compile(
    r"(builtins|math|cmath|operator|_operator|functools|_functools|itertools|collections|_collections|_collections_abc"
    r"|typing|types|dataclasses|enum|copy|re|abc|_abc|contextlib|warnings|_warnings|logging|numbers|fractions|decimal"
    r"|string|json|inspect|textwrap|bisect|_bisect|heapq|_heapq|statistics|weakref|_weakref|importlib|traceback|copyreg"
    r"|keyword|unicodedata|struct|_struct|array|base64|hashlib|_hashlib|pprint|threading|_thread|contextvars"
    r"|_contextvars|__future__|typing_extensions|torchgen|jaxtyping|beartype|einops|einx|autopar)(\..*)?"
    r"|os\.(environ|getenv|path|path\.(join|basename|dirname|splitext)|PathLike|fspath)|posixpath(\.\w+)?"
    r"|sys\.(version_info|version|platform|maxsize|float_info|byteorder|implementation|stderr|stdout)|pathlib(\..*)?"
)
_NOT = re.compile(
    r"builtins\.(id|hash|open|input|exec|eval|compile|__import__|globals|locals|vars|dir|breakpoint|memoryview)"
    r"|(_io|io)\..*|importlib\.(reload|resources.*)|threading\.(get_ident|current_thread|get_native_id|local)"
    r"|_thread\.(get_ident|get_native_id|_local)|pathlib\.Path\..*|inspect\.(stack|currentframe|getframeinfo)"
    r"|torch\.distributed\.(?!is_available|is_initialized|tensor|distributed_c10d\.(is_available|is_initialized)).+"
    r"|torch\.(hub|multiprocessing|profiler|utils\.data|utils\.benchmark|utils\.cpp_extension)(\..*)?"
    r"|torch\.(random\.)?(initial_seed|seed|get_rng_state|load|save|get_num_threads|get_num_interop_threads)"
    r"|torch\.(serialization\.\w+|cuda\.(current_device|current_stream|memory.*|random.*|mem_get_info|utilization))"
    r"|numpy\.(load|save\w*|fromfile|memmap|random\b.*|loadtxt|genfromtxt)|einops\.(?!.*)"
)


def refuse_impure(names: Iterable[Name]) -> None:
    """Raise Unstorable for a name that leads to such a thing."""
    for name in names:
        full = _full_name(name)
        if full is not None and (_NOT.fullmatch(full) or not _is_known(full)):
            raise Unstorable(f"{name.user} uses {full}, which may be another thing in another process")


def _is_known(name: str) -> bool:
    return _is_of_tensors(name) or is_users(name) or _SAME_FOR_SAME.fullmatch(name) is not None


def _is_of_tensors(name: str) -> bool:
    return name.partition(".")[0] in ("torch", "numpy")


def _full_name(name: Name) -> str | None:
    """Of that to which ``name`` leads; None for a value of the user's own."""
    if len(name.chain) == 1 and name.chain[0].startswith(IMPORT):
        return None  # what is taken of it has names of its own
    value, full = name.value()
    if isinstance(value, BuiltinFunctionType) and value.__module__ is not None and is_users(value.__module__):
        raise Unstorable(f"{name.user} calls {value.__module__}.{value.__qualname__}, which is written in C")
    if isinstance(value, (FunctionType, type, BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, ModuleType):
        return value.__name__
    return full or None
