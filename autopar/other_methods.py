"""What other frameworks ask of a model: methods of its class, with the line that does the same, and attributes.

And what they make of a model: methods that their wrappers have, and the wrappers, by the names of their classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.errors import LaunchError
from autopar.plan import Plan
from autopar.precision import NAMES

GATHER = "plain = autopar.gather(model) on all ranks, then on rank 0: plain.{name}(...)"
BEFORE = "call it on the plain model, before autopar.parallelize, or before it is saved for autopar.from_pretrained"
COUNTED = "call it before autopar.parallelize; or sum(one.numel() for one in model.parameters()), which are whole sizes"
AFTER_SAVING = "autopar.save_pretrained(model, directory) on all ranks, then {how}"

INSTEAD = {
    "save_pretrained": "autopar.save_pretrained(model, directory) on all ranks",
    "push_to_hub": AFTER_SAVING.format(how="hf upload NAME directory"),
    "from_pretrained": "autopar.from_pretrained(folder_or_id, mesh)",
    "resize_token_embeddings": BEFORE,
    "add_adapter": "peft.get_peft_model(plain, config), then autopar.parallelize(that, mesh)",
    "load_adapter": "peft's PeftModel.from_pretrained(plain, ...), then autopar.parallelize(that, mesh)",
    "gradient_checkpointing_enable": 'autopar.Plan(recompute="full"), or "selective"',
    "gradient_checkpointing_disable": 'autopar.Plan(recompute="none")',
    "prune_heads": BEFORE,
    "init_weights": BEFORE,
    "tie_weights": BEFORE,
    "set_input_embeddings": BEFORE,
    "set_output_embeddings": BEFORE,
    "enable_input_require_grads": BEFORE,
    "num_parameters": COUNTED,
    "get_memory_footprint": COUNTED,
    "print_trainable_parameters": COUNTED,
    "get_nb_trainable_parameters": COUNTED,
    "training_step": "a Lightning module around the parallel one: docs/frameworks.md",
    "configure_optimizers": "{kind}.{name}(model, ...), which makes it of the parallel parameters; or for Lightning a "
    "Lightning module around the parallel one: docs/frameworks.md",
    "merge_and_unload": GATHER,
}

SWITCHES_OF_PEFT = (  # what they write into modules, or add to parameters, the next call sees
    "disable_adapter",
    "enable_adapter_layers",
    "disable_adapter_layers",
    "set_adapter",
)
MERGES_OF_PEFT = ("merge_adapter", "unmerge_adapter")  # each parameter of every stage has to be there

NO_SYNC = (
    "with model.no_sync(): around the batches before the last, or Plan(microbatches=m) and model.train_step(**batch)"
)
PREFETCH = "parameters are gathered ahead of their use, within Plan(overlap_mb=...)"
WHOLE = "autopar.gather(model), model.full_state_dict(), or full_tensor() of one parameter, on all ranks"
SAVING = "autopar.Checkpoints(directory): save(step, model, optimizer), load(model, optimizer), on any mesh"
WRAPPED_ELSEWHERE = {  # method or attribute -> whose it is, and the line that does the same here
    "set_requires_gradient_sync": ("FSDP2", NO_SYNC),
    "set_is_last_backward": ("FSDP2", NO_SYNC),
    "set_requires_all_reduce": ("FSDP2", NO_SYNC),
    "set_reshard_after_forward": ("FSDP2", "Plan(zero=3, reshard_after_forward=False)"),
    "set_reshard_after_backward": ("FSDP2", "parameters are freed after backward, always"),
    "set_modules_to_forward_prefetch": ("FSDP2", PREFETCH),
    "set_modules_to_backward_prefetch": ("FSDP2", PREFETCH),
    "set_gradient_divide_factor": ("FSDP2", "gradients are those of the loss of the whole batch: scale the loss"),
    "unshard": ("FSDP2", WHOLE),
    "reshard": ("FSDP2", WHOLE),
    "summon_full_params": ("FullyShardedDataParallel", WHOLE),
    "module": ("DistributedDataParallel", "the parallel module itself: it has the model's names and attributes"),
    "register_comm_hook": ("DistributedDataParallel", 'Plan(precision=autopar.Precision(param="bf16"), bucket_mb=25)'),
    "backward": ("DeepSpeed", "loss.backward()"),
    "step": ("DeepSpeed", "optimizer.step(), optimizer.zero_grad(); model.clip_grad_norm_(1.0) before it"),
    "train_batch": ("DeepSpeed", "loss = model.train_step(**batch), the batch whole"),
    "eval_batch": ("DeepSpeed", "with torch.no_grad(): loss = model(**batch).loss"),
    "save_checkpoint": ("DeepSpeed", SAVING),
    "load_checkpoint": ("DeepSpeed", SAVING),
    "save_16bit_model": ("DeepSpeed", "autopar.save_pretrained(model, directory) on all ranks"),
    "is_gradient_accumulation_boundary": ("DeepSpeed", NO_SYNC),
    "finish_grad_sync": ("Megatron-LM", "gradients are reduced when backward, or train_step, returns"),
    "start_grad_sync": ("Megatron-LM", "gradients are reduced when backward, or train_step, returns"),
    "zero_grad_buffer": ("Megatron-LM", "optimizer.zero_grad()"),
    "sharded_state_dict": ("Megatron-LM", SAVING),
    "set_input_tensor": ("Megatron-LM", "model.train_step(**batch) runs the schedule of a pipeline"),
}
WRAPPERS = {  # class -> the plain model, and what does here what it does
    "DistributedDataParallel": ("model.module", 'Mesh(dp=n) with Plan(inputs="local") is the same'),
    "DataParallel": ("model.module", "Mesh(dp=n) is the same, one process for each device"),
    "FullyShardedDataParallel": ("the model before it is wrapped", "Mesh(dp=n) with Plan(zero=3) is the same"),
    "FSDPModule": ("the model before fully_shard", "Mesh(dp=n) with Plan(zero=3) is the same"),
    "DeepSpeedEngine": ("engine.module, before deepspeed.initialize", "Mesh(dp=n) with Plan(zero=...) is the same"),
    "ParallelModule": ("the model before it is parallelised", "a model is parallelised once, over all axes"),
}


class _AskedByTrainer:
    """What the Trainer of transformers finds where it asks a model about its loading, or its loss.

    Of itself it gives each rank other rows and multiplies the loss by the number of ranks. Raises LaunchError.
    """

    def __bool__(self) -> bool:
        raise LaunchError(
            "a Trainer of transformers gives each process other rows, and scales the loss by the number of processes; "
            "a parallel module does both itself\n"
            "Way out: Trainer = autopar.trainer_class(), then Trainer(model=model, args=..., train_dataset=...)."
        )


class _AskedByAccelerate:
    """What ``accelerate`` finds where it asks whether it has wrapped a model: it need not, this one is parallel.

    Nor does it then set the precision. Raises LaunchError where it was told another than the module computes in.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model, self._plan = model, plan

    def __bool__(self) -> bool:
        from accelerate.state import AcceleratorState

        asked = AcceleratorState._shared_state.get("_mixed_precision")
        if asked is not None:
            check_precision(self._model, self._plan, str(asked), f"Accelerator(mixed_precision={str(asked)!r})")
        _watch_accelerate(self._plan.inputs == "global")
        return True


@cache
def _watch_accelerate(every_rank_has_all_rows: bool) -> None:
    """Let ``accelerate`` neither gather what is whole, nor step once for each process where all take the same batch.

    Nor save the parts of one rank: ``save_model`` and ``get_state_dict`` have the whole model.
    """
    from accelerate import Accelerator
    from accelerate.scheduler import AcceleratedScheduler

    def gather(usual: Any, name: str) -> Any:
        @wraps(usual)
        def gathered(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
            is_whole = every_rank_has_all_rows and any(map(_is_parallel, self._models))
            of_metrics = is_whole and name == "gather_for_metrics"
            repeats = self.num_processes > 1 and (of_metrics or _has_dtensor(data))
            found = None if repeats else usual(self, data, *args, **kwargs)
            if repeats or is_whole and _repeats(data, found, self.num_processes):
                raise LaunchError(
                    f"accelerator.{name} joins what each of {self.num_processes} processes has, and outputs of a "
                    "parallel module are those of all: rows would count several times\n"
                    f"Way out: leave {name} out; output.full_tensor() on all ranks has all rows."
                )
            return found

        return gathered

    def get_state_dict(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        return model.full_state_dict() if _is_parallel(model) else usual_state_dict(self, model, *args, **kwargs)

    def refusing(usual: Any, name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if any(map(_is_parallel, self._models)):
                raise LaunchError(
                    f"accelerator.{name} has the optimizer states of one process, which are parts\nWay out: {SAVING}; "
                    "of the model alone: accelerator.save_model(model, directory) on all ranks."
                )
            return usual(self, *args, **kwargs)

        return call

    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        if _has_dtensor([optimizer.param_groups for optimizer in self.optimizers]):
            self.split_batches = True  # then it takes one step
        usual_step(self, *args, **kwargs)

    kinds: Any = Accelerator, AcceleratedScheduler
    for name in ("gather", "gather_for_metrics"):
        setattr(kinds[0], name, gather(getattr(kinds[0], name), name))
    for name in ("save_state", "load_state"):
        setattr(kinds[0], name, refusing(getattr(kinds[0], name), name))
    usual_step, usual_state_dict = kinds[1].step, kinds[0].get_state_dict
    kinds[0].get_state_dict = get_state_dict
    if every_rank_has_all_rows:
        kinds[1].step = step


def _has_dtensor(data: Any) -> bool:
    return any(isinstance(leaf, DTensor) for leaf in pytree.tree_leaves(data))


def _repeats(data: Any, gathered: Any, count: int) -> bool:
    """Whether each of ``count`` processes has given the same rows in one of the tensors that were ``gathered``."""
    pairs = zip(pytree.tree_leaves(data), pytree.tree_leaves(gathered))
    rows = [found.chunk(count) for one, found in pairs if isinstance(one, Tensor) and one.dim() and one.numel()]
    return count > 1 and any(all(torch.equal(parts[0], part) for part in parts) for parts in rows)


def _is_parallel(model: Any) -> bool:
    return isinstance(vars(model).get("_ddp_params_and_buffers_to_ignore"), _AskedByDdp)


class _AskedByDdp:
    """What ``DistributedDataParallel`` finds where it asks which parameters to leave out. Raises LaunchError."""

    def __iter__(self) -> Iterator[str]:
        raise LaunchError(
            "a parallel module sends gradients itself, and needs no DistributedDataParallel around it\n"
            "Way out: train it as it is."
        )


def check_precision(model: nn.Module, plan: Plan, asked: str, written: str) -> None:
    """Raise LaunchError where a framework is to compute in ``asked`` (bf16, fp16, ... or no), and the plan does not.

    ``written``: how the user has said so.
    """
    found = plan.precision.param or next((str(one.dtype).removeprefix("torch.") for one in model.parameters()), asked)
    if asked == "no" or (NAMES.get(asked) == found and found != "float16"):
        return
    if NAMES.get(asked) in (None, "float16"):
        raise LaunchError(
            f"{written}: a parallel module has no scaling of losses or tensors for that\n"
            'Way out: autopar.Plan(precision=autopar.Precision(param="bf16")), and no precision here.'
        )
    raise LaunchError(
        f"{written}: a parallel module computes in the precision of its plan, and this one in {found}\n"
        f"Way out: autopar.Plan(precision=autopar.Precision(param={asked!r}))."
    )


def for_frameworks(model: nn.Module, plan: Plan) -> Mapping[str, Any]:
    """Attributes of a parallel module ``model`` that other frameworks ask for: docs/frameworks.md."""
    return {
        "_is_accelerate_prepared": _AskedByAccelerate(model, plan),
        "_ddp_params_and_buffers_to_ignore": _AskedByDdp(),
        "accepts_loss_kwargs": _AskedByTrainer(),
        "is_distributed_loading_by_transformers": _AskedByTrainer(),
    }


ASKED_BY_TRAINER = ("accepts_loss_kwargs", "is_distributed_loading_by_transformers")


def refusal(kind: str, name: str) -> str:
    """The message for method ``name`` of the model's class ``kind``, with the way out."""
    way_out = INSTEAD.get(name, GATHER).replace("{name}", name).replace("{kind}", kind)
    return (
        f"'{name}' is a method of {kind}; of those a parallel module has only forward(): "
        "what the model computes otherwise is not parallelised\n"
        f"Way out: {way_out}."
    )


def is_refused(model: object, name: str, found: Any, is_pipelined: bool) -> bool:
    """Whether ``found``, the attribute ``name`` of ``model``, is a method that a parallel module has not."""
    served = SWITCHES_OF_PEFT if is_pipelined else SWITCHES_OF_PEFT + MERGES_OF_PEFT
    switches = name in served and bool(getattr(model, "peft_config", None))
    return callable(found) and name not in vars(model) and not switches


def asked(model: object, name: str) -> Any:
    """An attribute of ``model``. Raises AttributeError, of what a wrapper elsewhere has with what is here instead."""
    try:
        return getattr(model, name)
    except AttributeError:
        if name not in WRAPPED_ELSEWHERE:
            raise
    whose, way_out = WRAPPED_ELSEWHERE[name]
    raise AttributeError(f"'{name}' is of {whose}; a parallel module has none\nWay out: {way_out}.")


def refuse_wrapped(model: object) -> None:
    """Raise ValueError for a model in which another framework communicates already."""
    for kind in type(model).__mro__:
        if kind.__name__ in WRAPPERS:
            plain, here = WRAPPERS[kind.__name__]
            raise ValueError(
                f"the model is a {kind.__name__} already, which communicates itself\n"
                f"Way out: parallelize {plain}; {here}."
            )
