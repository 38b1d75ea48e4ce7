"""Options of Megatron-LM's scripts, and what they are here: for the message to somebody who has typed one.

``docs/coming_from.md`` has the same in tables, and what is no option of ``autopar train`` as lines of a script.
"""

from __future__ import annotations

from collections.abc import Sequence

SCRIPT = "in a script of your own: {}"
NOTHING = "nothing to say: {}"

MEGATRON = {
    "--tensor-model-parallel-size": "--mesh tp=N",
    "--pipeline-model-parallel-size": "--mesh pp=N",
    "--context-parallel-size": "--mesh sp=N",
    "--expert-model-parallel-size": "--mesh ep=N",
    "--expert-tensor-parallel-size": "--expert-axes ep+tp for 1; else --expert-axes ep",
    "--cp-comm-type": "--attention ring, ulysses, gather or hybrid (p2p, a2a, allgather, a2a+p2p)",
    "--sequence-parallel": "--sequence megatron",
    "--use-distributed-optimizer": "--zero 1",
    "--use-megatron-fsdp": "--zero 3",
    "--data-parallel-sharding-strategy": "--zero 1, 2 or 3 (optim, optim_grads, optim_grads_params)",
    "--micro-batch-size": "--batch and --microbatches: rows of a step on all ranks, and their parts",
    "--global-batch-size": "--batch",
    "--rampup-batch-size": SCRIPT.format("batches may have any number of rows, from step to step"),
    "--seq-length": "--length",
    "--num-layers-per-virtual-pipeline-stage": "--schedule interleaved --virtual-stages N (stages of a rank)",
    "--num-virtual-stages-per-pipeline-rank": "--schedule interleaved --virtual-stages N",
    "--decoder-first-pipeline-num-layers": "--cuts model.layers.7,... (where the stages after the first begin)",
    "--decoder-last-pipeline-num-layers": "--cuts model.layers.7,... (where the stages after the first begin)",
    "--pipeline-model-parallel-layout": "--cuts model.layers.7,... (where the stages after the first begin)",
    "--account-for-embedding-in-pipeline-split": NOTHING.format("stages are cut where time is balanced"),
    "--recompute-granularity": "--recompute selective or full",
    "--recompute-activations": "--recompute selective",
    "--recompute-method": "--recompute full, or --recompute 0.5, the share of the activations that may be kept",
    "--recompute-num-layers": "--recompute 0.5, the share of the activations that may be kept",
    "--recompute-modules": "--recompute selective, or a share such as 0.5",
    "--overlap-grad-reduce": NOTHING.format("it is on; --overlap-mb 0 turns it off"),
    "--overlap-param-gather": NOTHING.format("it is on; --overlap-mb 0 turns it off"),
    "--overlap-p2p-communication": NOTHING.format("receives are posted ahead of their use"),
    "--tp-comm-overlap": NOTHING.format("sums over tp run beside gradients of weights; --overlap-mb 0 turns it off"),
    "--ddp-bucket-size": "--bucket-mb (megabytes)",
    "--bf16": "--precision param=bf16,reduce=fp32",
    "--fp16": SCRIPT.format('Plan(precision=Precision(param="fp16")) and torch.amp.GradScaler'),
    "--accumulate-allreduce-grads-in-fp32": "--precision param=bf16,reduce=fp32",
    "--clip-grad": "--clip",
    "--train-iters": "--steps",
    "--train-samples": "--steps",
    "--exit-interval": "--steps",
    "--exit-signal-handler": NOTHING.format("SIGTERM ends the step, saves and stops"),
    "--lr-warmup-iters": SCRIPT.format("torch.optim.lr_scheduler.LambdaLR; Checkpoints.save(..., scheduler=) saves it"),
    "--lr-decay-style": SCRIPT.format("torch.optim.lr_scheduler.LambdaLR; Checkpoints.save(..., scheduler=) saves it"),
    "--weight-decay": SCRIPT.format("groups of torch.optim.AdamW, of named_parameters() (norms, biases: dim() <= 1)"),
    "--eval-interval": SCRIPT.format("model.eval(); with torch.no_grad(): model(**batch)"),
    "--save": "--checkpoint DIR",
    "--load": "--checkpoint DIR --resume",
    "--save-interval": "--every N",
    "--ckpt-format": NOTHING.format("checkpoints are in parts, and any mesh loads them"),
    "--async-save": NOTHING.format("checkpoints are written while training goes on"),
    "--hf-model-path": "MODEL, a folder with config.json",
    "--data-path": "--data corpus_text_document.bin; corpus_text_document.idx beside it is read",
    "--tokenizer-type": "--tokenizer DIR, of transformers",
    "--tokenizer-model": "--tokenizer DIR, of transformers",
    "--make-vocab-size-divisible-by": NOTHING.format("any size is split; --config vocab_size=N"),
    "--reset-position-ids": "--documents separate",
    "--reset-attention-mask": "--documents separate",
    "--eod-mask-loss": "--documents separate",
    "--tensorboard-dir": "--tensorboard DIR",
    "--wandb-project": "--wandb, and WANDB_PROJECT=...",
    "--log-interval": "--log-every N",
    "--timing-log-level": "--profile DIR, or --trace DIR",
    "--moe-expert-capacity-factor": "--capacity-factor",
    "--moe-router-topk": "--config num_experts_per_tok=N",
    "--moe-grouped-gemm": NOTHING.format("the rows of an expert are multiplied together"),
    "--moe-token-dispatcher-type": NOTHING.format("rows go to their experts by an all-to-all"),
    "--moe-aux-loss-coeff": "a loss of the model, and --microbatch-weights statistics",
    "--num-layers": "--config num_hidden_layers=N",
    "--hidden-size": "--config hidden_size=N",
    "--num-attention-heads": "--config num_attention_heads=N",
    "--distributed-timeout-minutes": "--timeout (seconds)",
    "--distributed-backend": NOTHING.format("NCCL on CUDA devices, gloo else: --device"),
    "--transformer-impl": NOTHING.format("the model's own layers are split; flash attention is torch's"),
    "--use-flash-attn": NOTHING.format("attention is torch's scaled_dot_product_attention"),
    "--attention-backend": NOTHING.format("attention is torch's scaled_dot_product_attention"),
    "--init-model-with-meta-device": NOTHING.format("large models are built without memory"),
    "--use-tp-pp-dp-mapping": NOTHING.format("the order of a mesh is pp, dp, ep, sp, tp; tp has neighbours"),
}


def refuse_options_of_others(arguments: Sequence[str]) -> None:
    """Raise ValueError for an option of Megatron-LM among the arguments of a command, with what it is here."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if name == "--":
            return
        if name in MEGATRON:
            raise ValueError(f"{name} is an option of Megatron-LM\nWay out: {MEGATRON[name]} (docs/coming_from.md).")
