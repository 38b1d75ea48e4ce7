"""Models by name, as the command line takes them.

tiny:llama                 a small Hugging Face model with random weights (:mod:`autopar.zoo`); hf:llama is the same
llama, models.llama        a model of ours (``autopar.models``), its tiny preset; llama:llama_70b another preset of it
folder, owner/model        a folder with ``config.json``, or an id of the Hugging Face Hub that is in the cache
file.py:factory            a class of ``nn.Module``, or a callable that returns a model, or (model, batch)
package.module:factory     the same in a module, of the working folder first

What makes no batch gets one from ``inputs`` (:mod:`autopar.zoo.example_inputs`).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autopar import zoo
from autopar.errors import near_names
from autopar.models import __file__ as _OUR_MODELS
from autopar.zoo import example_inputs, user_code
from autopar.zoo.fitted_loss import with_fitting_loss
from autopar.zoo.hub_configs import CONFIG, HubModel, hub_model, is_folder, may_be_id, weights_folder
from autopar.zoo.put_on_loss import NONE
from autopar.zoo.rehearsal import rehearse
from autopar.zoo.tasks import task_of_class

OURS = ("bert", "cnn", "dlrm", "gpt", "llama", "lstm", "mlp", "moe", "t5", "transformer", "unet", "vit")
ROWS = 12  # of a batch: 2, 3, 4, 6 and 12 ranks can share them
LARGE = 2 << 30  # bytes of parameters; models above are built on the meta device, without weights
SMALL = ("tiny:", "hf:")
FORMS = (
    f"Way out: tiny:llama (71 small ones), one of {', '.join(OURS)}, a folder with {CONFIG}, "
    "an id in the cache of the Hugging Face Hub, file.py:factory, or package.module:factory."
)


Start = Literal["usual", "files", "random"]


@dataclass(frozen=True)
class Files:
    """A folder with a model's weights. ``complete``: they are of the very class, so that they have all its tensors."""

    folder: Path
    complete: bool


@dataclass(frozen=True)
class Example:
    """A model with the keyword arguments of one call. ``model`` may be on the meta device.

    ``words``: what a user should know about it, in a sentence; empty for models of ours. ``files``: what is to be read
    into the model, which is on the meta device.
    """

    name: str
    model: nn.Module
    batch: dict[str, Any]
    words: str = ""
    files: Files | None = None

    @property
    def has_weights(self) -> bool:
        return not any(parameter.is_meta for parameter in self.model.parameters())

    @property
    def is_large(self) -> bool:
        """Whether it is built without weights, unless its files have some."""
        return _bytes(self.model) > LARGE


@dataclass(frozen=True)
class Wanted:
    """How a model and its batch are made. ``rows``, ``length``: what was asked for, if anything was.

    ``config``: overrides of its config, or arguments of the factory. ``ways``: ranks among which the rows are divided.
    ``inputs``: as ``example_inputs`` reads them. ``vocab``: integers without a range are below it. ``loss``: for a
    model that returns none: ``"auto"``, ``"none"``, or the name of one. ``given``: a batch for it, whatever it brings:
    a dict by name, or a tuple. ``start``: ``"files"``: from the weights in its folder, if there are some;
    ``"random"``: from none that are made elsewhere. ``outline``: the model is wanted without weights.
    """

    config: Mapping[str, Any]
    rows: int | None = None
    length: int | None = None
    seed: int = 0
    ways: int = 1
    task: str | None = None
    inputs: Sequence[str] = ()
    vocab: int | None = None
    loss: str = NONE
    given: Mapping[str, Any] | Sequence[Any] | None = None
    start: Start = "usual"
    outline: bool = False

    @property
    def batch(self) -> int:
        return self.rows or rows_for(self.ways)


def named_model(
    name: str,
    config: Mapping[str, Any] | None = None,
    batch: int | None = None,
    length: int | None = None,
    seed: int = 0,
    ways: int = 1,
    **more: Any,
) -> Example:
    """The model called ``name`` and an example batch.

    ``config`` overrides fields of its config. ``seed`` is that of the weights and of the batch. The number of rows of a
    batch is a multiple of ``ways`` unless ``batch`` gives it. ``more``: fields of :class:`Wanted`.

    Raises ValueError, with what is known, for a name that leads to no model or sizes that do not fit it.
    """
    wanted = Wanted(dict(config or {}), batch, length, seed, ways, **more)
    found = _found(name, wanted)
    if wanted.task is not None and not isinstance(found, Hub):
        raise ValueError(f"--task {wanted.task}: {name} says itself what it is\nWay out: leave out --task.")
    example = found.example if isinstance(found, Hub) else found
    if wanted.given is not None:
        return _with_loss(example, wanted, wanted.given)
    if wanted.inputs:
        example = _with_inputs(example, wanted)
    return example if wanted.loss == NONE or not example.batch else _with_loss(example, wanted, example.batch)


def rows_for(ways: int) -> int:
    """The usual number of rows of a batch, or the next number that divides by ``ways``."""
    return -(-ROWS // ways) * ways


@dataclass(frozen=True)
class Hub:
    """An example that was made of a config of the Hub, which takes a task."""

    example: Example


def _found(name: str, wanted: Wanted) -> Example | Hub:
    if name.startswith(SMALL):
        return _small(name, wanted)
    if is_folder(name):
        return _of_config(name, wanted)
    path, _, target = name.partition(":")
    if Path(name).is_dir():
        raise ValueError(f"the folder {name} has no {CONFIG}\n{FORMS}")
    if user_code.is_file(path):
        return _of_module(name, user_code.imported_file(path), path, target, wanted)
    module = _ours(path)
    if module is None and not target and not _is_importable(path):
        if may_be_id(name) or name.isidentifier() or "-" in name:
            return _of_id(name, wanted)
        raise ValueError(f"there is no model '{name}'\n{FORMS}")
    return _of_module(name, module or user_code.imported(path, FORMS), path, target, wanted)


# ---------------------------------------------------------------- the forms


def _small(name: str, wanted: Wanted) -> Example:
    known = zoo.architecture(name.partition(":")[2])
    if wanted.length is not None and not known.has_length:
        raise ValueError(f"{name} takes images: there is no length\nWay out: leave out --length.")
    config = known.config_of(wanted.config)
    model = _built(lambda: known.build(config), wanted)
    words = f"{_count(model)} parameters, small and random: the architecture of {known.model}, not a released model"
    return Example(name, model, known.example_batch(config, wanted.batch, wanted.length, wanted.seed), words)


def _of_config(name: str, wanted: Wanted) -> Hub:
    made = hub_model(name, wanted.task, wanted.config)
    folder = weights_folder(name)
    files = Files(folder, made.is_saved_class) if folder is not None and wanted.start == "files" else None
    model = _built(made.build, replace(wanted, outline=wanted.outline or files is not None))
    if files is not None:
        weights = f"weights of {name}"
    elif any(parameter.is_meta for parameter in model.parameters()):
        weights = "no weights are read"
    else:
        weights = "random weights" + (f": {name} has only a config" if folder is None else "")
    words = f"{made.words}, {_count(model)} parameters; {weights}"
    return Hub(Example(name, model, _batch_of(made, wanted), words, files))


def _batch_of(made: HubModel, wanted: Wanted) -> dict[str, Any]:
    return made.batch(wanted.batch, wanted.length, wanted.seed)


def _of_id(name: str, wanted: Wanted) -> Hub:
    try:
        return _of_config(name, wanted)
    except ValueError as error:
        if "neither a folder" not in str(error):
            raise
        near = near_names(name, (*OURS, *(f"tiny:{known}" for known in zoo.ARCHITECTURES), *zoo.ARCHITECTURES))
        said, _, way_out = str(error).partition("\n")
        ways = f"{way_out}\nor another form of MODEL: autopar show --help." if "/" in name else FORMS
        raise ValueError(f"there is no model '{name}'{near}: {said}\n{ways}") from None


def _of_module(name: str, module: ModuleType, path: str, target: str, wanted: Wanted) -> Example:
    presets = getattr(module, "PRESETS", {})
    if hasattr(module, "build") and (not target or target in presets):
        return _preset(name, module, target or next(iter(presets)), wanted)
    if not target:
        have = user_code.makers(module)
        ways = ", ".join(f"{path}:{one}" for one in have[: user_code.SHOWN]) or f"{path}:FACTORY"
        raise ValueError(f"'{name}': say which callable of {path} makes the model\nWay out: one of {ways}.")
    return _made(name, user_code.member(module, target, presets), module, wanted)


def _preset(name: str, module: ModuleType, preset: str, wanted: Wanted) -> Example:
    known = [field.name for field in fields(module.PRESETS[preset])]
    for key in wanted.config:
        if key not in known:
            said = f"the config of {module.__name__} has no field '{key}'{near_names(key, known)}"
            raise ValueError(f"{said}\nWay out: one of {', '.join(sorted(known))}.")
    with user_code.told(f"building {name}"):
        model = _built(lambda: module.build(preset, **wanted.config), wanted)
        return Example(name, model, module.example_batch(model, wanted.batch, wanted.length, wanted.seed))


def _made(name: str, factory: Callable[..., Any], module: ModuleType, wanted: Wanted) -> Example:
    """What the user's own factory, or class, makes; it gets the sizes of the batch where it takes them."""
    if wanted.start == "random":
        raise ValueError(f"--random: {name} makes its own weights\nWay out: leave out --random.")
    takes = inspect.signature(factory).parameters
    sizes = {"batch": wanted.rows, "length": wanted.length}
    given = {key: size for key, size in sizes.items() if size is not None}
    torch.manual_seed(wanted.seed)
    made = user_code.called(factory, name, {**wanted.config, **{k: v for k, v in given.items() if k in takes}})
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name} returned {type(model).__name__}, not a model or (model, batch)\n"
            "Way out: a callable that returns an nn.Module, or an nn.Module and a batch for model(**batch)."
        )
    if wanted.inputs or wanted.given is not None:
        return Example(name, model, {}, _words(model))
    if batch is None and hasattr(module, "example_batch"):
        batch = module.example_batch(model)
    if batch is None:
        batch = _batch_of_pretrained(name, model, wanted)
        language = example_inputs.of_language(model) if batch is None else ()
        if language:
            return _with_inputs(Example(name, model, {}, _words(model)), replace(wanted, inputs=language))
    else:
        refused = [key for key in given if key not in takes]
        if refused:
            user_code.called(factory, name, {**wanted.config, **given})  # which refuses it by name
    if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
        raise ValueError(
            f"{name} gives no batch to trace the model with\n"
            f"Way out: {example_inputs.forward_of(model)}, or return (model, batch), where model(**batch) is one call."
        )
    return Example(name, model, dict(batch), _words(model))


def _batch_of_pretrained(name: str, model: nn.Module, wanted: Wanted) -> dict[str, Any] | None:
    """The batch of a model that is one of Hugging Face's, by the task of its class."""
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return None
    task = task_of_class(type(model).__name__)
    return None if task is None else _batch_of(HubModel(name, config, task), wanted)


# ---------------------------------------------------------------- inputs, losses


def _with_inputs(example: Example, wanted: Wanted) -> Example:
    """``example`` with the inputs that were described; integers are legal indices of the tables that they index."""
    inputs = example_inputs.described(wanted.inputs)
    example_inputs.check_names(example.model, inputs, example.name)
    tables = [module.num_embeddings for module in example.model.modules() if isinstance(module, nn.Embedding)]
    length = wanted.length or zoo.LENGTH

    def drawn(below: Callable[[str], int]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(wanted.seed)
        return {
            name: entry.tensor(wanted.batch, length, generator, below(name))
            if isinstance(entry, example_inputs.Described) else entry
            for name, entry in inputs.items()
        }  # fmt: skip

    open_ranges = any(isinstance(entry, example_inputs.Described) and entry.has_open_range for entry in inputs.values())
    if not open_ranges or wanted.vocab is not None:
        return replace(example, batch=drawn(lambda name: wanted.vocab or 1))
    found = rehearse(example.model, drawn(lambda name: 1))
    return replace(example, batch=drawn(lambda name: found.below(name, min(tables, default=2))))


def _with_loss(example: Example, wanted: Wanted, batch: Mapping[str, Any] | Sequence[Any]) -> Example:
    """``example`` with ``batch`` as its own, and with a loss put on, where its model returns none."""
    fitted = with_fitting_loss(example.model, batch, wanted.loss, example.name)
    words = "; ".join(filter(None, (example.words, fitted.words)))
    return replace(example, model=fitted.model, batch=fitted.batch, words=words)


def _words(model: nn.Module) -> str:
    return f"{_count(model)} parameters"


def _count(model: nn.Module) -> str:
    number = sum(parameter.numel() for parameter in model.parameters())
    for unit, scale in (("billion", 1e9), ("million", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:,}"


def _built(build: Callable[[], nn.Module], wanted: Wanted) -> nn.Module:
    """The model; an outline, and a model with many weights, is built without them, on the meta device."""
    with torch.device("meta"):
        outline = build()
    if wanted.outline or _bytes(outline) > LARGE:
        return outline
    torch.manual_seed(wanted.seed)
    return build()


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def is_users_code(name: str) -> bool:
    """Whether building the model ``name`` runs code of the user's: a file, or a module that is none of ours."""
    path = name.partition(":")[0]
    if name.startswith(SMALL) or is_folder(name):
        return False
    return user_code.is_file(path) or (_ours(path) is None and _is_importable(path))


def _ours(path: str) -> ModuleType | None:
    """The module of a model of ours; a folder ``models`` of the user goes before our older name ``models.llama``."""
    folder, _, model = path.rpartition(".")
    if model not in OURS or folder not in ("", "models", "autopar.models"):
        return None
    if folder == "models" and _found_here(path):
        return None
    return importlib.import_module(f"autopar.models.{model}")


def _found_here(path: str) -> bool:
    """Whether the working folder has the module ``path``, unless it is a folder of autopar's sources."""
    file = Path(*path.split("."))
    found = [place for place in (file.with_suffix(".py"), file / "__init__.py") if place.is_file()]
    return bool(found) and not found[0].samefile(Path(_OUR_MODELS).parent / found[0].name)


def _is_importable(path: str) -> bool:
    """Whether the first part of a dotted name is a module here; nothing is imported."""
    top = path.split(".")[0]
    if not all(part.isidentifier() for part in path.split(".")):
        return False
    user_code.working_folder_first()
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False
