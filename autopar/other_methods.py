"""What other frameworks ask of a model: methods of its class, with the line that does the same, and attributes."""

from __future__ import annotations

from autopar.errors import LaunchError

GATHER = "plain = autopar.gather(model) on all ranks, then on rank 0: plain.{name}(...)"
BEFORE = "call it on the plain model, before autopar.parallelize, or before it is saved for autopar.from_pretrained"
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
    "training_step": "a Lightning module around the parallel one: docs/frameworks.md",
    "configure_optimizers": "a Lightning module around the parallel one: docs/frameworks.md",
    "merge_and_unload": GATHER,
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


# docs/frameworks.md. The module is parallel already, so accelerate does not wrap it.
FOR_FRAMEWORKS = {
    "_is_accelerate_prepared": True,
    "accepts_loss_kwargs": _AskedByTrainer(),
    "is_distributed_loading_by_transformers": _AskedByTrainer(),
}


def refusal(kind: str, name: str) -> str:
    """The message for method ``name`` of the model's class ``kind``, with the way out."""
    way_out = INSTEAD.get(name, GATHER).replace("{name}", name)
    return (
        f"'{name}' is a method of {kind}; of those a parallel module has only forward(): "
        "what the model computes otherwise is not parallelised\n"
        f"Way out: {way_out}."
    )
