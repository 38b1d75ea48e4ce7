"""``transformers.Trainer`` around a parallel module: parameters after five steps against a Trainer on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autopar
from autopar import LaunchError, Mesh, Plan, Precision
from autopar.zoo.named import named_model
from tests.launch import run_ranks
from tests.pretrained.test_pretrained import doubles
from tests.selection import slow_but

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="pip install accelerate")
TINY = {"num_hidden_layers": 2, "use_cache": False}
ROWS = 4


def data(steps: int) -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 250, (12,), generator=made) for _ in range(ROWS * steps)]
    found = [{"input_ids": row, "labels": row.clone()} for row in rows]
    for number, row in enumerate(found):
        row["labels"][: number % 5] = -100  # unequal numbers of labels, in each batch too
    return found


def arguments(directory: Path, accumulation: int = 1, **more: Any) -> Any:
    return transformers.TrainingArguments(
        str(directory), per_device_train_batch_size=ROWS, max_steps=5, gradient_accumulation_steps=accumulation,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="linear", max_grad_norm=0.5, use_cpu=True, seed=3,
        report_to=[], disable_tqdm=True, logging_strategy="no", **{"save_strategy": "no"} | more,
    )  # fmt: skip


def trained(mesh: str, accumulation: int, directory: Path, base: bool) -> tuple[dict[str, Tensor], float, Any]:
    with doubles():
        model: Any = named_model("hf:llama", TINY).model.double()
        if mesh:
            plan = Plan(check_numerics=False, microbatches=2 if "pp" in mesh else 1)
            model = autopar.parallelize(model, Mesh.parse(mesh), plan)
        cls = transformers.Trainer if base else autopar.trainer_class()
        trainer = cls(model=model, args=arguments(directory, accumulation), train_dataset=data(5 * accumulation))
        trainer.train()
        trainer = cls(model=model, args=arguments(directory), train_dataset=data(5))  # a second one in this process
        loss = trainer.evaluate(data(1))["eval_loss"]
        logits = trainer.predict(data(1)).predictions
        if mesh:
            trainer.save_model(str(directory / "files"))
    return model.full_state_dict() if mesh else model.state_dict(), loss, logits


RUNS = [("dp=2", 1), ("tp=2", 1), ("dp=2", 3), ("pp=2", 1), ("dp=1", 1)]


@pytest.mark.parametrize(("mesh", "accumulation"), slow_but([], RUNS))
def test_parameters_after_five_steps(mesh: str, accumulation: int, tmp_path: Path) -> None:
    expected, loss, logits = trained("", accumulation, tmp_path / "one", base=True)
    results = run_ranks(trained, Mesh.parse(mesh).world_size, mesh, accumulation, tmp_path / "out", False)
    for found, evaluated, predicted in results:
        worst = max(float((found[name] - value).abs().max()) for name, value in expected.items())
        print(f"Trainer on {mesh}, {accumulation} batches a step: {worst:.1e}")
        assert worst < 1e-12 and abs(evaluated - loss) < 1e-10
        assert predicted.shape == logits.shape and abs(predicted - logits).max() < 1e-10
    start = named_model("hf:llama", TINY).model.double().state_dict()
    assert max(float((start[name] - value).abs().max()) for name, value in expected.items()) > 1e-4
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "files").state_dict()
    assert all(torch.allclose(back[name], value, atol=1e-12) for name, value in expected.items())


def smoothed(base: bool, directory: Path) -> list[float]:
    """Losses of a step with smoothed labels, and of an evaluation whose last batch has fewer rows."""
    with doubles():
        model: Any = named_model("hf:llama", TINY).model.double()
        if not base:
            model = autopar.parallelize(model, Mesh(dp=1), Plan(check_numerics=False))
        cls = transformers.Trainer if base else autopar.trainer_class()
        args = arguments(directory, label_smoothing_factor=0.1, per_device_eval_batch_size=ROWS)
        args.max_steps, args.logging_strategy = 2, "steps"
        trainer = cls(model=model, args=args, train_dataset=data(2))
        return [trainer.train().training_loss, trainer.evaluate(data(2)[:6])["eval_loss"]]


def test_smoothed_labels_and_a_last_batch(tmp_path: Path) -> None:
    assert smoothed(False, tmp_path) == pytest.approx(smoothed(True, tmp_path), abs=1e-9)


def not_scaled(base: bool, directory: Path) -> dict[str, Tensor]:
    """Parameters of a model that says of itself that it does not divide by ``num_items_in_batch``."""
    with doubles():
        model: Any = named_model("hf:llama", TINY).model.double()
        model.accepts_loss_kwargs = False
        if not base:
            model = autopar.parallelize(model, Mesh(dp=1), Plan(check_numerics=False))
        args = arguments(directory, 2)
        args.max_steps = 1
        cls = transformers.Trainer if base else autopar.trainer_class()
        cls(model=model, args=args, train_dataset=data(2)).train()
    return dict(model.state_dict()) if base else model.full_state_dict()


def test_the_class_says_whether_it_scales_the_loss(tmp_path: Path) -> None:
    expected, found = not_scaled(True, tmp_path), not_scaled(False, tmp_path)
    assert max(float((found[name] - value).abs().max()) for name, value in expected.items()) < 1e-12


def test_a_trainer_gathers_nothing_where_accelerate_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = autopar.parallelize(named_model("hf:llama", TINY).model, Mesh(dp=1))
    assert model._is_accelerate_prepared  # an earlier Trainer, or accelerate, has asked
    trainer = autopar.trainer_class()(model=model, args=arguments(tmp_path), train_dataset=data(5))
    monkeypatch.setitem(vars(trainer.accelerator.state), "num_processes", 2)
    assert trainer.accelerator.num_processes == 2
    for gather in (trainer.accelerator.gather_for_metrics, trainer.gather_function):
        assert torch.equal(gather(torch.ones(3)), torch.ones(3))


class OwnLoss(transformers.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        return model(**inputs).loss * 2


OWN_LOSSES = {
    "label_smoothing_factor": (None, {"label_smoothing_factor": 0.1}, {}),
    "compute_loss_func": (None, {}, {"compute_loss_func": torch.nn.functional.cross_entropy}),
    "compute_loss of OwnLoss": (OwnLoss, {}, {}),
}


@pytest.mark.parametrize("name", list(OWN_LOSSES))
def test_a_loss_of_the_trainers_own_is_refused_on_a_pipeline(name: str, tmp_path: Path) -> None:
    base, options, more = OWN_LOSSES[name]
    model = autopar.parallelize(named_model("hf:llama", TINY).model, Mesh(pp=2), Plan(microbatches=2))
    with pytest.raises(LaunchError, match=f"(?s){name}: on a pipeline the last stage.*Way out: a model whose forward"):
        autopar.trainer_class(base)(model=model, args=arguments(tmp_path, **options), train_dataset=data(5), **more)


def test_what_is_refused(tmp_path: Path) -> None:
    plain = named_model("hf:llama", TINY).model
    with pytest.raises(LaunchError, match="model= is a LlamaForCausalLM: this Trainer is for the result of"):
        autopar.trainer_class()(model=plain, args=arguments(tmp_path), train_dataset=data(5))
    model = autopar.parallelize(plain, Mesh(dp=1))
    with pytest.raises(LaunchError, match=r"(?s)scales the loss.*Way out: Trainer = autopar.trainer_class\(\)"):
        transformers.Trainer(model=model, args=arguments(tmp_path), train_dataset=data(5))
    with pytest.raises(LaunchError, match="(?s)the optimizer of one process.*Way out: save_only_model=True"):
        autopar.trainer_class()(model=model, args=arguments(tmp_path, save_strategy="steps"))
    with pytest.raises(LaunchError, match="the optimizer of one process"):
        autopar.trainer_class()(model=model)  # which saves by default
    local = autopar.parallelize(named_model("hf:llama", TINY).model, Mesh(dp=2), Plan(inputs="local"))
    with pytest.raises(LaunchError, match=r"(?s)inputs='local'\) on mesh\(dp=2\).*the whole batch.*inputs='global'"):
        autopar.trainer_class()(model=local, args=arguments(tmp_path))
    of_trl = type("SFTTrainer", (transformers.Trainer,), {"__module__": "trl.trainer.sft_trainer"})
    with pytest.raises(LaunchError, match="(?s)SFTTrainer of trl calls methods.*Way out"):
        autopar.trainer_class(of_trl)


REFUSED = {
    "bf16": (True, r"TrainingArguments\(bf16=True\).*this one in float32\nWay out: autopar.Plan\(precision="),
    "gradient_checkpointing": (True, r"Way out: autopar.Plan\(recompute='full'\)"),
    "torch_compile": (True, "torch_compile: a parallel module runs programs of autopar\nWay out: torch_compile=False"),
    "fsdp": ("full_shard", r"fsdp: a parallel module splits parameters itself\nWay out: autopar.Plan\(zero=3\)"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_an_argument_that_would_be_ignored_is_refused(name: str, tmp_path: Path) -> None:
    model = autopar.parallelize(named_model("hf:llama", TINY).model, Mesh(dp=1))
    args = arguments(tmp_path)
    value, message = REFUSED[name]
    setattr(args, name, value)  # as TrainingArguments leaves it, without what it starts for it
    with pytest.raises(LaunchError, match=f"(?s){message}"):
        autopar.trainer_class()(model=model, args=args, train_dataset=data(5))


def test_a_precision_that_the_plan_has_too_is_no_problem(tmp_path: Path) -> None:
    plan = Plan(precision=Precision(param="bf16"), check_numerics=False)
    model = autopar.parallelize(named_model("hf:llama", TINY).model, Mesh(dp=1), plan)
    args = arguments(tmp_path)
    args.bf16 = True
    autopar.trainer_class()(model=model, args=args, train_dataset=data(5))


class OwnTrainer(transformers.Trainer):
    said = "of a user's own class"


def test_a_class_of_ones_own_and_its_checkpoints(tmp_path: Path) -> None:
    model = autopar.parallelize(named_model("hf:llama", TINY).model, Mesh(dp=1))
    cls = autopar.trainer_class(OwnTrainer)
    args = arguments(tmp_path, save_strategy="steps", save_steps=5, save_only_model=True)
    trainer = cls(model=model, args=args, train_dataset=data(5))
    assert trainer.said and isinstance(trainer, OwnTrainer) and cls is autopar.trainer_class(OwnTrainer)
    trainer.train()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.full_state_dict().items())
