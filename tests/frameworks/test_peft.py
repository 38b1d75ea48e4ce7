"""Adapters of ``peft`` in a parallel module: trained beside frozen weights, and written in their own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar import CheckpointError, Mesh
from autopar.zoo.named import named_model
from tests.pretrained.test_pretrained import doubles

peft = pytest.importorskip("peft", reason="pip install peft")
transformers = pytest.importorskip("transformers")
TARGETS = ["q_proj", "v_proj"]


def test_adapters_go_to_files_of_their_own(tmp_path: Path) -> None:
    example = named_model("hf:llama", {"num_hidden_layers": 1}, batch=4)
    frozen = {name: value.clone() for name, value in example.model.state_dict().items()}
    adapted: Any = peft.get_peft_model(example.model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model = autopar.parallelize(adapted, Mesh(dp=1), example_inputs=example.batch)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
    for _ in range(2):
        model.train_step(**example.batch)
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(CheckpointError, match=r"(?s)adapters of peft.*autopar.gather\(model\)"):
        autopar.save_pretrained(model, tmp_path / "all")
    plain: Any = autopar.gather(model)
    plain.save_pretrained(tmp_path / "adapter")
    fresh = named_model("hf:llama", {"num_hidden_layers": 1}).model
    fresh.load_state_dict(frozen)
    back = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        expected, found = model.eval()(**example.batch).loss, back.eval()(**example.batch).loss
        assert abs(float(expected) - (found := float(found))) < 1e-6
    with torch.no_grad():
        with model.disable_adapter(), back.disable_adapter():  # type: ignore[operator]
            without, base = float(model(**example.batch).loss), float(back(**example.batch).loss)
        model.merge_adapter()  # type: ignore[operator]
        merged = float(model(**example.batch).loss)
        model.unmerge_adapter()  # type: ignore[operator]
        again = float(model(**example.batch).loss)
    assert abs(without - base) < 1e-6 and abs(merged - found) < 1e-6 and abs(again - found) < 1e-6 < abs(base - found)
    learned = [value for name, value in plain.state_dict().items() if "lora_B" in name]
    assert learned and all(bool(value.any()) for value in learned)


def data(steps: int) -> list[dict[str, Any]]:
    """Rows with positions, which are an argument of the model below the adapters."""
    made = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 250, (12,), generator=made) for _ in range(4 * steps)]
    return [{"input_ids": row, "labels": row.clone(), "position_ids": torch.arange(12) % 7} for row in rows]


def trained(directory: Path, base: bool) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """Losses of each step, the adapters of the best checkpoint, and those after two more steps from the first one."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    args = transformers.TrainingArguments(
        str(directory), per_device_train_batch_size=4, learning_rate=20.0, optim="sgd", max_grad_norm=0.0, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_steps=1, save_only_model=True, load_best_model_at_end=True, **options,
    )  # fmt: skip
    with doubles():
        plain = named_model("hf:llama", {"num_hidden_layers": 1, "use_cache": False}).model
        torch.manual_seed(0)
        model: Any = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=TARGETS)).double()
        if not base:
            model = autopar.parallelize(model, Mesh(dp=1), autopar.Plan(check_numerics=False))

        def adapters() -> dict[str, Any]:
            whole = model.state_dict() if base else model.full_state_dict()
            return {name: value.clone() for name, value in whole.items() if "lora" in name}

        cls = transformers.Trainer if base else autopar.trainer_class()
        trainer = cls(model=model, args=args, train_dataset=data(3), eval_dataset=data(1))
        trainer.train()
        best = adapters()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        args.load_best_model_at_end = False
        cls(model=model, args=args, train_dataset=data(3), eval_dataset=data(1)).train(f"{directory}/checkpoint-1")
        return losses, best, adapters()


def test_a_trainer_reads_adapters_from_its_checkpoints(tmp_path: Path) -> None:
    (expected, *others), (found, *ours) = trained(tmp_path / "one", True), trained(tmp_path / "parallel", False)
    assert found == pytest.approx(expected, abs=1e-10)
    for one, other in zip(others, ours):
        assert max(float((other[name] - value).abs().max()) for name, value in one.items()) < 1e-10


def test_adapters_are_not_merged_on_a_pipeline() -> None:
    plain = named_model("hf:llama", {"num_hidden_layers": 2}).model
    adapted: Any = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=TARGETS))
    model: Any = autopar.parallelize(adapted, Mesh(pp=2), autopar.Plan(microbatches=2))
    assert callable(model.disable_adapter)
    with pytest.raises(AttributeError, match=r"(?s)'merge_adapter' is a method of PeftModel.*autopar.gather\(model\)"):
        model.merge_adapter()


def test_adapters_of_other_modules_are_refused(tmp_path: Path) -> None:
    from autopar.frameworks.adapters import load_adapters

    def adapted(targets: list[str]) -> Any:
        plain = named_model("hf:llama", {"num_hidden_layers": 1}).model
        return peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=targets))

    model = autopar.parallelize(adapted(TARGETS), Mesh(dp=1))
    with pytest.raises(CheckpointError, match=r"(?s)adapter 'default' cannot be read from.*Way out: peft.PeftModel"):
        load_adapters(model, tmp_path)
    adapted(["k_proj"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)other modules than the model has: .*k_proj.*Way out"):
        load_adapters(model, tmp_path)
