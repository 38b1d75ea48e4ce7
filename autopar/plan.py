"""The plan: every choice a user can make about how a model is parallelised, validated on construction."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from autopar.errors import check_kind, unknown_name
from autopar.precision import Precision
from autopar.schedules.named import NAMES, stages_per_rank

SEQUENCE_FORMS = ("none", "megatron")
ATTENTION_FORMS = ("auto", "ring", "gather", "ulysses", "hybrid")
EXPERT_AXES = ("auto", "ep", "ep+sp", "ep+tp", "ep+sp+tp", "sp", "tp", "sp+tp")
ZERO_STAGES = (0, 1, 2, 3)
INPUT_FORMS = ("global", "local")
LENGTH_FORMS = ("family", "each")
OUTPUT_FORMS = ("auto", "sharded", "full")
RECOMPUTE_FORMS = ("none", "selective", "full")
WEIGHTS_OF_PARTS = ("exact", "statistics", "rows")
INITIAL_FORMS = ("rank0", "checked")
COMPILE_FORMS = ("python", "inductor")
FALLBACKS = ("error", "replicate")
TENSOR_FORMS = ("column", "row", "replicate", "vocabulary")
FORMS: Mapping[str, tuple[object, ...]] = {  # choices that are one of a few values
    "sequence": SEQUENCE_FORMS,
    "attention": ATTENTION_FORMS,
    "expert_axes": EXPERT_AXES,
    "zero": ZERO_STAGES,
    "inputs": INPUT_FORMS,
    "lengths": LENGTH_FORMS,
    "outputs": OUTPUT_FORMS,
    "initial": INITIAL_FORMS,
    "compile": COMPILE_FORMS,
    "on_unknown": FALLBACKS,
    "on_indivisible": ("auto", *FALLBACKS),
    "microbatch_weights": WEIGHTS_OF_PARTS,
}


def _plain(value: object) -> object:
    if isinstance(value, Precision):
        return value.to_json()
    return dict(value) if isinstance(value, Mapping) else value


def _frozen(mapping: Mapping[str, object]) -> Mapping[str, object]:
    return MappingProxyType(dict(mapping))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Choices for ``autopar.parallelize``; the defaults are right for most models.

    Attributes:
        sequence: ``"megatron"`` splits the sequence between transformer blocks over ``tp``
            (reduce-scatter and all-gather instead of all-reduce; Korthikanti et al. 2022).
        attention: how attention runs on parts of a sequence, with an axis ``sp`` (docs/sequence.md): ``"ring"`` passes
            keys and values around; ``"gather"`` gathers them; ``"ulysses"`` turns parts of the sequence into parts of
            the heads and back; ``"hybrid"`` does that among neighbours, with a ring over the groups; ``"auto"``
            prices the four for each attention.
        expert_axes: the axes over which whole experts are dealt out (docs/experts.md): ``"ep"``, ``"ep+sp"``,
            ``"ep+tp"``, ``"ep+sp+tp"``, also without ``ep``; ``"auto"``: ``ep``, and the others where that sends less.
        expert_placement: module of a layer of experts, or a pattern of such (``fnmatch``) -> its experts in the order
            in which the ranks get them, as many each (``autopar.balanced_placement``); by default 0, 1, 2, ...
        record_load: count the rows of each expert in each step (``parallel.expert_load()``, ``autopar train --log``).
            With ``capacity_factor`` they are counted anyway, and what is dropped.
        capacity_factor: of the rows of a rank, an expert takes at most this many times its even share, rounded up;
            the others are dropped (Lepikhin et al. 2020); None: nothing is dropped.
        zero: what is split over the data axes and ``sp`` (Rajbhandari et al. 2020): 1 the optimizer states, 2 the
            gradients too, 3 the parameters too, which are then gathered before use; 0 nothing.
        reshard_after_forward: with ``zero=3``, free gathered parameters after their use in the forward pass and
            gather them again in the backward pass; False keeps them.
        precision: dtypes of computing, of reducing gradients, and of outputs, beside that of the parameters.
        recompute: what backward recomputes rather than keeps (pass ``recompute_activations``): ``"none"``;
            ``"selective"``: norms, activations, softmax, but not the products before them; ``"full"``: in
            repeated blocks everything, from the inputs of the block; a number from 0 to 1: at most this fraction of
            the bytes that ``"none"`` keeps, with the fewest operations for that (0 is full).
        microbatches: the number of parts into which ``train_step`` cuts a batch; they run one after the other, loss
            and gradients are those of the whole. With an axis ``pp`` they go through the pipeline.
        microbatch_weights: what the loss of each microbatch counts for. ``"exact"``: its share of the tokens that the
            loss is a mean over, so that the sum is the loss of the whole batch; a loss that is no such mean is refused.
            ``"statistics"``: so too, but for terms that are statistics of all rows (the balance of a router): they are
            those of each microbatch, by its share of the rows. ``"rows"``: all of its loss by its share of the rows,
            as in accumulating gradients by hand.
        schedule: in which order pipeline ranks run their stages: ``"gpipe"``, ``"1f1b"``, ``"interleaved"``,
            ``"zb-h1"``, ``"zb-v"``, ``"dualpipe-v"``, or one that is written down (docs/pipeline.md).
        virtual_stages: stages on each pipeline rank; by default what the schedule usually has.
        tensor: parameter-name pattern (``fnmatch``) -> ``"column" | "row" | "replicate" | "vocabulary"``;
            the first pattern that matches wins.
        inputs: ``"global"``: every rank passes the whole batch; ``"local"``: each passes its own part.
        batch_dims: input name -> its batch dim (None: it has none), where the guess is wrong.
        sequence_dims: input name -> its sequence dim (None: it has none), where it is not found: it is needed in a
            model without attention, and with ``inputs="local"`` on an axis ``sp``.
        lengths: what is compiled where calls have batches of several lengths: ``"family"``: from the second length on
            one program with expressions for the sizes, fitted from four, which serves all lengths in a range
            (docs/lengths.md); ``"each"``: a program for each.
        outputs: ``"sharded"``: outputs other than the loss are DTensors, gathered by ``full_tensor()``;
            ``"full"``: they are gathered in the program; ``"auto"``: gathered where the model returns no loss, so that
            one that is computed of them is that of one device, else (and with ``inputs="local"``) sharded.
        on_unknown: what to do with an operator without a rule: ``"error"`` or ``"replicate"``.
        on_indivisible: what to do with an attention or a large weight that ``tp`` cannot split, since its heads or
            sizes do not divide: ``"error"``, or ``"replicate"``: every rank does it whole, and a warning says so;
            ``"auto"``: the latter for up to a fifth of the parameters, an error for more.
        check_numerics: compare the traced graph with the eager model once, on the example inputs.
        verify: prove each program before it runs (docs/verify.md): a program that does not compute the model's loss and
            gradients, or that could hang, is an error.
        bucket_mb: gradients are reduced together in buckets of this many megabytes; 0: each by itself.
        overlap_mb: megabytes that collectives under way may hold: parameters are gathered ahead of their use, and
            gradients reduced beside the computation that follows, as far as this allows; 0: none of it.
        seed: base of the dropout masks.
        initial: what happens where the weights of the ranks differ before the first step: ``"rank0"``: all take those
            of rank 0, as under DistributedDataParallel; ``"checked"``: an error names them.
        cuts: modules at which the pipeline stages after the first begin, in the order in which they run, e.g.
            ``("model.layers.8", "model.layers.16")``; (): where compute time is balanced best.
        stage_memory_gb: what parameters, gradients, AdamW states and kept activations of one stage may take on a rank,
            in units of 1e9 bytes; None: anything.
        compile: what runs between collectives: ``"python"``: the generated Python, line by line; ``"inductor"``: what
            torch's Inductor makes of it, compiled in the first step (docs/inductor.md).
        timeout: seconds after which a collective that a peer never joined ends the run.

    Raises ValueError for a value that is not one of those above.
    """

    sequence: str = "none"
    attention: str = "auto"
    expert_axes: str = "auto"
    expert_placement: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    record_load: bool = False
    capacity_factor: float | None = None
    zero: int = 0
    reshard_after_forward: bool = True
    recompute: str | float = "none"
    precision: Precision = field(default_factory=Precision)
    microbatches: int = 1
    microbatch_weights: str = "exact"
    schedule: str = "1f1b"
    virtual_stages: int | None = None
    tensor: Mapping[str, str] = field(default_factory=dict)
    inputs: str = "global"
    batch_dims: Mapping[str, int | None] = field(default_factory=dict)
    sequence_dims: Mapping[str, int | None] = field(default_factory=dict)
    lengths: str = "family"
    outputs: str = "auto"
    on_unknown: str = "error"
    on_indivisible: str = "auto"
    check_numerics: bool = True
    verify: bool = False
    bucket_mb: float = 25.0
    overlap_mb: float = 64.0
    seed: int = 0
    initial: str = "rank0"
    cuts: tuple[str, ...] = ()
    stage_memory_gb: float | None = None
    compile: str = "python"
    timeout: float = 300.0

    def __new__(cls, *values: object, **choices: object) -> Plan:
        if values:
            raise ValueError(f"Plan({values[0]!r}): choices are given by name\nWay out: Plan(zero=3), for example.")
        _check_names(choices)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _check_tables(self)
        for name, forms in FORMS.items():
            _one_of(name, getattr(self, name), forms)
        _check_capacity(self.capacity_factor)
        _check_recompute(self.recompute)
        for pattern, form in self.tensor.items():
            _one_of(f"tensor[{pattern!r}]", form, TENSOR_FORMS)
        if not isinstance(self.precision, Precision):
            object.__setattr__(self, "precision", _precision(self.precision))
        _check_types(self)
        _check_schedule(self.schedule, self.virtual_stages)
        whole = isinstance(self.cuts, (tuple, list)) and all(isinstance(name, str) and name for name in self.cuts)
        if not whole:
            raise _wrong("cuts", self.cuts, "names of modules", ("model.layers.8",))
        object.__setattr__(self, "tensor", _frozen(self.tensor))
        object.__setattr__(self, "cuts", tuple(self.cuts))
        placed = {name: _permutation(name, order) for name, order in self.expert_placement.items()}
        object.__setattr__(self, "expert_placement", _frozen(placed))
        object.__setattr__(self, "batch_dims", _frozen(self.batch_dims))
        object.__setattr__(self, "sequence_dims", _frozen(self.sequence_dims))

    @property
    def counts_load(self) -> bool:
        """Whether the rows of experts are counted: on demand, and where some are dropped."""
        return self.record_load or self.capacity_factor is not None

    def to_json(self) -> dict[str, Any]:
        """Every choice by name, in values that JSON knows."""
        choices = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: _plain(value) for name, value in choices.items()}

    @classmethod
    def from_json(cls, choices: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`; ``precision`` may be the name of a dtype, that of ``Precision(param=)``.

        Raises ValueError for a choice that this version does not know.
        """
        check_kind("choices", choices, Mapping, 'Plan.from_json({"zero": 3})')
        _check_names(choices)
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in choices.items()}
        precision = given.get("precision")
        if isinstance(precision, str):
            precision = {"param": precision}
        if isinstance(precision, Mapping):
            given["precision"] = Precision.from_json(precision)
        return cls(**given)

    @classmethod
    def from_file(cls, path: str | Path) -> Plan:
        """The plan in a file of TOML, or of JSON where its name ends so: ``zero = 3``, ``[tensor]``, ``"*.o" = "row"``.

        Raises ValueError for a file that cannot be read, and for a choice or a value that a plan does not have.
        """
        return cls.from_json(read_choices(path))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled by its choices: a frozen mapping can be neither."""
        return type(self).from_json, (self.to_json(),)

    @classmethod
    def from_tp_plan(cls, tp_plan: Mapping[str, str], **choices: Any) -> Plan:
        """The plan of a Hugging Face ``tp_plan`` (``model.tp_plan`` or ``config.base_model_tp_plan``).

        ``{"layers.*.mlp.up_proj": "colwise"}`` becomes ``tensor={"*layers.*.mlp.up_proj.weight": "column"}``.
        Entries that say nothing about splitting a weight (norms, gathered outputs) are left to autopar.
        """
        check_kind("tp_plan", tp_plan, Mapping, 'Plan.from_tp_plan(model.tp_plan), or {"layers.*.q_proj": "colwise"}')
        forms: dict[str, str] = {}
        for module, style in tp_plan.items():
            form = next((form for part, form in _TP_STYLES.items() if part in str(style)), None)
            if form is not None:
                forms[f"*{module}.weight"] = form
        return cls(tensor={**forms, **choices.pop("tensor", {})}, **choices)


def read_choices(path: str | Path) -> dict[str, Any]:
    """The choices in a file of TOML or JSON; their values are not checked yet.

    Raises ValueError where it cannot be read, and for a name that is no choice.
    """
    read = json.loads if Path(path).suffix == ".json" else tomllib.loads
    try:
        choices = read(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}\nWay out: a file with lines as zero = 3.") from None
    except ValueError as error:
        kind = "JSON" if read is json.loads else "TOML"
        raise ValueError(f'{path} is no {kind}: {error}\nWay out: lines as zero = 3, schedule = "zb-v".') from None
    if not isinstance(choices, dict):
        raise ValueError(f'{path}: a plan is a table of choices\nWay out: {{"zero": 3}}')
    _check_names(choices, f"{path}: ")
    return choices


def _check_names(choices: Mapping[str, object], where: str = "") -> None:
    names = [entry.name for entry in fields(Plan)]
    for name in choices:
        if name not in names:
            if name in _OF_DEEPSPEED:
                raise ValueError(
                    f"{where}{name!r} is a key of DeepSpeed's configuration, not a choice of a plan\n"
                    'Way out: docs/coming_from.md has what its keys are here: zero = 3 for "stage": 3.'
                )
            raise ValueError(unknown_name(f"{where}Plan has no choice", name, names))


_OF_DEEPSPEED = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization", "bf16",
    "fp16", "gradient_clipping", "optimizer", "scheduler", "activation_checkpointing", "steps_per_print",
}  # fmt: skip
_TP_STYLES = {"colwise": "column", "rowwise": "row"}


def _wrong(name: str, value: object, wanted: str, example: object) -> ValueError:
    """The error of a choice that is no ``wanted``; ``example``: one that is."""
    return ValueError(f"Plan({name}={value!r}): {wanted}\nWay out: {name}={example!r}, for example.")


def _check_tables(plan: Plan) -> None:
    examples: dict[str, object] = {
        "tensor": {"*.o_proj.weight": "row"},
        "batch_dims": {"mask": None},
        "sequence_dims": {"x": 1},
        "expert_placement": {"layers.0.mlp": (1, 0, 3, 2)},
    }
    for name, example in examples.items():
        value = getattr(plan, name)
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(name, value, "a dict by name", example)


def _precision(given: Any) -> Precision:
    """What is computed in ``given``, a dtype or its name. Raises ValueError for what is none."""
    try:
        return Precision(param=given)
    except ValueError as error:
        problem = str(error).partition("\n")[0]
        raise ValueError(
            f'Plan(precision={given!r}): {problem}\nWay out: autopar.Precision(param="bf16"), or "bf16" for short.'
        ) from None


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"Plan({name}={value!r}): it is one of {', '.join(map(repr, allowed))}")


def _check_types(plan: Plan) -> None:
    for name in ("reshard_after_forward", "record_load", "check_numerics"):
        if not isinstance(getattr(plan, name), bool):
            raise _wrong(name, getattr(plan, name), "True or False", getattr(Plan, name))
    if not _is_whole(plan.microbatches) or plan.microbatches < 1:
        raise _wrong("microbatches", plan.microbatches, "a whole number, at least 1", 4)
    if not _is_whole(plan.seed):
        raise _wrong("seed", plan.seed, "a whole number", 0)
    for name in ("bucket_mb", "overlap_mb"):
        if not _is_finite(getattr(plan, name)) or getattr(plan, name) < 0:
            raise _wrong(name, getattr(plan, name), "a number of megabytes, 0 or more", getattr(Plan, name))
    if plan.stage_memory_gb is not None and not (_is_finite(plan.stage_memory_gb) and plan.stage_memory_gb > 0):
        raise _wrong("stage_memory_gb", plan.stage_memory_gb, "a number above 0, or None", 80)
    if not _is_finite(plan.timeout) or plan.timeout <= 0:
        raise _wrong("timeout", plan.timeout, "a number of seconds above 0", 300.0)
    for name in ("batch_dims", "sequence_dims"):
        for key, dim in getattr(plan, name).items():
            if dim is not None and not _is_whole(dim):
                raise _wrong(name, {key: dim}, "a dim is a whole number, or None: it has none", {key: 0})


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _permutation(name: str, order: object) -> tuple[int, ...]:
    numbers = tuple(order) if isinstance(order, (list, tuple)) else ()
    if not numbers or sorted(numbers) != list(range(len(numbers))):
        raise _wrong("expert_placement", {name: order}, "each expert's number, from 0, once", {name: (1, 0)})
    return numbers


def _check_capacity(value: object) -> None:
    if value is not None and not (_is_finite(value) and value > 0):  # type: ignore[operator]
        about = (
            "a number above 0 (1: an expert takes as many rows as if all had equally many), or None: nothing is dropped"
        )
        raise _wrong("capacity_factor", value, about, 1.25)


def _check_schedule(schedule: object, virtual_stages: object) -> None:
    if not isinstance(schedule, str) or ":" not in schedule and schedule not in NAMES:
        names = ", ".join(map(repr, NAMES))
        raise ValueError(f"Plan(schedule={schedule!r}): it is one of {names}, or one as text (docs/pipeline.md)")
    if virtual_stages is None:
        return
    if not isinstance(virtual_stages, int) or isinstance(virtual_stages, bool) or virtual_stages < 1:
        raise _wrong("virtual_stages", virtual_stages, "a whole number, at least 1, or None", 2)
    if ":" in schedule:
        raise ValueError(f"Plan(virtual_stages={virtual_stages}): a schedule that is written down has its own stages")
    try:
        stages_per_rank(schedule, virtual_stages)
    except ValueError as problem:
        raise ValueError(f"Plan(schedule={schedule!r}, virtual_stages={virtual_stages}): {problem}") from None


def _check_recompute(value: object) -> None:
    fraction = _is_finite(value)
    if not (0 <= value <= 1 if fraction else value in RECOMPUTE_FORMS):  # type: ignore[operator]
        forms = ", ".join(map(repr, RECOMPUTE_FORMS))
        raise ValueError(f"Plan(recompute={value!r}): it is one of {forms}, or a fraction of memory from 0 to 1")
