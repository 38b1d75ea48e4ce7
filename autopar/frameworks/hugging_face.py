"""The ``Trainer`` of ``transformers`` for parallel modules: a subclass that overrides what it offers for overriding.

Trainer = autopar.trainer_class()                    # or of a subclass: autopar.trainer_class(MyTrainer)
Trainer(model=model, args=TrainingArguments(...), train_dataset=data).train()

Of itself a ``Trainer`` gives each process other rows, gathers what they say of them, and scales the loss by the number
of processes. Here every rank gets the whole batch, as calls of a parallel module do, and says the same of it: its
``accelerate`` prepares loaders for one process, and gathers nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.checkpoint.written_weights import save_pretrained
from autopar.errors import LaunchError
from autopar.frameworks.adapters import has_adapters, load_adapters
from autopar.frameworks.stage_outputs import on_all_ranks
from autopar.mesh import REPLICA_AXES
from autopar.module import ParallelModule, held_by
from autopar.other_methods import ASKED_BY_TRAINER, check_precision
from autopar.pretrained.gathered import gather


@cache
def trainer_class(base: type | None = None) -> Any:
    """A subclass of ``base``, by default ``transformers.Trainer``, that trains a parallel module on all of its ranks.

    ``per_device_train_batch_size`` is the number of rows of the whole batch. ``save_model`` writes the files of
    :func:`autopar.save_pretrained`. On a pipeline a step is one ``train_step``: ``Plan(microbatches=)`` is its way to
    accumulate gradients. Raises LaunchError for arguments that have no meaning on a mesh, with what to do instead.
    """
    from transformers import Trainer

    kind: Any = Trainer if base is None else base
    if str(kind.__module__).startswith("trl."):
        raise LaunchError(
            f"{kind.__name__} of trl calls methods of the model, and computes losses of its own from its outputs\n"
            "Way out: tokenise with trl's data functions, and autopar.trainer_class() with labels in the batch."
        )
    return type(f"Parallel{kind.__name__}", (_OnAllRanks, kind), {})


class _OnAllRanks:
    """The methods that differ; the base stands behind it."""

    model: Any
    args: Any
    state: Any
    optimizer: Any
    accelerator: Any
    gather_function: Any
    processing_class: Any

    def __init__(self, model: Any = None, args: Any = None, **others: Any) -> None:
        if not isinstance(model, ParallelModule):
            raise LaunchError(
                f"model= is a {type(model).__name__}: this Trainer is for the result of autopar.parallelize or "
                "autopar.from_pretrained\nWay out: transformers.Trainer for an ordinary model."
            )
        if args is not None:
            _refuse(model, args)
        if model.mesh.is_pipelined:
            _refuse_losses_of_its_own(type(self), args, others.get("compute_loss_func"))
        with _answering_as_a_plain_one(model):
            super().__init__(model=model, args=args, **others)  # type: ignore[call-arg]
        if args is None:
            _refuse(model, self.args)  # those by default
        self._ask(_without_adapters(held_by(model).model))

    def _ask(self, plain: Any) -> None:
        """What the base asks of the model that it is given, asked of ``plain``."""
        from transformers.utils.generic import can_return_loss, find_labels

        takes = inspect.signature(plain.forward).parameters
        labels = find_labels(type(plain))
        self.label_names = labels if self.args.label_names is None else self.args.label_names
        self.can_return_loss = can_return_loss(type(plain))
        self._signature_columns = [*takes, "label", "label_ids", *self.label_names]
        takes_any = any(one.kind is one.VAR_KEYWORD for one in takes.values())
        accepts = getattr(plain, "accepts_loss_kwargs", takes_any)  # a class may know better
        self.model_accepts_loss_kwargs = accepts and not self.model.mesh.is_pipelined

    def create_accelerator_and_postprocess(self) -> None:
        """Every rank gets the rows of all, and has what is known of them; the loss is not multiplied for an average."""
        self.args.average_tokens_across_devices = False
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        accelerator = self.accelerator
        accelerator.prepare_data_loader = partial(_prepared_whole, accelerator)
        for name in ("gather", "pad_across_processes"):
            setattr(accelerator, name, _as_it_is)
        usual = inspect.unwrap(type(accelerator).gather_for_metrics)  # of accelerate, also where it is watched
        self.gather_function = accelerator.gather_for_metrics = partial(_for_metrics, partial(usual, accelerator))

    def compute_loss(self, model: Any, *args: Any, **options: Any) -> Any:
        """As the base's, which asks the class for its name: the labels of some are smoothed one place further."""
        named = type(_without_adapters(held_by(self.model).model)).__name__
        vars(self.model)["_get_name"] = partial(str, named)
        try:
            return super().compute_loss(model, *args, **options)  # type: ignore[misc]
        finally:
            del vars(self.model)["_get_name"]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the base's; on a pipeline forward and backward are one."""
        if not self.model.mesh.is_pipelined:
            found: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
            return found
        for one in (model, self.optimizer):  # an optimizer without a schedule has two modes too
            if callable(getattr(one, "train", None)):
                one.train()
        loss: Tensor = model.train_step(**self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        return loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """Whole tensors: a rank has parts of the outputs, and on a pipeline those of its stages."""
        called = model
        if self.model.mesh.is_pipelined and not prediction_loss_only:
            device = self.args.device

            def called(**batch: Any) -> Any:
                return on_all_ranks(model(**batch), device)

        found = super().prediction_step(called, inputs, prediction_loss_only, *args, **kwargs)  # type: ignore[misc]
        return pytree.tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, found)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm: Tensor = self.model.clip_grad_norm_(self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Of all stages, also where nothing is clipped."""
        return self.model.clip_grad_norm_(float("inf")) if grad_norm is None else grad_norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """All ranks write their slices; of a model with adapters of peft, rank 0 writes these."""
        directory = output_dir or self.args.output_dir
        if not has_adapters(held_by(self.model).model):
            save_pretrained(self.model, directory, tokenizer=self.processing_class)
            return
        plain: Any = gather(self.model)
        if plain is not None:
            plain.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As the base's; adapters of peft, which it does not see in a parallel module, are read here."""
        if has_adapters(held_by(self.model).model):
            load_adapters(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        if has_adapters(held_by(self.model).model):
            load_adapters(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()  # type: ignore[misc]


def _without_adapters(plain: Any) -> Any:
    return plain.base_model.model if has_adapters(plain) else plain


@contextmanager
def _answering_as_a_plain_one(model: ParallelModule) -> Iterator[None]:
    """Within this context, ``model`` answers what a Trainer asks, in place of refusing one that is none of ours."""
    asked = {name: vars(model).pop(name) for name in ASKED_BY_TRAINER}
    try:
        yield
    finally:
        vars(model).update(asked)


def _as_it_is(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _for_metrics(usual: Any, data: Any, *args: Any, **options: Any) -> Any:
    """What ``accelerate`` makes of it in one process: of the last batch, as many entries as it has rows."""
    is_tensors = all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(data))
    return usual(data, *args, **options) if is_tensors else data


def _prepared_whole(accelerator: Any, loader: Any, **_: Any) -> Any:
    """``loader`` as ``accelerate`` prepares it in one process; ranks shuffle alike."""
    from accelerate.data_loader import prepare_data_loader

    config = accelerator.dataloader_config
    prepared = prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=accelerator.device_placement,
        rng_types=accelerator.rng_types.copy() if accelerator.rng_types else None, dispatch_batches=False,
        use_seedable_sampler=config.use_seedable_sampler, data_seed=config.data_seed,
    )  # fmt: skip
    accelerator._dataloaders.append(prepared)
    return prepared


def _refuse_losses_of_its_own(kind: type, args: Any, function: Any) -> None:
    """Raise LaunchError for a loss that the Trainer computes: the last stage of a pipeline has the model's alone."""
    from transformers import Trainer

    computes = next(one for one in kind.__mro__ if one is not _OnAllRanks and "compute_loss" in vars(one))
    found = {
        "label_smoothing_factor": bool(getattr(args, "label_smoothing_factor", 0)),
        "compute_loss_func": function is not None,
        f"compute_loss of {computes.__name__}": computes is not Trainer,
    }
    for name in (name for name, there in found.items() if there):
        raise LaunchError(
            f"{name}: on a pipeline the last stage computes the loss, which is the one that the model returns\n"
            "Way out: a model whose forward computes this loss; or a mesh without pp."
        )


def _refuse(model: ParallelModule, args: Any) -> None:
    saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
    replicas = [axis for axis in model.mesh.names if axis in REPLICA_AXES and model.mesh.size(axis) > 1]
    for precision in ("bf16", "fp16"):
        if getattr(args, precision, False):
            check_precision(model, model.plan, precision, f"TrainingArguments({precision}=True)")
    problems = {
        "save_strategy: a Trainer's checkpoint has the optimizer of one process": saves and not args.save_only_model,
        "gradient_accumulation_steps on a pipeline": model.mesh.is_pipelined and args.gradient_accumulation_steps > 1,
        "torch_compile: a parallel module runs programs of autopar": getattr(args, "torch_compile", False),
        "deepspeed: a parallel module splits states itself": bool(getattr(args, "deepspeed", None)),
        "fsdp: a parallel module splits parameters itself": bool(getattr(args, "fsdp", None)),
        "gradient_checkpointing: what is recomputed is a choice of the plan": args.gradient_checkpointing,
        f"Plan(inputs='local') on {model.mesh}: this Trainer gives every rank the whole batch, and takes it for all "
        "that there is": bool(replicas) and model.plan.inputs == "local",
    }
    ways = (
        "save_only_model=True, or save_strategy='no' with autopar.Checkpoints in a callback",
        "Plan(microbatches=), with the rows of all of them in per_device_train_batch_size",
        "torch_compile=False",
        "autopar.Plan(zero=1), 2 or 3, and no deepspeed=",
        "autopar.Plan(zero=3), and no fsdp=",
        "autopar.Plan(recompute='full'), or 'selective', and gradient_checkpointing=False",
        "autopar.Plan(inputs='global'), the default",
    )
    for (problem, there), way in zip(problems.items(), ways):
        if there:
            raise LaunchError(f"{problem}\nWay out: {way}.")
